"""Pictures of test images, as a run shows them: a row an image, with titles, names and PSNR."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dereflect.util.evaluation import Separated
from dereflect.util.metrics import joint_psnr

_TITLES = ("mixture", "transmission T", "its target", "reflection R", "its target", "residue")
_GAP = 8
_LINE = 14  # height of a line of text
_NARROWEST = 100  # a column that still has room for its title


def draw(images: Sequence[Separated]) -> np.ndarray:
    """A row of six tiles for each image, below the titles: (H, W, 3) in 0..1, on white.

    Above a row stands the image's name and the PSNR, in dB, of mixture and transmission against the transmission's
    target, of all channels together.
    """
    tiles = [
        [
            _array(tile)
            for tile in (i.mixture, i.transmission, i.target_t, i.reflection, i.target_r, i.residue / 2 + 0.5)
        ]
        for i in images
    ]
    columns = max(_NARROWEST, *(row[0].shape[1] for row in tiles)) + _GAP
    height = _LINE + sum(row[0].shape[0] + _LINE + _GAP for row in tiles)
    picture = Image.new("RGB", (columns * len(_TITLES), height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_LINE - 4)
    for number, title in enumerate(_TITLES):
        pen.text((number * columns, 0), title, "black", font)
    top = _LINE
    for image, row in zip(images, tiles, strict=True):
        pen.text((0, top), f"{image.name}: {joint_psnr(row[0], row[2]):.2f} dB", "black", font)
        pen.text((columns, top), f"{joint_psnr(row[1], row[2]):.2f} dB", "black", font)
        for number, tile in enumerate(row):
            picture.paste(Image.fromarray(tile), (number * columns, top + _LINE))
        top += row[0].shape[0] + _LINE + _GAP
    return np.asarray(picture, np.float32) / 255


def _array(image: Tensor) -> np.ndarray:
    """(3, H, W) around 0..1 to (H, W, 3) of 8 bits."""
    return (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
