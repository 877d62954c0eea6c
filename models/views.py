"""The views of an image that a network is shown: smaller than the image is, at several sizes, every other one mirrored.

A network knows reflections of the sizes that its training had, in pixels. In a photograph of 12 megapixels, all is ten
times as large. So it is shown the photograph smaller, and the mean of what it takes away from the views, enlarged, is
taken away from the photograph, whose own detail stays as it is. What a network takes away depends a little on how an
image is framed; the mean of several views depends less. A view's sides are multiples of 16, so that no edge is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dereflect.options.arguments import STRIDE
from dereflect.util.errors import UserError

ROWS = 256
"""Rows of the image that are put together at once."""


@dataclass(frozen=True)
class View:
    """How an image is shown.

    Attributes:
        height, width: in pixels.
        mirrored: left to right.
    """

    height: int
    width: int
    mirrored: bool = False

    def of(self, image: np.ndarray) -> np.ndarray:
        """The view of an image, (H, W, 3) of any type; averaged over areas where it is smaller."""
        if image.shape[:2] != (self.height, self.width):
            if image.dtype == np.float16:  # OpenCV doesn't know it
                image = image.astype(np.float32)
            smaller = self.height <= image.shape[0] and self.width <= image.shape[1]
            how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
            image = cv2.resize(np.ascontiguousarray(image), (self.width, self.height), interpolation=how)
        return image[:, ::-1] if self.mirrored else image

    def back(self, part: np.ndarray, top: int, bottom: int, size: tuple[int, int]) -> np.ndarray:
        """What was found in the view, float32 (height, width, 3), as rows `top` to `bottom` of an image of `size`.

        Bilinear between the middles of the pixels.
        """
        if self.mirrored:
            part = part[:, ::-1]
        if part.shape[:2] == size:
            return part[top:bottom]
        height, width = size
        at = (np.arange(top, bottom, dtype=np.float64) + 0.5) * self.height / height - 0.5
        at = at.clip(0, self.height - 1)
        above = at.astype(np.int64)
        below = np.minimum(above + 1, self.height - 1)
        rows = part[above] + (at - above).astype(np.float32)[:, None, None] * (part[below] - part[above])
        return cv2.resize(rows, (width, bottom - top), interpolation=cv2.INTER_LINEAR)


def check(sides: Sequence[int]) -> None:
    """See whether these can be sides of views.

    Raises:
        UserError: one is larger than the one before, or 0 beside others.
    """
    if list(sides) != sorted(sides, reverse=True) or (len(sides) > 1 and 0 in sides):
        raise UserError(f"--sizes {' '.join(map(str, sides))}: the largest first, and 0 only by itself")


def views_of(sides: Sequence[int], height: int, width: int) -> list[View]:
    """The views of an image.

    Args:
        sides: short sides of the views in pixels, the largest first, of an image that is at least that large. A smaller
            one is shown at its own size, and at sizes that are as much smaller as the other sides are than the first;
            all to the nearest multiple of 16.
        height, width: of the image.

    Returns:
        The views; none, if there are no sides or the first is 0: the image is to be taken as it is.
    """
    if not sides or not sides[0]:
        return []
    short = min(height, width)
    scales = [min(sides[0], short) / short * side / sides[0] for side in sides]
    return [
        View(*(max(round(scale * side / STRIDE), 1) * STRIDE for side in (height, width)), mirrored=number % 2 == 1)
        for number, scale in enumerate(scales)
    ]


def stated(checkpoint: dict) -> list[int]:
    """The sides that a checkpoint states among the options of its training, `--sizes`, or none."""
    options = checkpoint.get("options")
    sides = options.get("sizes") if isinstance(options, dict) else None
    plain = isinstance(sides, list) and all(type(side) is int and side >= 0 for side in sides)
    return sides if plain else []
