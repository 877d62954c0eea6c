"""Selective scan by the CUDA kernel of the `mamba_ssm` package, where that is installed and works.

The kernel knows no reverse, so a scan in reverse works on flipped copies of the tensors.
"""

import torch
from torch import Tensor

from dereflect.models.scan.backends.reference import flipped

CHUNK = 2048  # steps between two states that the kernel keeps


def saved_shape(batch: int, d: int, length: int, n: int) -> tuple[int, ...]:
    """(decay, state) pairs at the end of every chunk."""
    return batch, d, -(-length // CHUNK), 2 * n


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if reverse:
        u, delta, B, C, z = flipped(u, delta, B, C, z)
    inputs = _as_wanted(u, delta, A, B, C, D, z, delta_bias)
    y, saved, *gated = _kernel().fwd(*inputs, delta_softplus)
    last_state = saved[:, :, -1, 1::2].contiguous()  # (batch, d, n)
    result, ungated = (y, y.new_empty(0)) if z is None else (gated[0], y)
    return result.flip(-1) if reverse else result, last_state, saved, ungated


def scan_backward(
    dy, dlast, saved, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
) -> tuple[Tensor | None, ...]:
    if dlast is not None:
        raise RuntimeError(
            "selective_scan: backend 'mamba_ssm' passes no gradient through the last state; use 'triton'"
        )
    if reverse:
        dy, u, delta, B, C, z = flipped(dy, u, delta, B, C, z)
    inputs = _as_wanted(u, delta, A, B, C, D, z, delta_bias)
    dy = _steps_innermost(dy.to(u.dtype))
    ungated = None if z is None else _steps_innermost(ungated)
    du, ddelta, dA, dB, dC, dD, dbias, *dz = _kernel().bwd(*inputs, dy, saved, ungated, None, delta_softplus, False)
    dB, dC, dz = dB.squeeze(1), dC.squeeze(1), dz[0] if dz else None
    if reverse:
        du, ddelta, dB, dC, dz = flipped(du, ddelta, dB, dC, dz)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def _kernel():
    from mamba_ssm.ops import selective_scan_interface

    return selective_scan_interface.selective_scan_cuda


def _as_wanted(u, delta, A, B, C, D, z, delta_bias) -> list[Tensor | None]:
    """One dtype for what has a length, float32 for the rest, steps innermost, one group of B and C."""
    u, delta, B, C, z = (None if t is None else _steps_innermost(t.to(u.dtype)) for t in (u, delta, B, C, z))
    A, D, delta_bias = (None if t is None else t.to(torch.float32).contiguous() for t in (A, D, delta_bias))
    return [u, delta, A, B[:, None], C[:, None], D, z, delta_bias]


def _steps_innermost(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
