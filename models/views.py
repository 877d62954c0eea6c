"""The sizes at which a network is shown an image that is larger than those it was trained with.

A network knows reflections of the sizes that its training had, in pixels. In a photograph of 12 megapixels, all is ten
times as large. So it is shown the photograph smaller, at several sizes, and the mean of what it takes away there,
enlarged, is taken away from the photograph, whose own detail stays as it is.
"""

from collections.abc import Sequence

import cv2
import numpy as np

ROWS = 256
"""Rows of the image that are enlarged at once."""

Size = tuple[int, int]
"""Height and width in pixels."""


def sizes_of(sides: Sequence[int], height: int, width: int) -> list[Size]:
    """The sizes at which an image is shown.

    Args:
        sides: short sides in pixels, the largest first, of an image that is at least that large. A smaller one is
            shown as it is instead, and at sizes that are as much smaller than that as the other sides are than the
            first. Empty, or 0: the image as it is.
        height, width: of the image.
    """
    short = min(height, width)
    largest = min(sides[0], short) if sides and sides[0] else short
    shares = [side / sides[0] for side in sides] if sides and sides[0] else [1.0]
    scales = [largest * share / short for share in shares]
    return [(max(round(scale * height), 1), max(round(scale * width), 1)) for scale in scales]


def stated(checkpoint: dict) -> list[int]:
    """The sides that a checkpoint's content states under "sizes", as `tools/export.py --sizes` writes them, or none."""
    sides = checkpoint.get("sizes")
    plain = isinstance(sides, list) and all(type(side) is int and side >= 0 for side in sides)
    return sides if plain else []


def shown(image: np.ndarray, size: Size) -> np.ndarray:
    """An image (H, W, 3) of any type at a size that is not larger, averaged over areas."""
    if image.shape[:2] == size:
        return image
    if image.dtype == np.float16:  # OpenCV doesn't know it
        image = image.astype(np.float32)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def enlarged(part: np.ndarray, top: int, bottom: int, size: Size) -> np.ndarray:
    """Rows `top` to `bottom` of `part`, float32 (h, w, 3), enlarged to `size`, bilinearly between pixels' middles."""
    if part.shape[:2] == size:
        return part[top:bottom]
    height, width = size
    at = (np.arange(top, bottom, dtype=np.float64) + 0.5) * part.shape[0] / height - 0.5
    at = at.clip(0, part.shape[0] - 1)
    above = at.astype(np.int64)
    below = np.minimum(above + 1, part.shape[0] - 1)
    rows = part[above] + (at - above).astype(np.float32)[:, None, None] * (part[below] - part[above])
    return cv2.resize(rows, (width, bottom - top), interpolation=cv2.INTER_LINEAR)
