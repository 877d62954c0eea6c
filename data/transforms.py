"""Augmentation: drawn once for a sample, applied alike to both of its images."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """One draw of the paired augmentation of ERRNet and DSRNet.

    Attributes:
        crop_size: side of the result, in pixels.
        short_side: what the image's short side is scaled to, even, in pixels.
        across, down: where the crop lies, as a fraction in [0, 1) of the room there is.
        flip: mirror left and right.
        turns: quarter turns counterclockwise, after the flip.
    """

    crop_size: int
    short_side: int
    across: float
    down: float
    flip: bool
    turns: int

    @classmethod
    def draw(cls, rng: np.random.Generator, crop_size: int, max_scale: float = 2) -> "Augmentation":
        """Uniform even short side from the crop's to `max_scale` times that (published: 2), uniform place, flipped
        half the time, turned half the time."""
        return cls(
            crop_size=crop_size,
            short_side=2 * int(rng.integers(crop_size // 2, int(max_scale * crop_size) // 2, endpoint=True)),
            across=rng.random(),
            down=rng.random(),
            flip=bool(rng.random() < 0.5),
            turns=int(rng.integers(1, 4)) if rng.random() < 0.5 else 0,
        )


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height for a given even short side; the long side keeps the aspect ratio, rounded up to even."""
    long_side = short_side * max(width, height) // min(width, height)
    long_side += long_side % 2
    return (long_side, short_side) if width > height else (short_side, long_side)


def augment(image: Image.Image, augmentation: Augmentation) -> np.ndarray:
    """Scale (bicubic), crop, flip, turn.

    The published code crops last. A flip or turn maps the possible places of the crop onto each other, one to one. So
    cropping first gives the same distribution for square photographs, and only the pixels of the crop have to be
    computed. Others the published code turns without making room for the longer side, and crops beyond the edge: 12 to
    21 % of its samples of them have black corners. Here none has.

    Args:
        image: RGB, of any size. Images of one size get the very same treatment, others the same relative one. Of an
            image that was decoded at a smaller size (see `read_rgb`), the full size counts, so that a pair stays
            aligned of which only one can be decoded so.
        augmentation: what to do.

    Returns:
        float32 (crop_size, crop_size, 3) in 0..1.
    """
    crop = augmentation.crop_size
    start_x, start_y, end_x, end_y = image.info.get("extent", (0, 0, *image.size))
    width, height = scaled_size(*image.info.get("size", image.size), augmentation.short_side)
    left = int(augmentation.across * (width - crop + 1))
    top = int(augmentation.down * (height - crop + 1))
    x, y = (end_x - start_x) / width, (end_y - start_y) / height  # source pixels a scaled pixel
    box = (
        start_x + left * x,
        start_y + top * y,
        min(start_x + (left + crop) * x, end_x),
        min(start_y + (top + crop) * y, end_y),
    )
    pixels = np.asarray(image.resize((crop, crop), Image.Resampling.BICUBIC, box=box))
    if augmentation.flip:
        pixels = pixels[:, ::-1]
    return np.divide(np.rot90(pixels, augmentation.turns), 255, dtype=np.float32, order="C")
