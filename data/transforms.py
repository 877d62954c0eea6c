"""Augmentation: drawn once for a sample, applied alike to both of its images."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from PIL import Image

logger = logging.getLogger("data")

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

_QUARTERS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


@dataclass(frozen=True)
class Photograph:
    """A photograph, decoded, perhaps at a smaller size than its own.

    Attributes:
        pixels: uint8 (H, W, 3).
        size: width and height that the photograph has.
        extent: the part of the pixels that the photograph fills.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    extent: Box

    @classmethod
    def of(cls, image: Image.Image) -> "Photograph":
        """An RGB image, such as `read_rgb` gives."""
        size = image.info.get("size", image.size)
        return cls(np.asarray(image), size, image.info.get("extent", (0, 0, *image.size)))


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


def augment(photograph: Photograph, augmentation: Augmentation) -> np.ndarray:
    """Scale (bicubic), crop, flip, turn.

    The published code crops last. A flip or turn maps the possible places of the crop onto each other, one to one. So
    cropping first gives the same distribution for square photographs, and only the pixels of the crop have to be
    computed. Others the published code turns without making room for the longer side, and crops beyond the edge: 12 to
    21 % of its samples of them have black corners. Here none has.

    Args:
        photograph: of any size. Photographs of one size get the very same treatment, others the same relative one. Of
            what was decoded at a smaller size, the full size counts, so that a pair stays aligned of which only one
            can be decoded so.
        augmentation: what to do.

    Returns:
        float32 (crop_size, crop_size, 3) in 0..1.
    """
    crop = augmentation.crop_size
    start_x, start_y, end_x, end_y = photograph.extent
    width, height = scaled_size(*photograph.size, augmentation.short_side)
    left = int(augmentation.across * (width - crop + 1))
    top = int(augmentation.down * (height - crop + 1))
    x, y = (end_x - start_x) / width, (end_y - start_y) / height  # source pixels a scaled pixel
    box = (
        start_x + left * x,
        start_y + top * y,
        min(start_x + (left + crop) * x, end_x),
        min(start_y + (top + crop) * y, end_y),
    )
    pixels = scale_part(photograph.pixels, box, crop)
    if augmentation.flip:
        pixels = cv2.flip(pixels, 1)
    if augmentation.turns:
        pixels = cv2.rotate(pixels, _QUARTERS[augmentation.turns])
    return np.divide(pixels, 255, dtype=np.float32)


def scale_part(pixels: np.ndarray, box: Box, side: int) -> np.ndarray:
    """A part of an image, uint8 (H, W, 3), scaled to (side, side, 3) by PIL's bicubic filter."""
    return (_compiled() or _by_pil)(pixels, box, side)


def _by_pil(pixels: np.ndarray, box: Box, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box=box))


@cache
def _compiled() -> Callable[[np.ndarray, Box, int], np.ndarray] | None:
    """What computes the same as PIL in a third of its time; None where that doesn't work, which a trial shows."""

    def scale(pixels: np.ndarray, box: Box, side: int) -> np.ndarray:
        result = np.empty((side, side, 3), np.uint8)
        bicubic.scale_part(np.ascontiguousarray(pixels), *np.float32(box), result)
        return result

    trial = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(16, 16, 3), (1.5, 2, 14, 14.5), 16
    try:
        from dereflect.data import bicubic

        same = np.abs(scale(*trial) - np.float32(_by_pil(*trial))).max() <= 1
        reason = None if same else "not what PIL gives"
    except Exception as error:  # whatever an installation can get wrong
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.info("photographs are scaled by PIL, as numba doesn't work: %s", reason)
    return None if reason else scale
