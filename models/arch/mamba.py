"""The Mamba layer (Gu and Dao 2023, figure 3 and algorithm 2) and its use on images."""

import math

import torch
from torch import Tensor, nn

from models.scan import causal_conv1d, selective_scan


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
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._init_step_sizes()

    def _init_step_sizes(self, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> None:
        """delta starts log-uniform in low..high: the bias is its inverse softplus (section 3.6)."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        delta = torch.empty(self.d_inner).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x: Tensor) -> Tensor:
        # The steps stay innermost from the first product to the last, as the convolution and the scan want them;
        # no tensor is ever transposed in memory.
        xz = _project(self.in_proj.weight, x.mT)  # (batch, 2 d_inner, length)
        u, z = xz.chunk(2, dim=1)  # (batch, d_inner, length) each
        u = causal_conv1d(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        delta_B_C = _project(self.x_proj.weight, u)
        delta, B, C = delta_B_C.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        delta = _project(self.dt_proj.weight, delta)  # (batch, d_inner, length), without bias
        y = selective_scan(
            u,
            delta,
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        if _is_short(self.out_proj.weight, y):
            return self.out_proj(y.mT)
        return torch.bmm(y.mT, _for_each(y, self.out_proj.weight.mT))  # (batch, length, d_model)


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in), (batch, in, length) -> (batch, out, length)"""
    if _is_short(weight, x):
        return (weight @ x.transpose(0, 1).flatten(1)).unflatten(1, (len(x), -1)).transpose(0, 1)
    return torch.bmm(_for_each(x, weight), x)


def _is_short(weight: Tensor, x: Tensor) -> bool:
    """Whether reading the weight once for every image costs more than bringing all images' steps together."""
    return x.shape[0] * x.shape[2] < weight.shape[1]


def _for_each(x: Tensor, weight: Tensor) -> Tensor:
    """The weight for every image of x: F.linear and torch.matmul would fold the images into one matrix, which for
    steps that are innermost means copies of x and of the result."""
    return weight.expand(len(x), -1, -1)


class ImageMamba(nn.Module):
    """(batch, channels, height, width) -> the same: the pixels, row by row, are a sequence for one Mamba layer.

    With channels_last images, which the result is too, neither way copies anything.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mamba_model = Mamba(channels)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        sequence = x.permute(0, 2, 3, 1).flatten(1, 2)  # (batch, height * width, channels)
        return self.mamba_model(sequence).unflatten(1, (height, -1)).permute(0, 3, 1, 2)
