"""Selective scan on the CPU: one pass over the pixels, compiled by numba on the user's machine.

Sixteen channels fill a vector register and walk through time together; their states wait in the level-one
cache. Whatever the memory layout, a tile of sixteen channels by `TILE` steps is first brought into
(step, channel) order, so a tensor may have its channels or its pixels innermost.

The forward pass keeps the states only where a tile begins. The backward pass visits the tiles in reverse,
recomputes the states of one tile in scratch memory, and follows the adjoint recurrence back through it.

Work is divided by shape alone, never by the number of threads, and every sum runs in a fixed order: results
are bit-equal for any number of threads.

It is one file on purpose, though a long one: both passes and the loading of tiles share one layout of scratch memory,
and whoever changes one of them must read the others.
"""

import math
from functools import partial, reduce

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import int64, types
from torch import Tensor

from dereflect.models.compiled.threads import in_huge_pages, run_tasks
from dereflect.models.compiled.vector import (
    INTEGERS,
    LANES,
    ROW,
    VECTOR,
    broadcast,
    constant,
    constant_vector,
    copy_number,
    fma,
    kernel,
    load,
    multiply_add,
    njit,
    row_sums,
    store,
    transpose,
    vector_intrinsic,
    where_positive,
)

TILE = 64  # steps between two stored states
WORTH_THREADS = 1 << 17  # bytes of u, delta and the like, from which on more threads gain more than they cost
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


# Functions of one vector -------------------------------------------------------------------------------


def _exp2(builder, x):
    """2^x with a relative error under 2e-7: 2^round(x) by exponent bits times a polynomial of the remainder.

    x is held within -126..128-2^-17, so that what underflows becomes 1e-38 and what overflows 3e38.
    """
    low, high, shift = -126.0, 127.99999, 1.5 * 2.0**23
    x = builder.select(builder.fcmp_ordered("<", x, constant_vector(low)), constant_vector(low), x)  # NaN stays
    x = builder.select(builder.fcmp_ordered(">", x, constant_vector(high)), constant_vector(high), x)
    shifted = builder.fadd(x, constant_vector(shift))  # the last bits now hold round(x)
    remainder = builder.fsub(x, builder.fsub(shifted, constant_vector(shift)))
    power = constant_vector(EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        power = multiply_add(builder, power, remainder, constant_vector(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, INTEGERS), ir.Constant(INTEGERS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(power, INTEGERS), exponent), VECTOR)


def _exp2_polynomial(degree: int) -> list[float]:
    """Coefficients, highest first, of 2^r on -1/2..1/2, fitted at Chebyshev nodes to the relative error.

    The last is 1 exactly: a decay near one would else be off by the same part in every one of many steps.
    """
    nodes = 0.5 * np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree))
    powers = np.vander(nodes, degree + 1)[:, :-1] / np.exp2(nodes)[:, None]
    return [*np.linalg.lstsq(powers, 1 - np.exp2(-nodes), rcond=None)[0].tolist(), 1.0]


EXP2_POLYNOMIAL = _exp2_polynomial(5)
exp2 = vector_intrinsic(1, _exp2)


@njit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(w) with w = e^-|x|; log1p(w) = 2 artanh(w / (2 + w))."""
    zero = constant(0.0)
    w = exp2(where_positive(x, zero - x, x) * constant(LOG2E))
    s = w / (constant(2.0) + w)
    square = s * s  # at most 1/9: the series' next term is under 2e-8
    series = constant(2 / 13)
    series = fma(series, square, constant(2 / 11))
    series = fma(series, square, constant(2 / 9))
    series = fma(series, square, constant(2 / 7))
    series = fma(series, square, constant(2 / 5))
    series = fma(series, square, constant(2 / 3))
    series = fma(series, square, constant(2.0))
    return fma(series, s, where_positive(x, x, zero))


@njit
def sigmoid(x):
    """1 / (1 + e^-x), exact to rounding on both sides: w / (1 + w) or 1 / (1 + w) with w = e^-|x|."""
    zero, one = constant(0.0), constant(1.0)
    w = exp2(where_positive(x, zero - x, x) * constant(LOG2E))
    return where_positive(x, one, w) / (one + w)


# Tiles: (steps, 16) in scratch memory, channels innermost --------------------------------------------------
#
# A tensor comes as (address, bytes from image to image, from channel to channel, from step to step).

Strided = types.UniTuple(int64, 4)


@njit
def read_tile(tensor, image, channel, channels, step, steps, tile):
    address, per_image, per_channel, per_step = tensor
    address += image * per_image + channel * per_channel + step * per_step
    done = 0
    if channels == LANES and per_channel == 4:
        for t in range(steps):
            store(tile + t * ROW, load(address + t * per_step))
        done = steps
    elif channels == LANES and per_step == 4:
        done = steps // LANES * LANES
        for t in range(0, done, LANES):
            transpose(address + 4 * t, per_channel, tile + t * ROW, ROW)
    elif channels == LANES and per_step == -4:
        done = steps // LANES * LANES
        for t in range(LANES - 1, done, LANES):
            transpose(address - 4 * t, per_channel, tile + t * ROW, -ROW)
    for t in range(done, steps):
        store(tile + t * ROW, constant(0.0))
        for c in range(channels):
            copy_number(address + c * per_channel + t * per_step, tile + t * ROW + 4 * c)


@njit
def write_tile(tensor, image, channel, channels, step, steps, tile):
    address, per_image, per_channel, per_step = tensor
    address += image * per_image + channel * per_channel + step * per_step
    done = 0
    if channels == LANES and per_channel == 4:
        for t in range(steps):
            store(address + t * per_step, load(tile + t * ROW))
        done = steps
    elif channels == LANES and per_step == 4:
        done = steps // LANES * LANES
        for t in range(0, done, LANES):
            transpose(tile + t * ROW, ROW, address + 4 * t, per_channel)
    elif channels == LANES and per_step == -4:
        done = steps // LANES * LANES
        for t in range(LANES - 1, done, LANES):
            transpose(tile + t * ROW, -ROW, address - 4 * t, per_channel)
    for t in range(done, steps):
        for c in range(channels):
            copy_number(tile + t * ROW + 4 * c, address + c * per_channel + t * per_step)


@njit
def step_sizes(raw, bias, use_softplus, steps, tile):
    """In a loop of its own, as are the gates below: the constants of its exponential and of the one in the loop
    over the states together are more than there are registers."""
    for t in range(steps):
        delta_t = load(raw + t * ROW) + bias
        if use_softplus:
            delta_t = softplus(delta_t)
        store(tile + t * ROW, delta_t)


@njit
def at(tensor, image, step):
    """Address of state 0 of B or C."""
    return tensor[0] + image * tensor[1] + step * tensor[3]


# The scan ------------------------------------------------------------------------------------------------
#
# Packed by blocks of sixteen channels: A (blocks, n, 16), times log2(e) since every exponential is a power of
# two here; D and bias (blocks, 16); h, the state, (images, blocks, n, 16); saved, the states with which tiles
# begin, (images, blocks, tiles, n, 16). A task is one image and one block (forward) or group of blocks
# (backward). Everything else is `Strided`.

Shape = types.UniTuple(int64, 4)


@kernel((int64, int64, int64, Shape, types.boolean, types.boolean) + (int64,) * 5 + (Strided,) * 6)
def forward(scratch, first, last, shape, use_softplus, use_z, A, D, bias, h, saved, B, C, u, delta, z, y):
    """Tasks `first` to `last` - 1: fills y, saved, and h with the last state. Scratch: 4 TILE vectors."""
    d, length, n, blocks = shape
    u_tile, delta_tile, z_tile, y_tile = [scratch + i * TILE * ROW for i in range(4)]
    for task in range(first, last):
        image, block = task // blocks, task % blocks
        channel = block * LANES
        channels = min(LANES, d - channel)
        A_block, h_block = A + block * n * ROW, h + task * n * ROW
        D_block, bias_block = load(D + block * ROW), load(bias + block * ROW)
        saved_tile = saved + task * ((length + TILE - 1) // TILE) * n * ROW
        for i in range(n):
            store(h_block + i * ROW, constant(0.0))
        for start in range(0, length, TILE):
            steps = min(TILE, length - start)
            read_tile(u, image, channel, channels, start, steps, u_tile)
            read_tile(delta, image, channel, channels, start, steps, delta_tile)
            if use_z:
                read_tile(z, image, channel, channels, start, steps, z_tile)
            for i in range(n):
                store(saved_tile + i * ROW, load(h_block + i * ROW))
            saved_tile += n * ROW
            step_sizes(delta_tile, bias_block, use_softplus, steps, delta_tile)
            for t in range(steps):
                delta_t, u_t = load(delta_tile + t * ROW), load(u_tile + t * ROW)
                x_t = delta_t * u_t
                y_t = D_block * u_t
                B_t, C_t = at(B, image, start + t), at(C, image, start + t)
                for i in range(n):
                    decay = exp2(delta_t * load(A_block + i * ROW))
                    h_t = fma(decay, load(h_block + i * ROW), x_t * broadcast(B_t + i * B[2]))
                    y_t = fma(broadcast(C_t + i * C[2]), h_t, y_t)
                    store(h_block + i * ROW, h_t)
                store(y_tile + t * ROW, y_t)
            if use_z:
                for t in range(steps):
                    z_t = load(z_tile + t * ROW)
                    store(y_tile + t * ROW, load(y_tile + t * ROW) * z_t * sigmoid(z_t))
            write_tile(y, image, channel, channels, start, steps, y_tile)


@kernel((int64, int64, int64, Shape, int64, types.boolean, types.boolean) + (int64,) * 10 + (Strided,) * 9)
def backward(
    scratch, first, last, shape, group, use_softplus, use_z,
    A, D, bias, saved, dA, dD, dbias, dh, dB, dC,
    B, C, u, delta, z, dy, du, ddelta, dz,
):  # fmt: skip
    """Tasks `first` to `last` - 1 of the adjoint: fills du, ddelta, dz; per image packed dA, dD, dbias; and per
    task dB, dC (length, n rounded up to sixteens), sums over the `group` blocks of channels of the task.

    dh (like h) holds the gradient of the last state and is used up. Scratch: 6 TILE + (2 TILE + 3) width vectors,
    where width is n rounded up to sixteens.

    With g_t = C_t dy_t + a_{t+1} g_{t+1}, the gradient of the state h_t = a_t h_{t-1} + delta_t u_t B_t:
    du_t = D dy_t + delta_t sum_n g_t B_t            dB_t = sum_d g_t delta_t u_t     dC_t = sum_d dy_t h_t
    ddelta_t = u_t sum_n g_t B_t + sum_n A q_t       dA = sum_t delta_t q_t           q_t = g_t a_t h_{t-1}
    """
    d, length, n, blocks = shape
    tiles, groups = (length + TILE - 1) // TILE, (blocks + group - 1) // group
    # Gradients take the place of what isn't needed any more: du of u, dz of z, ddelta of the step sizes.
    u_tile, delta_tile, z_tile, dy_tile, dt_tile, y_tile = [scratch + i * TILE * ROW for i in range(6)]
    width = (n + LANES - 1) // LANES * LANES
    states = scratch + 6 * TILE * ROW  # before each step; (TILE + 1, n, 16)
    decays = states + (TILE + 1) * n * ROW  # (TILE, n, 16)
    B_terms, C_terms = decays + TILE * n * ROW, decays + (TILE * n + width) * ROW  # of one step; (width, 16)
    for i in range(2 * width):
        store(B_terms + i * ROW, constant(0.0))
    one = constant(1.0)
    for task in range(first, last):
        image, first_block = task // groups, task % groups * group
        last_block = min(first_block + group, blocks)
        for block in range(first_block, last_block):
            packed = image * blocks + block
            store(dD + packed * ROW, constant(0.0))
            store(dbias + packed * ROW, constant(0.0))
            for i in range(n):
                store(dA + (packed * n + i) * ROW, constant(0.0))
        for tile in range(tiles - 1, -1, -1):
            start = tile * TILE
            steps = min(TILE, length - start)
            dB_tile, dC_tile = dB + 4 * (task * length + start) * width, dC + 4 * (task * length + start) * width
            for i in range(0, 4 * steps * width, ROW):
                store(dB_tile + i, constant(0.0))
                store(dC_tile + i, constant(0.0))
            for block in range(first_block, last_block):
                channel = block * LANES
                channels = min(LANES, d - channel)
                packed = image * blocks + block
                A_block, dh_block, dA_block = (
                    A + block * n * ROW,
                    dh + packed * n * ROW,
                    dA + packed * n * ROW,
                )
                D_block, bias_block = load(D + block * ROW), load(bias + block * ROW)
                read_tile(u, image, channel, channels, start, steps, u_tile)
                read_tile(delta, image, channel, channels, start, steps, delta_tile)
                read_tile(dy, image, channel, channels, start, steps, dy_tile)
                if use_z:
                    read_tile(z, image, channel, channels, start, steps, z_tile)

                # The states of this tile once more, and the gate's gradient.
                for i in range(n):
                    store(states + i * ROW, load(saved + ((packed * tiles + tile) * n + i) * ROW))
                step_sizes(delta_tile, bias_block, use_softplus, steps, dt_tile)
                for t in range(steps):
                    delta_t, u_t = load(dt_tile + t * ROW), load(u_tile + t * ROW)
                    x_t = delta_t * u_t
                    y_t = D_block * u_t
                    B_t, C_t = at(B, image, start + t), at(C, image, start + t)
                    for i in range(n):
                        decay = exp2(delta_t * load(A_block + i * ROW))
                        h_t = fma(decay, load(states + (t * n + i) * ROW), x_t * broadcast(B_t + i * B[2]))
                        y_t = fma(broadcast(C_t + i * C[2]), h_t, y_t)
                        store(decays + (t * n + i) * ROW, decay)
                        store(states + ((t + 1) * n + i) * ROW, h_t)
                    store(y_tile + t * ROW, y_t)
                if use_z:
                    for t in range(steps):
                        dy_t, z_t = load(dy_tile + t * ROW), load(z_tile + t * ROW)
                        gate = sigmoid(z_t)
                        store(dy_tile + t * ROW, dy_t * z_t * gate)
                        dgate = gate * fma(z_t, one - gate, one)
                        store(z_tile + t * ROW, dy_t * load(y_tile + t * ROW) * dgate)
                    write_tile(dz, image, channel, channels, start, steps, z_tile)

                for t in range(steps - 1, -1, -1):
                    delta_t, u_t = load(dt_tile + t * ROW), load(u_tile + t * ROW)
                    dy_t = load(dy_tile + t * ROW)
                    x_t = delta_t * u_t
                    dx_t, sum_Aq = constant(0.0), constant(0.0)
                    B_t, C_t = at(B, image, start + t), at(C, image, start + t)
                    for i in range(n):
                        row = (t * n + i) * ROW
                        decay = load(decays + row)
                        g = fma(broadcast(C_t + i * C[2]), dy_t, load(dh_block + i * ROW))
                        carried = g * decay
                        q = carried * load(states + row)
                        dx_t = fma(g, broadcast(B_t + i * B[2]), dx_t)
                        sum_Aq = fma(load(A_block + i * ROW), q, sum_Aq)
                        store(dh_block + i * ROW, carried)
                        store(dA_block + i * ROW, fma(delta_t, q, load(dA_block + i * ROW)))
                        store(B_terms + i * ROW, g * x_t)
                        store(C_terms + i * ROW, dy_t * load(states + n * ROW + row))
                    for i in range(0, width, LANES):
                        dB_t, dC_t = dB_tile + 4 * (t * width + i), dC_tile + 4 * (t * width + i)
                        store(dB_t, load(dB_t) + row_sums(B_terms + i * ROW))
                        store(dC_t, load(dC_t) + row_sums(C_terms + i * ROW))
                    store(dt_tile + t * ROW, fma(dx_t, u_t, sum_Aq * constant(LN2)))
                    store(u_tile + t * ROW, fma(D_block, dy_t, delta_t * dx_t))
                    store(dD + packed * ROW, fma(dy_t, u_t, load(dD + packed * ROW)))
                for t in range(steps):
                    ddelta_t = load(dt_tile + t * ROW)
                    if use_softplus:
                        ddelta_t = ddelta_t * sigmoid(load(delta_tile + t * ROW) + bias_block)
                    store(dt_tile + t * ROW, ddelta_t)
                    store(dbias + packed * ROW, load(dbias + packed * ROW) + ddelta_t)
                write_tile(du, image, channel, channels, start, steps, u_tile)
                write_tile(ddelta, image, channel, channels, start, steps, dt_tile)


@kernel((int64, int64, int64, Shape, int64, int64, int64, Strided, Strided))
def sum_groups(scratch, first, last, shape, groups, dB, dC, B_sum, C_sum):
    """Tasks `first` to `last` - 1, each one step of one image: adds up what `backward` left for every group of
    channels, always in the same order. Scratch: one vector."""
    _, length, n, _ = shape
    width = (n + LANES - 1) // LANES * LANES
    for task in range(first, last):
        image, step = task // length, task % length
        for parts, total in ((dB, B_sum), (dC, C_sum)):
            part = parts + 4 * (image * groups * length + step) * width
            for i in range(0, n, LANES):
                numbers = load(part + 4 * i)
                for group in range(1, groups):
                    numbers = numbers + load(part + 4 * (i + group * length * width))
                store(scratch, numbers)
                for j in range(min(LANES, n - i)):
                    copy_number(scratch + 4 * j, at(total, image, step) + (i + j) * total[2])


# From tensors to addresses -----------------------------------------------------------------------------


def saved_shape(batch: int, d: int, length: int, n: int) -> tuple[int, ...]:
    """The states with which tiles begin: a quarter of u's size for sixteen states."""
    return batch, -(-d // LANES), -(-length // TILE), n, LANES


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like u, the last state, and what `scan_backward` wants to know; all float32."""
    batch, d, length = u.shape
    n = A.shape[1]
    saved = in_huge_pages(u.new_empty(saved_shape(batch, d, length, n), dtype=torch.float32))
    blocks = saved.shape[1]
    h = u.new_empty(batch, blocks, n, LANES, dtype=torch.float32)
    y = in_huge_pages(torch.empty_like(u, dtype=torch.float32))
    _run(
        forward,
        tasks=batch * blocks,
        scratch=4 * TILE,
        settings=((d, length, n, blocks), delta_softplus, z is not None),
        packed=(_packed_states(A[None] * LOG2E), _packed(D, d), _packed(delta_bias, d), h, saved),
        strided=(B, C, u, delta, u if z is None else z, y),
        reverse=reverse,
    )
    return y, _unpacked(h, d), saved, u.new_empty(0)


def scan_backward(
    dy, dlast, saved, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, in float32, from those of y and the last state."""
    batch, d, length = u.shape
    n = A.shape[1]
    blocks = saved.shape[1]
    width = -(-n // LANES) * LANES
    group = 2 * width // LANES  # so many blocks that dB and dC of all groups take no more memory than u
    groups = -(-blocks // group)
    shape = d, length, n, blocks
    new = partial(u.new_empty, dtype=torch.float32)
    like_inputs = (u, delta, u[:0] if z is None else z)
    du, ddelta, dz = (in_huge_pages(torch.empty_like(t, dtype=torch.float32)) for t in like_inputs)
    dA, dD, dbias = new(batch, blocks, n, LANES), new(batch, blocks, 1, LANES), new(batch, blocks, 1, LANES)
    dB_parts, dC_parts = (in_huge_pages(new(batch, groups, length, width)) for _ in range(2))
    dB, dC = (torch.empty_like(t, dtype=torch.float32) for t in (B, C))
    dh = _packed_states(A.new_zeros(batch, d, n) if dlast is None else dlast)
    _run(
        backward,
        tasks=batch * groups,
        scratch=6 * TILE + (2 * TILE + 3) * width,
        settings=(shape, group, delta_softplus, z is not None),
        packed=(
            *(_packed_states(A[None] * LOG2E), _packed(D, d), _packed(delta_bias, d), saved),
            *(dA, dD, dbias, dh, dB_parts, dC_parts),
        ),
        strided=(B, C, u, delta, u if z is None else z, dy, du, ddelta, dz),
        reverse=reverse,
    )
    _run(
        sum_groups,
        tasks=batch * length,
        scratch=1,
        settings=(shape, groups),
        packed=(dB_parts, dC_parts),
        strided=(dB, dC),
        reverse=reverse,
    )
    dA, dD, dbias = (_unpacked(reduce(torch.add, part), d) for part in (dA, dD, dbias))
    return du, ddelta, dA, dB, dC, dD[:, 0], None if z is None else dz, dbias[:, 0]


def _packed(values: Tensor | None, d: int) -> Tensor:
    """(d) -> (blocks, 16), filled up with zeros; None is zero."""
    packed = torch.zeros(-(-d // LANES), LANES)
    if values is not None:
        packed.view(-1)[:d] = values
    return packed


def _packed_states(states: Tensor) -> Tensor:
    """(batch, d, n) -> (batch, blocks, n, 16), float32, filled up with zeros."""
    padded = F.pad(states.float(), (0, 0, 0, -states.shape[1] % LANES))
    return padded.unflatten(1, (-1, LANES)).mT.contiguous()


def _unpacked(states: Tensor, d: int) -> Tensor:
    """(..., blocks, n, 16) -> (..., d, n)"""
    return states.mT.flatten(-3, -2)[..., :d, :].contiguous()


def _run(kernel, tasks: int, scratch: int, settings: tuple, packed: tuple, strided: tuple, reverse: bool) -> None:
    """All tasks of a kernel, by as many threads as torch uses, each with room for `scratch` vectors.

    In reverse the kernel gets the strided tensors by their last steps, from where it goes back.
    """
    strided = [t.float() for t in strided]  # what isn't float32 is only read
    addresses = [t.data_ptr() for t in packed]
    views = []
    for t in strided:
        per_image, per_channel, per_step = (4 * stride for stride in t.stride())
        start = t.data_ptr() + reverse * (t.shape[2] - 1) * per_step
        views.append((start, per_image, per_channel, -per_step if reverse else per_step))
    moved = sum(t.nbytes for t in strided)
    run_tasks(kernel, tasks, scratch, *settings, *addresses, *views, parallel=moved >= WORTH_THREADS)
