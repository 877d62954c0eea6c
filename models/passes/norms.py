"""The kernels of the norm on the CPU; memory, arithmetic and tasks are as in kernels.py.

Sixteen rows at a time: the sums over each of them come out of one exchange of lanes, where sixteen sums of one vector
each would take longer than all the rest.
"""

import math

from numba import float64, int64

from dereflect.models.compiled.vector import (
    LANES,
    ROW,
    broadcast,
    constant,
    copy_number,
    fma,
    get_number,
    kernel,
    load,
    read,
    row_sums,
    set_number,
    store,
    write,
)
from dereflect.models.passes.kernels import PIXELS

SCRATCH = 2 * LANES + 3  # vectors: two sums of each row, then two numbers of each row, then one for what is left over


def make_norm(size: int):
    @kernel((int64, int64, int64, int64, int64, int64, int64, int64, float64))
    def norm(scratch, first, last, x, y, statistics, rows, channels, eps):
        """y = (x - mean) * rstd, row by row, and statistics (rows, 2): mean and rstd."""
        whole, rest = channels // LANES * LANES * size, channels % LANES
        step, pixel, share = LANES * size, channels * size, 1.0 / channels
        means, rstds = scratch + 2 * LANES * ROW, scratch + (2 * LANES + 1) * ROW
        left_over, share_v, zero = rstds + ROW, constant(share), constant(0.0)
        for start in range(first * PIXELS, min(last * PIXELS, rows), LANES):
            count = min(LANES, rows - start)
            for i in range(count):
                at, total = x + (start + i) * pixel, zero
                for c in range(0, whole, step):
                    total = total + read(at + c, size, LANES)
                if rest:
                    total = total + read(at + whole, size, rest)
                store(scratch + i * ROW, total)
            store(means, row_sums(scratch) * share_v)
            for i in range(count):
                at, mean, total = x + (start + i) * pixel, broadcast(means + 4 * i), zero
                for c in range(0, whole, step):
                    centred = read(at + c, size, LANES) - mean
                    total = fma(centred, centred, total)
                if rest:
                    store(left_over, zero)
                    write(left_over, read(at + whole, size, rest) - mean, 4, rest)
                    centred = load(left_over)
                    total = fma(centred, centred, total)
                store(scratch + i * ROW, total)
            store(rstds, row_sums(scratch))
            for i in range(count):
                set_number(rstds + 4 * i, 1.0 / math.sqrt(get_number(rstds + 4 * i) * share + eps))
            for i in range(count):
                row = start + i
                at, out = x + row * pixel, y + row * pixel
                mean, rstd = broadcast(means + 4 * i), broadcast(rstds + 4 * i)
                for c in range(0, whole, step):
                    write(out + c, (read(at + c, size, LANES) - mean) * rstd, size, LANES)
                if rest:
                    write(out + whole, (read(at + whole, size, rest) - mean) * rstd, size, rest)
                copy_number(means + 4 * i, statistics + 8 * row)
                copy_number(rstds + 4 * i, statistics + 8 * row + 4)

    return norm


def make_norm_backward(size: int):
    @kernel((int64,) * 11)
    def norm_backward(scratch, first, last, dy, x, statistics, added, dx, sums, pixels, channels):
        """dx = added + the gradient of x from that of y, row by row, and for every task the sum of `added`."""
        whole, rest = channels // LANES * LANES, channels % LANES
        pixel, share, tasks = channels * size, 1.0 / channels, (pixels + PIXELS - 1) // PIXELS
        shifts, slopes, zero = scratch + 2 * LANES * ROW, scratch + (2 * LANES + 1) * ROW, constant(0.0)
        for task in range(first, last):
            image, start = task // tasks, task % tasks * PIXELS
            total = sums + 4 * task * channels
            for c in range(channels):
                set_number(total + 4 * c, 0.0)
            end = (image + 1) * pixels
            for above in range(image * pixels + start, min(image * pixels + start + PIXELS, end), LANES):
                count = min(LANES, end - above)
                for i in range(count):
                    row = above + i
                    offset, mean, sum_dy, sum_dy_x = row * pixel, broadcast(statistics + 8 * row), zero, zero
                    for c in range(0, whole, LANES):
                        at = offset + c * size
                        dy_c = read(dy + at, size, LANES)
                        sum_dy = sum_dy + dy_c
                        sum_dy_x = fma(dy_c, read(x + at, size, LANES) - mean, sum_dy_x)
                    if rest:
                        at = offset + whole * size
                        dy_c = read(dy + at, size, rest)
                        sum_dy = sum_dy + dy_c
                        sum_dy_x = fma(dy_c, read(x + at, size, rest) - mean, sum_dy_x)
                    store(scratch + i * ROW, sum_dy)
                    store(scratch + (LANES + i) * ROW, sum_dy_x)
                # dx = rstd (dy - mean dy - y mean(dy y)) with y = (x - mean) rstd
                store(shifts, row_sums(scratch) * constant(share))
                store(slopes, row_sums(scratch + LANES * ROW) * constant(share))
                for i in range(count):
                    row = above + i
                    offset = row * pixel
                    mean, rstd = broadcast(statistics + 8 * row), broadcast(statistics + 8 * row + 4)
                    shift, slope = broadcast(shifts + 4 * i), broadcast(slopes + 4 * i) * rstd * rstd
                    for c in range(0, whole, LANES):
                        at = offset + c * size
                        own = read(dy + at, size, LANES) - shift - (read(x + at, size, LANES) - mean) * slope
                        extra = read(added + at, size, LANES) if added else zero
                        write(dx + at, fma(own, rstd, extra), size, LANES)
                        store(total + 4 * c, load(total + 4 * c) + extra)
                    if rest:
                        at = offset + whole * size
                        own = read(dy + at, size, rest) - shift - (read(x + at, size, rest) - mean) * slope
                        extra = read(added + at, size, rest) if added else zero
                        write(dx + at, fma(own, rstd, extra), size, rest)
                        write(total + 4 * whole, read(total + 4 * whole, 4, rest) + extra, 4, rest)

    return norm_backward
