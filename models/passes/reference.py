"""The passes in plain torch, on any device and in any precision; shapes as in operator.py."""

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
    return y, torch.cat([mean, rstd], 1).to(_sum_type(x))


def norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, added: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    mean, rstd = (column.contiguous() for column in statistics.to(x.dtype).split(1, 1))
    wanted = [True, False, False]
    dx = torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[1:], mean, rstd, None, None, wanted)[0]
    added = torch.zeros_like(dx) if added is None else added
    return added + dx, _sums(added.unflatten(0, (groups, -1)), 1)


def gate(d: Tensor, images: int, how: str) -> Tensor:
    u, v = d.chunk(2, 1)
    return u * _partner(v, how)


def gate_backward(dg: Tensor, d: Tensor, images: int, how: str) -> tuple[Tensor, Tensor]:
    u, v = d.chunk(2, 1)
    dd = torch.cat([dg * _partner(v, how), _partner(dg * u, how)], 1)
    return dd, _sums(dd, 0)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, how: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    image, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
    d = F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).contiguous()
    if how == "none":
        return d, d.new_empty(0), d.new_empty(0, dtype=_sum_type(d))
    g = gate(d.flatten(0, 2), d.shape[0], how).view(*d.shape[:3], -1)
    return d if keep else d.new_empty(0), g, _sums(g, (1, 2))


def depthwise_backward(
    dg: Tensor, d: Tensor, x: Tensor, weight: Tensor, how: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dd = dg if how == "none" else gate_backward(dg.flatten(0, 2), d.flatten(0, 2), len(d), how)[0].view_as(d)
    image, dd_image = x.permute(0, 3, 1, 2), dd.permute(0, 3, 1, 2)
    dx = (
        F.conv_transpose2d(dd_image, weight.to(x.dtype), padding=1, groups=len(weight)).permute(0, 2, 3, 1).contiguous()
    )
    dweight = torch.nn.grad.conv2d_weight(image, weight.shape, dd_image, padding=1, groups=len(weight))
    return dx, dweight.to(_sum_type(x)), _sums(dd, (0, 1, 2)), _sums(dx, (0, 1, 2))


def pixel_loss(estimate: Tensor, target: Tensor, mse: float, l1: float, slopes: float) -> tuple[Tensor, Tensor]:
    d = estimate - target
    down, right = d.diff(dim=-2), d.diff(dim=-1)
    loss = mse * d.square().mean() + l1 * d.abs().mean() + slopes * (down.abs().mean() + right.abs().mean())
    gradient = (2 * mse * d + l1 * d.sgn()) / d.numel()
    gradient += slopes / down.numel() * (F.pad(down.sgn(), (0, 0, 1, 0)) - F.pad(down.sgn(), (0, 0, 0, 1)))
    gradient += slopes / right.numel() * (F.pad(right.sgn(), (1, 0)) - F.pad(right.sgn(), (0, 1)))
    return loss, gradient


def _partner(rows: Tensor, how: str) -> Tensor:
    """The other stream's rows, for a mutual gate."""
    return rows.roll(rows.shape[0] // 2, 0) if how == "mutual" else rows


def _sums(x: Tensor, dim) -> Tensor:
    return x.sum(dim, dtype=_sum_type(x))


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
