"""The passes on the CPU, by the kernels in kernels.py; shapes as in operator.py.

Work is divided by shape alone, never by the number of threads, and every sum runs in a fixed order: results are
bit-equal for any number of threads.
"""

from functools import cache

import torch
from torch import Tensor

from dereflect.models.compiled.threads import in_huge_pages, run_tasks
from dereflect.models.compiled.vector import LANES, ROW
from dereflect.models.passes import kernels, norms, pixels
from dereflect.models.passes.kernels import PIXELS, STRIP, SUMS, TILE

WORTH_THREADS = 1 << 20  # bytes, read and written by a pass, from which on more threads gain more than they cost

GATES = {"none": kernels.NONE, "self": kernels.SELF, "mutual": kernels.MUTUAL}


@cache
def compiled(make, dtype: torch.dtype, *how):
    """The kernel that `make` makes for tensors of `dtype`, compiled when it is first wanted."""
    return make(dtype.itemsize, *how)


def _run(kernel, tasks: int, *settings, scratch: int = 1) -> None:
    """All tasks of a kernel, with so many vectors of scratch memory; settings are tensors without gaps, and numbers."""
    tensors = [s for s in settings if isinstance(s, Tensor)]
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("passes: a tensor has gaps")
    addresses = (s.data_ptr() if isinstance(s, Tensor) else s for s in settings)
    parallel = sum(t.nbytes for t in tensors) >= WORTH_THREADS
    run_tasks(kernel, tasks, scratch, *addresses, parallel=parallel)


def _run_by_channels(make, how: tuple, tasks: int, channels: int, *settings, scratch: int = 1) -> None:
    """The kernel `make(*how, whole)`, for whole vectors of channels first, then for those that are left."""
    whole = channels // LANES * LANES
    if whole:
        _run(compiled(make, *how, True), tasks, *settings, 0, whole, LANES, scratch=scratch)
    if whole < channels:
        _run(compiled(make, *how, False), tasks, *settings, whole, channels, channels - whole, scratch=scratch)


def _added_up(parts: Tensor) -> Tensor:
    """(groups, count, numbers) to (groups, numbers)"""
    sums = torch.empty(len(parts), parts.shape[2])
    _run(kernels.add_up, len(parts), parts, sums, *parts.shape[1:])
    return sums


def new(like: Tensor, *shape: int) -> Tensor:
    return in_huge_pages(like.new_empty(shape))


def norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, statistics = new(x, *x.shape), torch.empty(len(x), 2)
    settings = x, y, statistics, *x.shape, eps
    _run(compiled(norms.make_norm, x.dtype), -(-len(x) // PIXELS), *settings, scratch=norms.SCRATCH)
    return y, statistics


def norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, added: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    dx, (rows, channels) = new(x, *x.shape), x.shape
    pixels = rows // groups
    count = -(-pixels // PIXELS)
    parts = torch.empty(groups, count, channels)
    settings = dy, x, statistics, 0 if added is None else added, dx, parts, pixels, channels
    _run(compiled(norms.make_norm_backward, x.dtype), groups * count, *settings, scratch=norms.SCRATCH)
    return dx, _added_up(parts)


def gate(d: Tensor, images: int, how: str) -> Tensor:
    rows, half = len(d), d.shape[1] // 2
    g, pixels = new(d, rows, half), rows // images
    tasks = images * -(-pixels // PIXELS)
    _run_by_channels(kernels.make_gate, (d.dtype,), tasks, half, d, g, images, pixels, half, GATES[how])
    return g


def gate_backward(dg: Tensor, d: Tensor, images: int, how: str) -> tuple[Tensor, Tensor]:
    rows, half = dg.shape
    dd, pixels = new(d, *d.shape), rows // images
    tasks = images * -(-pixels // PIXELS)
    parts = torch.empty(1, tasks, 2 * half)
    settings = dg, d, dd, parts, images, pixels, half, GATES[how]
    _run_by_channels(kernels.make_gate_backward, (d.dtype,), tasks, half, *settings)
    return dd, _added_up(parts)[0]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, how: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, h, w, channels = x.shape
    gated = how != "none"
    keep = keep or not gated
    half = channels // 2 if gated else channels
    d, g = new(x, *(x.shape if keep else (0,))), new(x, *((n, h, w, half) if gated else (0,)))
    streams, strips = 2 if how == "mutual" else 1, -(-h // STRIP)
    parts = torch.empty(n // streams, strips, streams * half)
    weight, bias = weight.float().reshape(channels, 9).t().contiguous(), bias.float().contiguous()
    settings = x, weight, bias, d, g, parts, keep, n, h, w, channels, GATES[how]
    scratch = 1 if keep else 2 + streams * TILE * channels * x.itemsize // ROW
    how = x.dtype, gated
    _run_by_channels(kernels.make_depthwise, how, n // streams * strips, half, *settings, scratch=scratch)
    if not gated:
        return d, g, parts.new_empty(0)
    sums = _added_up(parts).view(-1, streams, half).transpose(0, 1).reshape(n, half)
    return d, g, sums


def depthwise_backward(
    dg: Tensor, d: Tensor, x: Tensor, weight: Tensor, how: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, h, w, channels = x.shape
    gated = how != "none"
    dx, tasks = new(x, *x.shape), n * -(-h // STRIP)
    parts = torch.empty(1, tasks, SUMS * channels)
    weight = weight.float().reshape(channels, 9).t().contiguous()
    half = channels // 2 if gated else channels
    settings = dg, d, x, weight, dx, parts, n, h, w, channels, GATES[how]
    _run_by_channels(kernels.make_depthwise_backward, (x.dtype, gated), tasks, half, *settings)
    sums = _added_up(parts).view(SUMS, channels)
    return dx, sums[:9].t().contiguous().view(channels, 1, 3, 3), sums[9].clone(), sums[10].clone()


def pixel_loss(estimate: Tensor, target: Tensor, mse: float, l1: float, slopes: float) -> tuple[Tensor, Tensor]:
    height, width = estimate.shape[-2:]
    planes, gradient = estimate.numel() // (height * width), torch.empty_like(estimate)
    tasks = planes * -(-height // STRIP)
    parts = torch.empty(1, tasks, pixels.TERMS * LANES)
    weights = mse / estimate.numel(), l1 / estimate.numel()
    weights += slopes / (planes * (height - 1) * width), slopes / (planes * height * (width - 1))
    scratch = 3 * (width // LANES + 2)
    _run(pixels.pixel_loss, tasks, estimate, target, gradient, parts, height, width, *weights, scratch=scratch)
    return (_added_up(parts).view(pixels.TERMS, LANES).sum(1) * torch.tensor(weights)).sum(), gradient
