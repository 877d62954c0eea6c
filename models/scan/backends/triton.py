"""Selective scan in Triton: parallel over images, channels and chunks of the length; no atomics.

One image of 50,176 pixels and 128 channels is few sequences but long ones, too few to fill a GPU. So the length
is cut into chunks of `CHUNK` steps, and each direction takes three passes:

    1. every chunk by itself: the state it would end with, had it begun with zero
    2. over the chunks, which are few: the states with which they really begin
    3. every chunk by itself again, from its true first state: the output

The backward pass does the same in reverse for the gradient of the state. In a chunk the program holds a tile of
(channels, steps) and goes through the states one by one, so nothing is ever kept for all states and steps.
Sums over channels and over chunks leave partial sums, one per program, which torch adds up: the order of every
sum is fixed.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # steps
CHANNELS = 32  # of a program of the forward pass
CHUNKS_AT_ONCE = 128  # in the pass over the chunks
PAIRS = 16  # (channel, state) pairs in one of its programs
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _compose(decay, x, next_decay, next_x):
    """h -> decay h + x, then h -> next_decay h + next_x."""
    return decay * next_decay, x * next_decay + next_x


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(w) with w = e^-|x|; log1p(w) = 2 artanh(w / (2 + w)), exact for the smallest w too."""
    w = tl.exp2(-tl.abs(x) * LOG2E)
    s = w / (2.0 + w)
    square = s * s  # at most 1/9
    series = 2.0 + square * (2 / 3 + square * (2 / 5 + square * (2 / 7 + square * (2 / 9 + square * (2 / 11)))))
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _load(tensor, stride_d, stride_l, channel, step, mask):
    """A (channels, steps) tile in float32, zero outside."""
    return tl.load(tensor + channel[:, None] * stride_d + step[None, :] * stride_l, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_steps(tensor, stride_n, stride_l, i, step, length):
    """State i of B or C: (steps), float32, zero outside."""
    return tl.load(tensor + i * stride_n + step * stride_l, mask=step < length, other=0.0).to(tl.float32)


@triton.jit
def _load_delta(delta, stride_d, stride_l, bias, channel, step, d, end, SOFTPLUS: tl.constexpr):
    """Step sizes, (channels, steps); zero, which leaves a state as it is, from step `end` on."""
    inside = (channel < d)[:, None] & (step < end)[None, :]
    raw = _load(delta, stride_d, stride_l, channel, step, inside)
    if bias is not None:
        raw += tl.load(bias + channel, mask=channel < d, other=0.0)[:, None]
    return raw, tl.where(inside, _softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _reversed(tile, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    """A (channels, steps) tile with its steps in reverse."""
    last_to_first = tl.broadcast_to(STEPS - 1 - tl.arange(0, STEPS)[None, :], (CHANNELS, STEPS))
    return tl.gather(tile, last_to_first, 1)


@triton.jit
def chunk_states(
    u, u_b, u_d, u_l, delta, delta_b, delta_d, delta_l, B, B_b, B_n, B_l, A, bias, states, spans,
    d, length, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """First forward pass. states (batch, chunks + 1, d, N): entry c + 1 becomes the state after chunk c from
    zero; spans (batch, chunks, d): the sum of its step sizes, whose exponential is the chunk's decay."""
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    step = chunk * STEPS + tl.arange(0, STEPS)
    end = tl.minimum(length, (chunk + 1) * STEPS)
    inside = (channel < d)[:, None] & (step < length)[None, :]
    _, dt = _load_delta(delta + image * delta_b, delta_d, delta_l, bias, channel, step, d, end, SOFTPLUS)
    x = dt * _load(u + image * u_b, u_d, u_l, channel, step, inside)
    remaining = tl.cumsum(dt, axis=1, reverse=True) - dt  # sum of the step sizes that follow, in the chunk
    tl.store(spans + (image * chunks + chunk) * d + channel, tl.sum(dt, axis=1), mask=channel < d)
    states += (image * (chunks + 1) + chunk + 1) * d * N
    for i in range(N):
        A_i = tl.load(A + channel * N + i, mask=channel < d, other=0.0)[:, None] * LOG2E
        B_i = _load_steps(B + image * B_b, B_n, B_l, i, step, length)[None, :]
        tl.store(states + channel * N + i, tl.sum(tl.exp2(A_i * remaining) * x * B_i, axis=1), mask=channel < d)


@triton.jit
def carry(
    states, spans, A, d, chunks,
    N: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Second pass, in place. states (batch, chunks + 1, d, N). Forward, entry c + 1 gains what chunk c makes of
    entry c; in reverse, entry c gains what it makes of entry c + 1."""
    image = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    A_pair = tl.load(A + pair, mask=pair < d * N, other=0.0) * LOG2E
    states += image * (chunks + 1) * d * N
    spans += image * chunks * d
    first = chunks if REVERSE else 0
    h = tl.load(states + first * d * N + pair, mask=pair < d * N, other=0.0)
    row = tl.arange(0, CHUNKS)
    for start in range(0, ROUNDS * CHUNKS, CHUNKS):
        chunk = chunks - 1 - start - row if REVERSE else start + row
        inside = ((chunk >= 0) & (chunk < chunks))[:, None] & (pair < d * N)[None, :]
        entry = chunk if REVERSE else chunk + 1
        at = states + entry[:, None] * d * N + pair[None, :]
        span = tl.load(spans + chunk[:, None] * d + pair[None, :] // N, mask=inside, other=0.0)
        own = tl.load(at, mask=inside, other=0.0)
        decay, own = tl.associative_scan((tl.exp2(A_pair[None, :] * span), own), 0, _compose)
        after = own + decay * h[None, :]
        tl.store(at, after, mask=inside)
        h = tl.sum(tl.where(row[:, None] == CHUNKS - 1, after, 0.0), axis=0)


@triton.jit
def forward(
    u, u_b, u_d, u_l, delta, delta_b, delta_d, delta_l, z, z_b, z_d, z_l, y, y_b, y_d, y_l,
    B, B_b, B_n, B_l, C, C_b, C_n, C_l, A, D, bias, states, d, length, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Third forward pass: y, from the state with which the chunk begins."""
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    step = chunk * STEPS + tl.arange(0, STEPS)
    end = tl.minimum(length, (chunk + 1) * STEPS)
    inside = (channel < d)[:, None] & (step < length)[None, :]
    _, dt = _load_delta(delta + image * delta_b, delta_d, delta_l, bias, channel, step, d, end, SOFTPLUS)
    u_tile = _load(u + image * u_b, u_d, u_l, channel, step, inside)
    x = dt * u_tile
    y_tile = tl.zeros_like(x)
    if D is not None:
        y_tile += tl.load(D + channel, mask=channel < d, other=0.0)[:, None] * u_tile
    states += (image * (chunks + 1) + chunk) * d * N
    for i in range(N):
        A_i = tl.load(A + channel * N + i, mask=channel < d, other=0.0)[:, None] * LOG2E
        h_i = tl.load(states + channel * N + i, mask=channel < d, other=0.0)[:, None]
        B_i = _load_steps(B + image * B_b, B_n, B_l, i, step, length)[None, :]
        C_i = _load_steps(C + image * C_b, C_n, C_l, i, step, length)[None, :]
        decay, h = tl.associative_scan((tl.exp2(A_i * dt), x * B_i), 1, _compose)
        y_tile += C_i * (h + decay * h_i)
    if z is not None:
        z_tile = _load(z + image * z_b, z_d, z_l, channel, step, inside)
        y_tile *= z_tile * _sigmoid(z_tile)
    tl.store(y + image * y_b + channel[:, None] * y_d + step[None, :] * y_l, y_tile, mask=inside)


@triton.jit
def chunk_gradients(
    dy, dy_b, dy_d, dy_l, delta, delta_b, delta_d, delta_l, z, z_b, z_d, z_l, C, C_b, C_n, C_l, A, bias,
    gradients, spans, d, length, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """First backward pass. gradients (batch, chunks + 1, d, N): entry c becomes the gradient of the state before
    chunk c, as far as the outputs of chunk c are concerned; spans as in `chunk_states`."""
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    step = chunk * STEPS + tl.arange(0, STEPS)
    end = tl.minimum(length, (chunk + 1) * STEPS)
    inside = (channel < d)[:, None] & (step < length)[None, :]
    _, dt = _load_delta(delta + image * delta_b, delta_d, delta_l, bias, channel, step, d, end, SOFTPLUS)
    dy_tile = _load(dy + image * dy_b, dy_d, dy_l, channel, step, inside)
    if z is not None:
        z_tile = _load(z + image * z_b, z_d, z_l, channel, step, inside)
        dy_tile *= z_tile * _sigmoid(z_tile)
    elapsed = tl.cumsum(dt, axis=1)  # sum of the step sizes up to this one, in the chunk
    tl.store(spans + (image * chunks + chunk) * d + channel, tl.sum(dt, axis=1), mask=channel < d)
    gradients += (image * (chunks + 1) + chunk) * d * N
    for i in range(N):
        A_i = tl.load(A + channel * N + i, mask=channel < d, other=0.0)[:, None] * LOG2E
        C_i = _load_steps(C + image * C_b, C_n, C_l, i, step, length)[None, :]
        own = tl.sum(tl.exp2(A_i * elapsed) * dy_tile * C_i, axis=1)
        tl.store(gradients + channel * N + i, own, mask=channel < d)


@triton.jit
def backward(
    u, u_b, u_d, u_l, delta, delta_b, delta_d, delta_l, z, z_b, z_d, z_l, dy, dy_b, dy_d, dy_l,
    du, du_b, du_d, du_l, ddelta, ddelta_b, ddelta_d, ddelta_l, dz, dz_b, dz_d, dz_l,
    B, B_b, B_n, B_l, C, C_b, C_n, C_l, A, D, bias, states, gradients,
    dA, dB, dC, dD, dbias, d, length, chunks, groups,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Third backward pass, from the state before and the gradient of the state after the chunk. Partial sums:
    dA (batch, chunks, d, N), dD and dbias (batch, chunks, d), dB and dC (batch, groups of channels, N, length).

    The equations stand at `scan_backward` in reference.py. What belongs to the gradient g of the state is held in
    reverse, last step first (names with _r), so that both recurrences run from the first entry to the last: Triton
    would turn every operand of a scan in reverse, for every state.
    """
    chunk, group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    step = chunk * STEPS + tl.arange(0, STEPS)
    step_r = (chunk + 1) * STEPS - 1 - tl.arange(0, STEPS)
    end = tl.minimum(length, (chunk + 1) * STEPS)
    inside = (channel < d)[:, None] & (step < length)[None, :]
    delta += image * delta_b
    raw, dt = _load_delta(delta, delta_d, delta_l, bias, channel, step, d, end, SOFTPLUS)
    _, dt_next = _load_delta(delta, delta_d, delta_l, bias, channel, step + 1, d, end, SOFTPLUS)
    u_tile = _load(u + image * u_b, u_d, u_l, channel, step, inside)
    dy_tile = _load(dy + image * dy_b, dy_d, dy_l, channel, step, inside)
    if z is not None:
        z_tile = _load(z + image * z_b, z_d, z_l, channel, step, inside)
        gate = _sigmoid(z_tile)
        dz_tile = dy_tile * gate * (1.0 + z_tile * (1.0 - gate))
        dy_tile *= z_tile * gate
    x = dt * u_tile
    x_r, dt_r = _reversed(x, CHANNELS, STEPS), _reversed(dt, CHANNELS, STEPS)
    dy_r, dt_next_r = _reversed(dy_tile, CHANNELS, STEPS), _reversed(dt_next, CHANNELS, STEPS)
    y_tile, dx_r, Aq_r = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    states += (image * (chunks + 1) + chunk) * d * N
    gradients += (image * (chunks + 1) + chunk + 1) * d * N
    dA += (image * chunks + chunk) * d * N
    B += image * B_b
    C += image * C_b
    for i in range(N):
        A_i = tl.load(A + channel * N + i, mask=channel < d, other=0.0)[:, None] * LOG2E
        h_i = tl.load(states + channel * N + i, mask=channel < d, other=0.0)[:, None]
        g_i = tl.load(gradients + channel * N + i, mask=channel < d, other=0.0)[:, None]
        entering = x * _load_steps(B, B_n, B_l, i, step, length)[None, :]
        decay, h = tl.associative_scan((tl.exp2(A_i * dt), entering), 1, _compose)
        h += decay * h_i
        C_r = _load_steps(C, C_n, C_l, i, step_r, length)[None, :]
        decay, g_r = tl.associative_scan((tl.exp2(A_i * dt_next_r), C_r * dy_r), 1, _compose)
        g_r += decay * g_i
        q_r = g_r * _reversed(h - entering, CHANNELS, STEPS)
        y_tile += _load_steps(C, C_n, C_l, i, step, length)[None, :] * h
        dx_r += g_r * _load_steps(B, B_n, B_l, i, step_r, length)[None, :]
        Aq_r += A_i * q_r
        tl.store(dA + channel * N + i, tl.sum(q_r * dt_r, axis=1), mask=channel < d)
        partial = ((image * groups + group) * N + i) * length
        tl.store(dB + partial + step_r, tl.sum(g_r * x_r, axis=0), mask=step_r < length)
        tl.store(dC + partial + step, tl.sum(h * dy_tile, axis=0), mask=step < length)
    dx = _reversed(dx_r, CHANNELS, STEPS)
    du_tile = dt * dx
    if D is not None:
        D_tile = tl.load(D + channel, mask=channel < d, other=0.0)[:, None]
        du_tile += D_tile * dy_tile
        y_tile += D_tile * u_tile
    ddelta_tile = u_tile * dx + _reversed(Aq_r, CHANNELS, STEPS) * LN2
    if SOFTPLUS:
        ddelta_tile *= _sigmoid(raw)
    channel_sums = (image * chunks + chunk) * d + channel
    tl.store(dD + channel_sums, tl.sum(dy_tile * u_tile, axis=1), mask=channel < d)
    tl.store(dbias + channel_sums, tl.sum(tl.where(inside, ddelta_tile, 0.0), axis=1), mask=channel < d)
    channel, step = channel[:, None], step[None, :]
    tl.store(du + image * du_b + channel * du_d + step * du_l, du_tile, mask=inside)
    tl.store(ddelta + image * ddelta_b + channel * ddelta_d + step * ddelta_l, ddelta_tile, mask=inside)
    if z is not None:
        tl.store(dz + image * dz_b + channel * dz_d + step * dz_l, dz_tile * y_tile, mask=inside)


def saved_shape(batch: int, d: int, length: int, n: int) -> tuple[int, ...]:
    """The states between chunks: an eighth of u's size for sixteen states."""
    return batch, -(-length // CHUNK) + 1, d, n


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d, length = u.shape
    n = A.shape[1]
    A, D, delta_bias = _float32(A, D, delta_bias)
    states = u.new_empty(saved_shape(batch, d, length, n), dtype=torch.float32)
    states[:, 0] = 0
    chunks = states.shape[1] - 1
    spans = u.new_empty(batch, chunks, d, dtype=torch.float32)
    y = torch.empty_like(u)
    tile = {"N": n, "SOFTPLUS": delta_softplus, "CHANNELS": CHANNELS, "STEPS": CHUNK, "num_warps": 8}
    grid = chunks, triton.cdiv(d, CHANNELS), batch
    with _device(u):
        chunk_states[grid](
            *_strided(reverse, u, delta, B), A, delta_bias, states, spans, d, length, chunks, **tile
        )  # fmt: skip
        _carry(states, spans, A, reverse=False)
        forward[grid](
            *_strided(reverse, u, delta, z, y, B, C), A, D, delta_bias, states, d, length, chunks, **tile
        )  # fmt: skip
    return y, states[:, -1].clone(), states, u.new_empty(0)


def scan_backward(
    dy, dlast, saved, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
) -> tuple[Tensor | None, ...]:
    batch, d, length = u.shape
    n = A.shape[1]
    A, D, delta_bias = _float32(A, D, delta_bias)
    chunks = saved.shape[1] - 1
    # A program's sums over channels for dB and dC take 2 n / channels of u's memory, its tiles all its registers.
    channels = CHANNELS // 2 if n <= 16 else CHANNELS
    groups = triton.cdiv(d, channels)
    new = saved.new_empty
    gradients = new(saved.shape)
    gradients[:, -1] = 0 if dlast is None else dlast
    spans, dD, dbias = (new(batch, chunks, d) for _ in range(3))
    dA = new(batch, chunks, d, n)
    dB, dC = (new(batch, groups, n, length) for _ in range(2))
    du, ddelta, dz = (None if t is None else torch.empty_like(t) for t in (u, delta, z))
    tile = {
        "N": n,
        "SOFTPLUS": delta_softplus,
        "CHANNELS": channels,
        "STEPS": CHUNK,
        "num_warps": channels // 4,
    }
    grid = chunks, groups, batch
    with _device(u):
        chunk_gradients[grid](
            *_strided(reverse, dy, delta, z, C), A, delta_bias, gradients, spans, d, length, chunks, **tile
        )  # fmt: skip
        _carry(gradients, spans, A, reverse=True)
        backward[grid](
            *_strided(reverse, u, delta, z, dy, du, ddelta, dz, B, C), A, D, delta_bias, saved, gradients,
            dA, dB, dC, dD, dbias, d, length, chunks, groups, **tile,
        )  # fmt: skip
    dB, dC = dB.sum(1), dC.sum(1)  # their partial sums come in the order of the steps' visits
    if reverse:
        dB, dC = dB.flip(-1), dC.flip(-1)
    return du, ddelta, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), dz, dbias.sum((0, 1))


def _carry(states: Tensor, spans: Tensor, A: Tensor, reverse: bool) -> None:
    batch, entries, d, n = states.shape
    chunks = entries - 1
    at_once = min(CHUNKS_AT_ONCE, triton.next_power_of_2(chunks))
    carry[triton.cdiv(d * n, PAIRS), batch](
        states, spans, A, d, chunks,
        N=n, REVERSE=reverse, PAIRS=PAIRS, CHUNKS=at_once, ROUNDS=triton.cdiv(chunks, at_once), num_warps=4,
    )  # fmt: skip


def _strided(reverse: bool, *tensors: Tensor | None) -> list[Tensor | int | None]:
    """Every tensor followed by its three strides; in reverse it starts at its last step, and goes back from there."""
    arguments = []
    for t in tensors:
        if t is None:
            arguments += [None, 0, 0, 0]
        elif reverse:
            arguments += [t[..., -1:], *t.stride()[:2], -t.stride(2)]
        else:
            arguments += [t, *t.stride()]
    return arguments


def _float32(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float().contiguous() for t in tensors]


def _device(t: Tensor):
    """Triton launches on the current GPU, which needn't be the tensors'."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
