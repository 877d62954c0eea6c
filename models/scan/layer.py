"""The Mamba layer for sequences (Gu and Dao 2023, figure 3 and algorithm 2)."""

import math

import torch
from torch import Tensor, nn

from dereflect.models.scan.causal_conv import causal_conv1d
from dereflect.models.scan.exported import is_exported
from dereflect.models.scan.operator import selective_scan


class Mamba(nn.Module):
    """(batch, length, d_model) -> (batch, length, d_model), causal along the length.

    Args:
        d_model: channels in and out.
        d_state: n, the states of every inner channel.
        d_conv: width of the causal convolution that precedes the scan.
        expand: inner channels over d_model.

    Parameters have the names, shapes and initial values of `mamba_ssm.Mamba`. Symbols are those of `models.scan`.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        _add_scan_parameters(self, d_inner, math.ceil(d_model / 16), d_state, d_conv)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        _draw_step_sizes(self.dt_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_out(scan_along(self, *self.project_in(x)))

    # The steps stay innermost from the first product to the last, as the convolution and the scan want them, so no
    # tensor is transposed in memory.

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, d_model) to u and z, (batch, d_inner, length) each."""
        return _project(self.in_proj.weight, x.mT).chunk(2, dim=1)

    def project_out(self, y: Tensor) -> Tensor:
        """(batch, d_inner, length) to (batch, length, d_model)."""
        if _is_short(self.out_proj.weight, y):
            return self.out_proj(y.mT)
        return torch.bmm(y.mT, _for_each(y, self.out_proj.weight.mT))


class ScanDirection(nn.Module):
    """The parameters of one more direction through the sequence of a `Mamba` layer, whose projections it shares."""

    def __init__(self, like: Mamba) -> None:
        super().__init__()
        (d_inner, dt_rank), d_state = like.dt_proj.weight.shape, like.A_log.shape[1]
        _add_scan_parameters(self, d_inner, dt_rank, d_state, like.conv1d.kernel_size[0])
        _draw_step_sizes(self.dt_proj)


def _add_scan_parameters(layer: nn.Module, d_inner: int, dt_rank: int, d_state: int, d_conv: int) -> None:
    """Add the convolution and scan parameters, which `scan_along` reads."""
    layer.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
    layer.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
    layer.dt_proj = nn.Linear(dt_rank, d_inner)
    layer.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
    layer.D = nn.Parameter(torch.ones(d_inner))


def _draw_step_sizes(dt_proj: nn.Linear) -> None:
    """delta starts log-uniform in 1e-3..1e-1: the bias is its inverse softplus (section 3.6)."""
    nn.init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
    delta = torch.empty(dt_proj.out_features).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    with torch.no_grad():
        dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))


def scan_along(layer: Mamba | ScanDirection, u: Tensor, z: Tensor | None, reverse: bool = False) -> Tensor:
    """The layer's convolution and scan along u, gated by z; `reverse` goes from the last step to the first.

    Shapes: (batch, d_inner, length) -> the same.
    """
    u = causal_conv1d(u, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation="silu", reverse=reverse)
    (_, dt_rank), d_state = layer.dt_proj.weight.shape, layer.A_log.shape[1]
    delta, B, C = _project(layer.x_proj.weight, u).split([dt_rank, d_state, d_state], dim=1)
    return selective_scan(
        u,
        _project(layer.dt_proj.weight, delta),  # (batch, d_inner, length), without bias
        -torch.exp(layer.A_log.float()),
        B,
        C,
        D=layer.D.float(),
        z=z,
        delta_bias=layer.dt_proj.bias.float(),
        delta_softplus=True,
        reverse=reverse,
    )


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in), (batch, in, length) -> (batch, out, length)"""
    if _is_short(weight, x):
        return (weight @ x.transpose(0, 1).flatten(1)).unflatten(1, (len(x), -1)).transpose(0, 1)
    return torch.bmm(_for_each(x, weight), x)


def _is_short(weight: Tensor, x: Tensor) -> bool:
    """Whether it is cheaper to join all images' steps into one matrix than to read the weight for every image."""
    if is_exported():
        return False  # the program is for sequences of any length
    return x.shape[0] * x.shape[2] < weight.shape[1]


def _for_each(x: Tensor, weight: Tensor) -> Tensor:
    """The weight repeated, without a copy, for every image of x, as torch.bmm wants it.

    F.linear and torch.matmul would fold the images into one matrix, which copies x and the result when the steps are
    innermost.
    """
    return weight.expand(len(x), -1, -1)
