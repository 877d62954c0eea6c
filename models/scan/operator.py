"""`selective_scan` as a torch operator, which torch.compile, autocast and opcheck understand.

`models.scan.flops` tells torch's FLOP counter about it.
"""

import torch
from torch import Tensor

from dereflect.models.operators import custom_op
from dereflect.models.scan.backends import backend_module, choose_backend, requested_backend
from dereflect.models.scan.exported import is_exported, selective_scan_exported


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Gu and Dao 2023; layouts and meaning as `selective_scan_fn` of `mamba_ssm`.

    Args:
        u, delta, z: (batch, d, length), float32, bfloat16, float16, or float64 (reference backend only).
        A: (d, n), negative; float32 is kept whatever u is.
        B, C: (batch, n, length).
        D, delta_bias: (d).
        delta_softplus: whether delta becomes softplus(delta + delta_bias), else delta + delta_bias.
        return_last_state: whether to return (y, last state (batch, d, n)) instead of y.
        backend: one of `BACKENDS`, above `set_backend` and the environment variable SCAN_BACKEND.
        reverse: whether to go from the last step to the first; the last state is then that of the first step. Only the
            backend `mamba_ssm` needs flipped copies of the tensors for that.

    Strides may be any; y has those of u. The state and all sums are float32 (float64 for float64 input).
    Where torch.export traces it, it is `selective_scan_exported`.
    y has u's dtype and every gradient that of its input. The gradient is not differentiable again; that of
    `selective_scan_reference` is.

    Raises:
        ValueError: for shapes, dtypes or devices that don't fit each other, and unknown backends.
        RuntimeError: for a requested backend that can't run here, with the reason.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    if is_exported() and not return_last_state:
        return selective_scan_exported(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    name = choose_backend(backend or requested_backend(), u.device.type, u.dtype)
    y, last_state, _, _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, name)
    return (y, last_state) if return_last_state else y


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan: u is {tuple(u.shape)}, not (batch, d, length); A {tuple(A.shape)}")
    (batch, d, length), n = u.shape, A.shape[1]
    if n == 0:
        raise ValueError("selective_scan: A has no states")
    expected = {
        "delta": (delta, (batch, d, length)),
        "A": (A, (d, n)),
        "B": (B, (batch, n, length)),
        "C": (C, (batch, n, length)),
        "D": (D, (d,)),
        "z": (z, (batch, d, length)),
        "delta_bias": (delta_bias, (d,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} is {tuple(tensor.shape)}, not {shape}, as u and A say")
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, u on {u.device}")
    if not u.is_floating_point():
        raise ValueError(f"selective_scan: u is {u.dtype}, not a floating-point tensor")


@custom_op("scan::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and what the backend saved for its backward pass."""
    if u.numel() == 0:
        empty = _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend)
        return tuple(t.zero_() for t in empty)
    module = backend_module(backend)
    y, last_state, saved, ungated = module.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return _like(y, u), last_state, saved, _like(ungated, u) if ungated.numel() else ungated


@_scan.register_fake
def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend):
    batch, d, length = u.shape
    n = A.shape[1]
    state = torch.float64 if u.dtype == torch.float64 else torch.float32
    ungated = torch.empty_like(u) if z is not None and backend == "mamba_ssm" else u.new_empty(0)
    return (
        torch.empty_like(u),
        u.new_empty(batch, d, n, dtype=state),
        u.new_empty(backend_module(backend).saved_shape(batch, d, length, n), dtype=state),
        ungated,
    )


@custom_op("scan::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor | None,
    dlast: Tensor | None,
    saved: Tensor,
    ungated: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    needed: list[bool],
) -> list[Tensor]:
    """Of the gradients of u, delta, A, B, C, D, z and delta_bias those that are needed."""
    inputs = u, delta, A, B, C, D, z, delta_bias
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    if u.numel() == 0:
        return [torch.zeros_like(t) for t in wanted]
    dy = torch.zeros_like(u) if dy is None else dy
    grads = backend_module(backend).scan_backward(dy, dlast, saved, ungated, *inputs, delta_softplus, reverse)
    return [_like(g, t) for g, t, need in zip(grads, inputs, needed, strict=True) if need]


@_scan_backward.register_fake
def _fake_scan_backward(
    dy, dlast, saved, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, needed
):
    inputs = u, delta, A, B, C, D, z, delta_bias
    return [torch.empty_like(t) for t, need in zip(inputs, needed, strict=True) if need]


def _like(value: Tensor, model: Tensor) -> Tensor:
    """`value` with the dtype and the strides that torch.empty_like(model) has, copied only if they differ."""
    result = torch.empty_like(model)
    if value.dtype == result.dtype and value.stride() == result.stride():
        return value
    return result.copy_(value)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.backend = inputs
    _, _, saved, ungated = output
    ctx.save_for_backward(saved, ungated, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, *_):
    needed = list(ctx.needs_input_grad[:8])
    how = ctx.delta_softplus, ctx.reverse, ctx.backend
    gradients = iter(_scan_backward(dy, dlast, *ctx.saved_tensors, *how, needed))
    return *(next(gradients) if need else None for need in needed), None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)
