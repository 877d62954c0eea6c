"""Bicubic scaling of a part of a photograph, compiled by numba: in whole numbers, as PIL computes it.

PIL's filter is Keys's with a = -0.5, widened by the factor by which it makes smaller; its weights have 22 binary
places, and what the first pass, along the rows, leaves is rounded to 8 bits. Here sixteen rows at a time are turned so
that their pixels lie side by side, and each is weighted sixteen rows at once.
"""

import math

import numba
import numpy as np
from numba import types

from dereflect.util.compiled import compiled

PLACES = 22  # binary, of a weight
ROWS = 16  # worked on at once
HALF = np.int32(1 << PLACES - 1)

_pixels = types.Array(types.uint8, 3, "C", readonly=True)
_result = types.Array(types.uint8, 3, "C")


@numba.njit(error_model="numpy")
def keys(x):
    """The bicubic filter."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@numba.njit(error_model="numpy")
def filters(start, end, count, length):
    """For each of `count` pixels that scale start..end of `length` pixels: the first pixel that it is made of, and the
    weights of that one and those behind it; 0 where there is none."""
    scale = np.float64(end - start) / count
    wide = max(scale, 1.0)
    first = np.empty(count, np.int64)
    weights = np.zeros((count, 2 * math.ceil(2 * wide) + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for i in range(count):
        center = start + (i + 0.5) * scale
        first[i] = max(int(center - 2 * wide + 0.5), 0)
        taps = min(int(center + 2 * wide + 0.5), length) - first[i]
        total = 0.0
        for j in range(taps):
            exact[j] = keys((j + first[i] - center + 0.5) * (1 / wide))
            total += exact[j]
        for j in range(taps):
            weight = exact[j] / total * (1 << PLACES)
            weights[i, j] = int(weight + (0.5 if weight >= 0 else -0.5))
    return first, weights


@compiled(types.void(_pixels, types.float32, types.float32, types.float32, types.float32, _result))
def scale_part(pixels, left, top, right, bottom, result):
    """Scale the part of the pixels (H, W, 3) within left..right, top..bottom to the result (h, w, 3)."""
    columns, across = filters(left, right, result.shape[1], pixels.shape[1])
    rows, down = filters(top, bottom, result.shape[0], pixels.shape[0])
    from_row, to_row = rows[0], min(rows[-1] + down.shape[1], pixels.shape[0])
    from_column, to_column = columns[0], min(columns[-1] + across.shape[1], pixels.shape[1])
    width = 3 * len(columns)
    turned = np.empty((columns[-1] + across.shape[1] - from_column, 3 * ROWS), np.uint8)
    scaled = np.empty((to_row - from_row, width), np.uint8)

    sums = np.empty(3 * ROWS, np.int32)
    for begin in range(from_row, to_row, ROWS):
        count = min(ROWS, to_row - begin)
        for y in range(count):
            for x in range(to_column - from_column):
                for c in range(3):
                    turned[x, c * ROWS + y] = pixels[begin + y, from_column + x, c]
        for i in range(len(columns)):
            sums[:] = HALF
            for j in range(across.shape[1]):
                weight, column = across[i, j], turned[columns[i] - from_column + j]
                if weight:
                    for k in range(3 * ROWS):
                        sums[k] += weight * np.int32(column[k])
            for k in range(3 * ROWS):
                sums[k] = min(max(sums[k] >> PLACES, 0), 255)
            for y in range(count):
                for c in range(3):
                    scaled[begin - from_row + y, 3 * i + c] = sums[c * ROWS + y]

    line = np.empty(width, np.int32)
    for i in range(len(rows)):
        line[:] = HALF
        for j in range(down.shape[1]):
            weight = down[i, j]
            if weight:  # else there may be no such row
                row = scaled[rows[i] - from_row + j]
                for k in range(width):
                    line[k] += weight * np.int32(row[k])
        target = result[i].reshape(width)
        for k in range(width):
            target[k] = min(max(line[k] >> PLACES, 0), 255)
