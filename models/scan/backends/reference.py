"""The recurrence, step by step, in plain torch: slow, in any precision; every other backend must equal it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """y (batch, d, length) and the last state (batch, d, n); shapes and meaning as in `selective_scan`.

    Computes in float64 where u is float64, else in float32; differentiable by autograd, any number of times.
    """
    u, delta, A, B, C, D, z, delta_bias = _widen(u, delta, A, B, C, D, z, delta_bias)
    if reverse:
        u, delta, B, C, z = flipped(u, delta, B, C, z)
    delta = _step_sizes(delta, delta_bias, delta_softplus)
    h = u.new_zeros(*u.shape[:2], A.shape[1])  # (batch, d, n)
    ys = []
    for t in range(u.shape[2]):
        h = _next_state(h, delta, A, B, u, t)
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    y = torch.stack(ys, -1) if ys else torch.zeros_like(u)  # (batch, d, length)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y.flip(-1) if reverse else y, h


def saved_shape(batch: int, d: int, length: int, n: int) -> tuple[int, ...]:
    """Nothing is saved: the backward pass starts over."""
    return (0,)


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return y, h, h.new_empty(0), h.new_empty(0)


def scan_backward(
    dy, dlast, saved, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
) -> tuple[Tensor | None, ...]:
    """The adjoint recurrence. With a_t = exp(delta_t A), the gradient of h_t is

    g_t = C_t dy_t + a_{t+1} g_{t+1},   and with q_t = g_t a_t h_{t-1}
    du_t = D dy_t + delta_t sum_n g_t B_t            dB_t = sum_d g_t delta_t u_t     dC_t = sum_d dy_t h_t
    ddelta_t = u_t sum_n g_t B_t + sum_n A q_t       dA = sum_t delta_t q_t
    """
    dy, dlast, u, raw, A, B, C, D, z, delta_bias = _widen(dy, dlast, u, delta, A, B, C, D, z, delta_bias)
    if reverse:
        dy, u, raw, B, C, z = flipped(dy, u, raw, B, C, z)
    delta = _step_sizes(raw, delta_bias, delta_softplus)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    states = [h]
    for t in range(u.shape[2]):
        h = _next_state(h, delta, A, B, u, t)
        states.append(h)

    dz = None
    if z is not None:
        y = torch.einsum("bdln,bnl->bdl", torch.stack(states[1:], 2), C)
        if D is not None:
            y = y + D[:, None] * u
        gate = torch.sigmoid(z)
        dz = dy * y * gate * (1 + z * (1 - gate))
        dy = dy * z * gate

    du = torch.zeros_like(u) if D is None else D[:, None] * dy
    ddelta, dA, dB, dC = (torch.zeros_like(t) for t in (u, A, B, C))
    g = torch.zeros_like(h) if dlast is None else dlast
    for t in range(u.shape[2] - 1, -1, -1):
        g = g + dy[:, :, t, None] * C[:, None, :, t]
        dx = torch.einsum("bdn,bn->bd", g, B[:, :, t])
        dB[:, :, t] = torch.einsum("bdn,bd->bn", g, delta[:, :, t] * u[:, :, t])
        dC[:, :, t] = torch.einsum("bdn,bd->bn", states[t + 1], dy[:, :, t])
        g = g * torch.exp(delta[:, :, t, None] * A)
        q = g * states[t]
        dA += torch.einsum("bdn,bd->dn", q, delta[:, :, t])
        du[:, :, t] += delta[:, :, t] * dx
        ddelta[:, :, t] = u[:, :, t] * dx + torch.einsum("bdn,dn->bd", q, A)
    if delta_softplus:
        ddelta = ddelta * torch.sigmoid(raw if delta_bias is None else raw + delta_bias[:, None])
    dD, dbias = (dy * u).sum((0, 2)), ddelta.sum((0, 2))
    if reverse:
        du, ddelta, dB, dC, dz = flipped(du, ddelta, dB, dC, dz)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def flipped(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with their last step first."""
    return [t if t is None else t.flip(-1) for t in tensors]


def _widen(u: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """float64 where the first is float64, else float32."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return [t if t is None else t.to(dtype) for t in (u, *tensors)]


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if delta_softplus else delta


def _next_state(h: Tensor, delta: Tensor, A: Tensor, B: Tensor, u: Tensor, t: int) -> Tensor:
    """h_t (batch, d, n) from h_{t-1}."""
    x = delta[:, :, t] * u[:, :, t]  # (batch, d)
    return torch.exp(delta[:, :, t, None] * A) * h + x[:, :, None] * B[:, None, :, t]
