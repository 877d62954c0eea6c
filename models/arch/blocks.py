"""The blocks: MuGI (DSRNet, ICCV 2023, section 3.2) and its single-stream relative NAF (Chen et al. 2022).

A dual-stream feature is one tensor of 2B images, the B transmissions first, then the B reflections. Every layer is
shared by both streams, so it is an ordinary layer called once. Only the mutual gate and the per-stream scales know
that there are two.
"""

import torch
from torch import Tensor, nn

from models.arch.fused import Gate, gate_project_add, norm_project


class ChannelNorm(nn.LayerNorm):
    """The parameters of a LayerNorm over the channels of each pixel; `norm_project` applies it."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)


class StreamScale(nn.ParameterList):
    """A learnt scale of each channel, (1, C, 1, 1), 0 at the start: one for all images or one a stream."""

    def __init__(self, channels: int, streams: int):
        super().__init__(nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(streams))

    def rows(self) -> Tensor:
        """(streams, C), transmission's first."""
        return torch.cat(list(self)).flatten(1)


class GatedBlock(nn.Module):
    """Two residual steps around a gate; `MuGI` and `NAF` say which gate and how many streams.

    Step 1: x + a * project(g * attention(mean g)), g = gate(depthwise3x3(expand(norm(x)))).
    Step 2: x + b * project(gate(expand(norm(x)))).

    Args:
        channels: C.
        gate: "mutual" or "self".
        streams: how many scales a and b have.

    Shapes: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int, gate: Gate, streams: tuple[int, int]):
        super().__init__()
        self.gate: Gate = gate
        self.a = StreamScale(channels, streams[0])
        self.b = StreamScale(channels, streams[1])
        self.norm1 = ChannelNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = ChannelNorm(channels)
        self.expand2 = nn.Conv2d(channels, 2 * channels, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        d = self.depthwise(norm_project(x, self.norm1, self.expand1))  # (N, 2C, H, W)
        x = gate_project_add(d, x, self.project1, self.a.rows(), self.gate, self.attention)
        e = norm_project(x, self.norm2, self.expand2)  # (N, 2C, H, W)
        return gate_project_add(e, x, self.project2, self.b.rows(), self.gate)


class MuGI(GatedBlock):
    """Mutually gated interaction: each stream is gated by the other, (x1 * y2, y1 * x2).

    Args:
        channels: C.
        split: whether each stream has its own scale in the second step, too.

    Shapes: (2B, C, H, W) -> (2B, C, H, W), transmissions first.
    """

    def __init__(self, channels: int, split: bool = True):
        super().__init__(channels, "mutual", (2, 2 if split else 1))


class NAF(GatedBlock):
    """The block of NAFNet: one stream, gated by the other half of its own channels.

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__(channels, "self", (1, 1))
