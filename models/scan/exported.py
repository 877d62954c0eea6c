"""The selective scan in torch's own operators, for programs that are exported: no registered operator is in them.

One step after the other, a long sequence would take long wherever such a program runs. So it is cut into chunks, and
all chunks take their steps together (section 3.3 of Gu and Dao 2023 has the idea of a scan that is parallel):

    1. every chunk from the state 0: its last state E_k
    2. from chunk to chunk: H_{k+1} = exp(A sum delta) H_k + E_k, the states with which the chunks begin
    3. every chunk from its H_k: y

Every exponent is negative, as in the plain recurrence, so nothing can overflow. ONNX has `Scan` for each of the three.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from dereflect.models.scan.backends.reference import flipped

CHUNK = 64  # steps; with C chunks there are 2 * CHUNK + C steps one after the other


def is_exported() -> bool:
    """Whether `torch.export`, not strict, traces this. torch 2.11 compiles as if it exported, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def selective_scan_exported(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """y (batch, d, length) in float32; shapes and meaning as in `selective_scan`."""
    if reverse:
        u, delta, B, C, z = flipped(u, delta, B, C, z)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    batch, _, length = u.shape
    y = _scan_chunks(A.mT.contiguous(), *map(_steps, (delta, delta * u, B, C)), batch)
    y = y.unflatten(1, (batch, -1)).permute(1, 3, 2, 0).flatten(2)[..., :length]  # (batch, d, length)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y.flip(-1) if reverse else y


def _steps(x: Tensor) -> Tensor:
    """(batch, d, length) to (CHUNK, batch * chunks, d), zeros after the end: with delta 0 the state stays."""
    chunks = (x.shape[2] + CHUNK - 1) // CHUNK + 1  # two at least: torch.export makes a case of its own of one
    x = F.pad(x, (0, chunks * CHUNK - x.shape[2])).unflatten(2, (chunks, CHUNK))
    return x.permute(3, 0, 2, 1).flatten(1, 2).contiguous()


def _scan_chunks(A: Tensor, delta: Tensor, x: Tensor, B: Tensor, C: Tensor, batch: int) -> Tensor:
    """y (CHUNK, m, d), where m is batch * chunks; A (n, d), delta and x (CHUNK, m, d), B and C (CHUNK, m, n)."""

    def next_state(h: Tensor, step: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta, x, B, C = step
        h = torch.exp(delta * A[:, None]) * h + x * B.mT[..., None]  # (n, m, d)
        return h, (h * C.mT[..., None]).sum(0)

    def next_chunk(h: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        decay, added = chunk
        return decay * h + added, h.clone()

    steps = (delta, x, B, C)
    ends, _ = scan(next_state, delta.new_zeros(len(A), *x.shape[1:]), steps)
    decays = torch.exp(delta.sum(0) * A[:, None])
    chunks = [t.unflatten(1, (batch, -1)).movedim(2, 0).contiguous() for t in (decays, ends)]  # (chunks, n, batch, d)
    _, begins = scan(next_chunk, torch.zeros_like(chunks[0][0]), tuple(chunks))
    return scan(next_state, begins.movedim(0, 2).flatten(1, 2).contiguous(), steps)[1]
