"""Test sets of one kind of reflection each, to see where a network is good: which of them need a view of the whole?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dereflect.data.folders import LAYERS, find_images
from dereflect.data.physical import DISPLAY_GAMMA, Exposure, Glass, Mask, shine
from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb, write_image
from dereflect.util.progress import track

SIDE = 320
EACH = 2
"""Mixtures of each photograph in each set."""

_SEED = 2018
_PLAIN = Glass(
    behind=Exposure(), mirrored=Exposure(), gamma=DISPLAY_GAMMA, lamps=0.0, darkening=1.0, sigma=0.0, ghost=(0.0, 0.0),
    ghost_strength=0.0, ratio=0.5, veil=(0.0, 0.0, 0.0), mask=None, alpha=1.0,
)  # fmt: skip
_SHARP, _FAIR, _SOFT = 0.5, 3.0, 18.0  # blur in pixels
_EDGE = 1.5  # softness of a mask's edge, in pixels


def draw(kind: str, rng: np.random.Generator) -> Glass:
    """A glass of one of KINDS; the mirrored light is 0.3 to 0.8 times what comes from behind, in the mean."""
    glass = replace(_PLAIN, ratio=float(rng.uniform(0.3, 0.8)))
    line = Mask("half", (rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2)), _EDGE)
    left, top = rng.uniform(0.05, 0.3, 2)
    pane = Mask("pane", (left, left + 0.5, top, top + 0.5), _EDGE)
    veil = (float(rng.uniform(0.03, 0.12)),) * 3
    return {
        "sharp": replace(glass, sigma=_SHARP),
        "soft": replace(glass, sigma=_SOFT),
        "veil": replace(glass, sigma=_SOFT, ratio=0.02, veil=veil),
        "half": replace(glass, sigma=_FAIR, mask=line),
        "half_soft": replace(glass, sigma=_SOFT, mask=line),
        "pane": replace(glass, sigma=_FAIR, mask=pane),
    }[kind]


KINDS = ("sharp", "soft", "veil", "half", "half_soft", "pane")
"""All over and sharp; all over and soft; an even veil; on one side of a line, fair or soft; in a rectangle."""


def kinds(source: Path, base: Path) -> None:
    """Mix the photographs of a folder with each other: `test/KIND` of `base`, SIDE pixels high and wide, as PNG.

    Raises:
        UserError: there are fewer than two photographs, one can't be read or is too small, or a set is there already.
    """
    files = find_images(source)
    if len(files) < 2:
        raise UserError(f"{source}: {len(files)} photographs in it; two are needed to mix them")
    images = [(file, read_rgb(file)) for file in files]
    for file, image in images:
        if min(image.size) < SIDE:
            raise UserError(f"{file}: {image.width} x {image.height} pixels; both sides must have {SIDE}")
    for number, kind in enumerate(KINDS):
        target = base / "test" / kind
        if target.exists():
            raise UserError(f"{target}: exists already; remove it, or name another --base_dir")
        rng = np.random.default_rng([_SEED, number])
        with disk.writing(target, "--base_dir"):
            for layer in LAYERS:
                (target / layer).mkdir(parents=True)
        for index in track(range(EACH * len(files)), kind, EACH * len(files)):
            behind = index % len(files)
            mirrored = (behind + 1 + int(rng.integers(len(files) - 1))) % len(files)
            t, r = (_crop(images[which][1], rng) for which in (behind, mirrored))
            layers = shine(t, r, draw(kind, rng))
            for layer, pixels in zip(LAYERS, layers, strict=True):
                name = f"{files[behind].stem}_{index // len(files)}.png"
                write_image(target / layer / name, pixels)


def _crop(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, as much as its short side or down to a half of it, at SIDE pixels."""
    side = rng.uniform(max(SIDE, min(image.size) / 2), min(image.size))
    x, y = (rng.uniform(0, length - side) for length in image.size)
    part = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(part, np.float32) / 255
