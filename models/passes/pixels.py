"""The kernel of the pixel loss on the CPU: the loss and its gradient in one pass, where autograd would take thirty.

Images are planes of float32, row by row. A task is a strip of a plane.
"""

from numba import float64, int64

from dereflect.models.compiled.vector import (
    LANES,
    ROW,
    constant,
    copy_number,
    fma,
    kernel,
    njit,
    read,
    store,
    where_positive,
    write,
)
from dereflect.models.passes.kernels import STRIP

TERMS = 4  # squares, magnitudes, vertical and horizontal differences


@njit
def sign(x):
    return where_positive(x, constant(1.0), where_positive(constant(0.0) - x, constant(-1.0), constant(0.0)))


@njit
def difference(estimate, target, row, width):
    """One line of the images' difference into `row`, one number behind its start, and its ends once more beside it."""
    for w in range(0, width, LANES):
        lanes = min(LANES, width - w)
        write(row + 4 * (w + 1), read(estimate + 4 * w, 4, lanes) - read(target + 4 * w, 4, lanes), 4, lanes)
    copy_number(row + 4, row)
    copy_number(row + 4 * width, row + 4 * (width + 1))


@kernel((*(int64,) * 9, *(float64,) * 4))
def pixel_loss(
    scratch, first, last, estimate, target, gradient, sums, height, width, square, magnitude, vertical, horizontal
):  # fmt: skip
    """The gradient of the loss and, for every task, sums (4, 16) of its terms over each lane.

    `square` and the others are what a pixel's term counts in the loss. The scratch memory holds three lines.
    """
    strips, line = (height + STRIP - 1) // STRIP, 4 * width
    room = (width // LANES + 2) * ROW
    two_squares, one, down, right = constant(2 * square), constant(magnitude), constant(vertical), constant(horizontal)
    zero = constant(0.0)
    for task in range(first, last):
        plane, start = task // strips * height * line, task % strips * STRIP
        end = min(start + STRIP, height)
        squares = magnitudes = verticals = horizontals = zero
        for h in range(max(start - 1, 0), min(start + 1, height)):
            difference(estimate + plane + h * line, target + plane + h * line, scratch + h % 3 * room, width)
        for h in range(start, end):
            if h + 1 < height:
                at = plane + (h + 1) * line
                difference(estimate + at, target + at, scratch + (h + 1) % 3 * room, width)
            row = scratch + h % 3 * room + 4
            above, below = scratch + max(h - 1, 0) % 3 * room + 4, scratch + min(h + 1, height - 1) % 3 * room + 4
            for w in range(0, width, LANES):
                lanes, x = min(LANES, width - w), 4 * w
                d = read(row + x, 4, lanes)
                before, after = d - read(row + x - 4, 4, lanes), read(row + x + 4, 4, lanes) - d
                over, under = d - read(above + x, 4, lanes), read(below + x, 4, lanes) - d
                squares, magnitudes = fma(d, d, squares), fma(d, sign(d), magnitudes)
                verticals, horizontals = fma(under, sign(under), verticals), fma(after, sign(after), horizontals)
                slope = fma(two_squares, d, one * sign(d))
                slope = fma(down, sign(over) - sign(under), fma(right, sign(before) - sign(after), slope))
                write(gradient + plane + h * line + x, slope, 4, lanes)
        at = sums + task * TERMS * ROW
        store(at, squares)
        store(at + ROW, magnitudes)
        store(at + 2 * ROW, verticals)
        store(at + 3 * ROW, horizontals)
