"""The kernels of the passes on the CPU, compiled by numba: each tensor is read and written once.

Sixteen channels fill a vector (see `models.compiled.vector`); what is left over of a number of channels that isn't a
multiple of sixteen is read into a vector that is filled up with zeros. Numbers in memory are float32 or bfloat16 (4 or
2 bytes: `size`), all arithmetic is float32.

Activations are channels_last: (images, height, width, channels) in memory, without gaps. Arguments are addresses and
numbers. Every kernel works on the tasks `first` to `last` - 1; its scratch memory is one vector if
it does not say more.
"""

from numba import int64

from dereflect.models.compiled.vector import (
    LANES,
    ROW,
    constant,
    fma,
    kernel,
    njit,
    prefetch,
    read,
    store,
    write,
)

STRIP = 16  # rows of an image in one task
TILE = 32  # columns that are worked on for all channels before the next: they stay in the level-one cache
PIXELS = 1024  # in one task of the passes that know no neighbours
NONE, SELF, MUTUAL = range(3)  # gates
SUMS = 11  # vectors that the depthwise backward pass adds up for every vector of channels


@njit
def partner(image, images, gate):
    """The image whose channels gate those of `image`: itself, or the other stream's."""
    return (image + images // 2) % images if gate == MUTUAL else image


@njit
def prefetch_tile(address, left, right, pixel):
    """The pixels from `left` to `right` of a line: walked along by channels, they would be waited for one by one."""
    for at in range(left * pixel, right * pixel, ROW):
        prefetch(address + at)


# Depthwise 3x3 convolution and gate -----------------------------------------------------------------------
#
# A task is a strip of an image, or of both streams' images where they gate each other. Channels are those of the
# convolution; `half` of them leave the gate. Columns are walked along with three columns of three rows in registers.


def make_depthwise(size: int, gated: bool, whole: bool):
    @kernel((int64,) * 18)
    def depthwise(
        scratch, first, last, x, weight, bias, d, g, sums, keep,
        images, height, width, channels, gate, from_channel, to_channel, lanes,
    ):  # fmt: skip
        """d = conv(x) + bias; g = the gate of d; sums (tasks, images of a task, half): g's over the strip.

        Unless d is to be kept, a tile of it lies behind the first vector of the scratch memory.
        """
        lanes = LANES if whole else lanes
        half, halves = (channels // 2, 2) if gated else (channels, 1)
        streams = 2 if gate == MUTUAL else 1
        units, strips = images // streams, (height + STRIP - 1) // STRIP
        pixel, apart = channels * size, 4 * channels
        zero = constant(0.0)
        store(scratch, zero)
        for task in range(first, last):
            unit, start = task // strips, task % strips * STRIP
            for stream in range(streams):
                for c in range(from_channel, to_channel, LANES):
                    write(sums + 4 * ((task * streams + stream) * half + c), zero, 4, lanes)
            for h in range(start, min(start + STRIP, height)):
                for left in range(0, width, TILE):
                    right = min(left + TILE, width)
                    for image in range(unit, images if whole and h + 2 < height else 0, units):
                        prefetch_tile(x + (image * height + h + 2) * width * pixel, left, right, pixel)
                    for c in range(from_channel, to_channel, LANES):
                        for plane in range(streams * halves):
                            image, channel = unit + plane // halves * units, c + plane % halves * half
                            k, b = weight + 4 * channel, read(bias + 4 * channel, 4, lanes)
                            w0, w1, w2 = read(k, 4, lanes), read(k + apart, 4, lanes), read(k + 2 * apart, 4, lanes)
                            k += 3 * apart
                            w3, w4, w5 = read(k, 4, lanes), read(k + apart, 4, lanes), read(k + 2 * apart, 4, lanes)
                            k += 3 * apart
                            w6, w7, w8 = read(k, 4, lanes), read(k + apart, 4, lanes), read(k + 2 * apart, 4, lanes)
                            offset = ((image * height + h) * width + left) * pixel + channel * size
                            row1, out = x + offset, d + offset
                            if not keep:
                                out = scratch + ROW + plane // halves * TILE * pixel + channel * size
                            row0, step0, row2, step2 = scratch, 0, scratch, 0  # beyond the edge: zeros
                            if h > 0:
                                row0, step0 = row1 - width * pixel, pixel
                            if h + 1 < height:
                                row2, step2 = row1 + width * pixel, pixel
                            a0 = a1 = a2 = zero
                            if left > 0:
                                a0 = read(row0 - step0, size, lanes)
                                a1 = read(row1 - pixel, size, lanes)
                                a2 = read(row2 - step2, size, lanes)
                            m0, m1, m2 = read(row0, size, lanes), read(row1, size, lanes), read(row2, size, lanes)
                            for column in range(left, right):
                                p0 = p1 = p2 = zero
                                if column + 1 < width:
                                    row0 += step0
                                    row1 += pixel
                                    row2 += step2
                                    p0 = read(row0, size, lanes)
                                    p1 = read(row1, size, lanes)
                                    p2 = read(row2, size, lanes)
                                s0 = fma(w6, a2, fma(w3, a1, fma(w0, a0, b)))
                                s1 = fma(w7, m2, fma(w4, m1, w1 * m0))
                                s2 = fma(w8, p2, fma(w5, p1, w2 * p0))
                                write(out, s0 + s1 + s2, size, lanes)
                                out += pixel
                                a0, a1, a2, m0, m1, m2 = m0, m1, m2, p0, p1, p2
                        for stream in range(streams if gated else 0):
                            image = unit + stream * units
                            other = partner(image, images, gate)
                            here = ((image * height + h) * width + left) * pixel
                            u, v = d + here, d + ((other * height + h) * width + left) * pixel
                            if not keep:
                                u = scratch + ROW + stream * TILE * pixel
                                v = scratch + ROW + (streams - 1 - stream) * TILE * pixel
                            u += c * size
                            v += (half + c) * size
                            out = g + here // 2 + c * size
                            at = sums + 4 * ((task * streams + stream) * half + c)
                            total = read(at, 4, lanes)
                            for _ in range(right - left):
                                product = read(u, size, lanes) * read(v, size, lanes)
                                total = total + product
                                write(out, product, size, lanes)
                                u += pixel
                                v += pixel
                                out += half * size
                            write(at, total, 4, lanes)

    return depthwise


def make_depthwise_backward(size: int, gated: bool, whole: bool):
    @kernel((int64,) * 17)
    def depthwise_backward(
        scratch, first, last, dg, d, x, weight, dx, sums,
        images, height, width, channels, gate, from_channel, to_channel, lanes,
    ):  # fmt: skip
        """dx, and for every task sums (11, channels): the weight's nine gradients, the bias's, and dx's sum."""
        lanes = LANES if whole else lanes
        half, halves = (channels // 2, 2) if gated else (channels, 1)
        strips, pixel, dg_pixel = (height + STRIP - 1) // STRIP, channels * size, half * size
        line, dg_line, apart = width * pixel, width * dg_pixel, 4 * channels
        zero = constant(0.0)
        store(scratch, zero)
        for task in range(first, last):
            image, start = task // strips, task % strips * STRIP
            other = partner(image, images, gate)
            for i in range(SUMS):
                for part in range(halves):
                    for c in range(from_channel, to_channel, LANES):
                        write(sums + (task * SUMS + i) * apart + 4 * (part * half + c), zero, 4, lanes)
            for h in range(start, min(start + STRIP, height)):
                for left in range(0, width, TILE):
                    right = min(left + TILE, width)
                    if whole and h + 2 < height:
                        here, there = (image * height + h + 2) * width, (other * height + h + 2) * width
                        prefetch_tile(x + (here - width) * pixel, left, right, pixel)
                        prefetch_tile(dg + here * dg_pixel, left, right, dg_pixel)
                        if gated:
                            prefetch_tile(d + there * pixel, left, right, pixel)
                            if gate == MUTUAL:
                                prefetch_tile(dg + there * dg_pixel, left, right, dg_pixel)
                    for c in range(from_channel, to_channel, LANES):
                        for part in range(halves):
                            channel = c + part * half
                            k, q = weight + 4 * channel, sums + task * SUMS * apart + 4 * channel
                            w0, d0 = read(k, 4, lanes), read(q, 4, lanes)
                            w1, d1 = read(k + apart, 4, lanes), read(q + apart, 4, lanes)
                            w2, d2 = read(k + 2 * apart, 4, lanes), read(q + 2 * apart, 4, lanes)
                            w3, d3 = read(k + 3 * apart, 4, lanes), read(q + 3 * apart, 4, lanes)
                            w4, d4 = read(k + 4 * apart, 4, lanes), read(q + 4 * apart, 4, lanes)
                            w5, d5 = read(k + 5 * apart, 4, lanes), read(q + 5 * apart, 4, lanes)
                            w6, d6 = read(k + 6 * apart, 4, lanes), read(q + 6 * apart, 4, lanes)
                            w7, d7 = read(k + 7 * apart, 4, lanes), read(q + 7 * apart, 4, lanes)
                            w8, d8 = read(k + 8 * apart, 4, lanes), read(q + 8 * apart, 4, lanes)
                            of_bias, of_dx = read(q + 9 * apart, 4, lanes), read(q + 10 * apart, 4, lanes)
                            own = ((image * height + h) * width + left) * pixel + channel * size
                            x_at, dx_at = x + own, dx + own
                            # The convolution's gradient is dg times the factor f that the gate multiplied with.
                            gates = image if part == 0 else other
                            g1 = dg + ((gates * height + h) * width + left) * dg_pixel + c * size
                            f1 = d + ((other * height + h) * width + left) * pixel + (c + (1 - part) * half) * size
                            g0, g0_step, g2, g2_step, f0, f2 = scratch, 0, scratch, 0, f1, f1
                            if h > 0:
                                g0, g0_step, f0 = g1 - dg_line, dg_pixel, f1 - line
                            if h + 1 < height:
                                g2, g2_step, f2 = g1 + dg_line, dg_pixel, f1 + line
                            a0 = a1 = a2 = zero
                            if left > 0:
                                a0 = read(g0 - g0_step, size, lanes)
                                a1 = read(g1 - dg_pixel, size, lanes)
                                a2 = read(g2 - g2_step, size, lanes)
                                if gated:
                                    a0 = a0 * read(f0 - pixel, size, lanes)
                                    a1 = a1 * read(f1 - pixel, size, lanes)
                                    a2 = a2 * read(f2 - pixel, size, lanes)
                            m0, m1, m2 = read(g0, size, lanes), read(g1, size, lanes), read(g2, size, lanes)
                            if gated:
                                m0 = m0 * read(f0, size, lanes)
                                m1 = m1 * read(f1, size, lanes)
                                m2 = m2 * read(f2, size, lanes)
                            for v in range(left, right):
                                p0 = p1 = p2 = zero
                                if v + 1 < width:
                                    g0 += g0_step
                                    g1 += dg_pixel
                                    g2 += g2_step
                                    p0, p1, p2 = read(g0, size, lanes), read(g1, size, lanes), read(g2, size, lanes)
                                    if gated:
                                        f0 += pixel
                                        f1 += pixel
                                        f2 += pixel
                                        p0 = p0 * read(f0, size, lanes)
                                        p1 = p1 * read(f1, size, lanes)
                                        p2 = p2 * read(f2, size, lanes)
                                x_v = read(x_at, size, lanes)
                                of_bias = of_bias + m1
                                s0 = fma(w6, p0, fma(w3, p1, w0 * p2))
                                s1 = fma(w7, m0, fma(w4, m1, w1 * m2))
                                s2 = fma(w8, a0, fma(w5, a1, w2 * a2))
                                dx_v = s0 + s1 + s2
                                of_dx = of_dx + dx_v
                                write(dx_at, dx_v, size, lanes)
                                d0, d1, d2 = fma(x_v, p2, d0), fma(x_v, m2, d1), fma(x_v, a2, d2)
                                d3, d4, d5 = fma(x_v, p1, d3), fma(x_v, m1, d4), fma(x_v, a1, d5)
                                d6, d7, d8 = fma(x_v, p0, d6), fma(x_v, m0, d7), fma(x_v, a0, d8)
                                x_at += pixel
                                dx_at += pixel
                                a0, a1, a2, m0, m1, m2 = m0, m1, m2, p0, p1, p2
                            write(q, d0, 4, lanes)
                            write(q + apart, d1, 4, lanes)
                            write(q + 2 * apart, d2, 4, lanes)
                            write(q + 3 * apart, d3, 4, lanes)
                            write(q + 4 * apart, d4, 4, lanes)
                            write(q + 5 * apart, d5, 4, lanes)
                            write(q + 6 * apart, d6, 4, lanes)
                            write(q + 7 * apart, d7, 4, lanes)
                            write(q + 8 * apart, d8, 4, lanes)
                            write(q + 9 * apart, of_bias, 4, lanes)
                            write(q + 10 * apart, of_dx, 4, lanes)

    return depthwise_backward


# The gate alone -------------------------------------------------------------------------------------------
#
# Tensors are rows of channels here, one for each pixel. A task is some of an image's pixels.


def make_gate(size: int, whole: bool):
    @kernel((int64,) * 12)
    def gate_forward(scratch, first, last, d, g, images, pixels, half, gate, from_channel, to_channel, lanes):
        """g (images * pixels, half), the gate of d (images * pixels, 2 half)."""
        lanes = LANES if whole else lanes
        tasks = (pixels + PIXELS - 1) // PIXELS
        for task in range(first, last):
            image, start = task // tasks, task % tasks * PIXELS
            other = partner(image, images, gate)
            for i in range(start, min(start + PIXELS, pixels)):
                u, v = d + (image * pixels + i) * 2 * half * size, d + ((other * pixels + i) * 2 + 1) * half * size
                out = g + (image * pixels + i) * half * size
                for c in range(from_channel, to_channel, LANES):
                    at = c * size
                    write(out + at, read(u + at, size, lanes) * read(v + at, size, lanes), size, lanes)

    return gate_forward


def make_gate_backward(size: int, whole: bool):
    @kernel((int64,) * 14)
    def gate_backward(
        scratch, first, last, dg, d, dd, sums, images, pixels, half, gate, from_channel, to_channel, lanes
    ):  # fmt: skip
        """dd like d, and for every task its sum (2 half)."""
        lanes = LANES if whole else lanes
        tasks = (pixels + PIXELS - 1) // PIXELS
        zero = constant(0.0)
        for task in range(first, last):
            image, start = task // tasks, task % tasks * PIXELS
            other = partner(image, images, gate)
            of_u = sums + 8 * task * half
            of_v = of_u + 4 * half
            for c in range(from_channel, to_channel, LANES):
                write(of_u + 4 * c, zero, 4, lanes)
                write(of_v + 4 * c, zero, 4, lanes)
            for i in range(start, min(start + PIXELS, pixels)):
                mine, theirs = (image * pixels + i) * half * size, (other * pixels + i) * half * size
                for c in range(from_channel, to_channel, LANES):
                    at = c * size
                    du = read(dg + mine + at, size, lanes) * read(d + 2 * theirs + half * size + at, size, lanes)
                    dv = read(dg + theirs + at, size, lanes) * read(d + 2 * theirs + at, size, lanes)
                    write(dd + 2 * mine + at, du, size, lanes)
                    write(dd + 2 * mine + half * size + at, dv, size, lanes)
                    write(of_u + 4 * c, read(of_u + 4 * c, 4, lanes) + du, 4, lanes)
                    write(of_v + 4 * c, read(of_v + 4 * c, 4, lanes) + dv, 4, lanes)

    return gate_backward


# Sums -----------------------------------------------------------------------------------------------------


@kernel((int64,) * 7)
def add_up(scratch, first, last, parts, sums, count, numbers):
    """sums (groups, numbers): of parts (groups, count, numbers), always in the same order. A task is a group."""
    for task in range(first, last):
        for i in range(0, numbers, LANES):
            lanes = min(LANES, numbers - i)
            total = constant(0.0)
            for part in range(count):
                total = total + read(parts + 4 * ((task * count + part) * numbers + i), 4, lanes)
            write(sums + 4 * (task * numbers + i), total, 4, lanes)
