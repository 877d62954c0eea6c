"""The blocks: MuGI (DSRNet, ICCV 2023, section 3.2), its relatives with Mamba, and NAF (Chen et al. 2022).

A dual-stream feature is one tensor of 2B images, the B transmissions first, then the B reflections. Both streams share
every layer, so it is an ordinary layer called once. Only the mutual gates and the per-stream scales know that there are
two streams.

Every block is two residual steps, x + a * project1(...) and x + b * project2(...), that differ in what is projected:

    MuGI    attend(gate(depthwise(expand(norm x))))            gate(expand(norm x))
    MuGIM2  mamba(gate(depthwise(expand(norm x))))             gate(expand(norm x))
    MuGIMA  attend(gate(depthwise(expand(norm x))))            gate(expand(norm x)), attention scans the image
    MuGIM   attend(gate(spread(mamba x)))                      gate(spread(mamba x))
    MuGIMG  attend(mamba gate(depthwise(expand(norm x))))      mamba gate(expand(norm x))
    NAF     as MuGI, with the gate between halves of the same stream

where attend(v) = v * attention(mean of v over the image), and the gate is part of the projection's operation.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dereflect.models.arch import whole
from dereflect.models.arch.fused import Gate, expand_and_gate, gate_project_add, norm_project, residual_step
from dereflect.models.arch.mamba import ImageMamba, Order


class ChannelNorm(nn.LayerNorm):
    """The parameters of a LayerNorm over the channels of each pixel; `norm_project` applies it."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)


class StreamScale(nn.ParameterList):
    """Learnt scales of the channels, (1, C, 1, 1) each, 0 at the start: one for all images, or one for each stream."""

    def __init__(self, channels: int, streams: int):
        super().__init__(nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(streams))

    def rows(self) -> Tensor:
        """(streams, C), transmission's first."""
        return torch.cat(list(self)).flatten(1)


class Block(nn.Module, ABC):
    """The two residual steps; a subclass computes what goes into them.

    Args:
        channels: C.
        split: whether each stream has its own scale in the second step, too.

    Shapes: (2B, C, H, W), transmissions first -> the same.
    """

    gates: tuple[Gate, Gate] = ("mutual", "mutual")
    attends = True
    checkpointed = False
    """Whether the block keeps only its input for the backward pass, which computes the rest again."""

    def __init__(self, channels: int, split: bool = True):
        super().__init__()
        streams = (1, 1) if "self" in self.gates else (2, 2 if split else 1)
        self.a, self.b = (StreamScale(channels, count) for count in streams)
        self.attention = nn.Conv2d(channels, channels, 1) if self.attends else None
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)

    @abstractmethod
    def step1(self, x: Tensor) -> Tensor:
        """The first residual step."""

    @abstractmethod
    def step2(self, x: Tensor) -> Tensor:
        """The second residual step."""

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            # No random numbers are drawn in a block.
            return checkpoint(self._steps, x, use_reentrant=False, preserve_rng_state=False)
        return self._steps(x)

    def _steps(self, x: Tensor) -> Tensor:
        return self.step2(self.step1(x))

    def _add1(self, d: Tensor, x: Tensor) -> Tensor:
        """Gate, attend to and project d in the first step, and add it to x."""
        return gate_project_add(d, x, self.project1, self.a.rows(), self.gates[0], self.attention)

    def _add2(self, d: Tensor, x: Tensor) -> Tensor:
        """Gate and project d in the second step, and add it to x."""
        return gate_project_add(d, x, self.project2, self.b.rows(), self.gates[1])


class MuGI(Block):
    """Mutually gated interaction: each stream is gated by the other, (x1 * y2, y1 * x2)."""

    def __init__(self, channels: int, split: bool = True):
        super().__init__(channels, split)
        self.norm1 = ChannelNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.norm2 = ChannelNorm(channels)
        self.expand2 = nn.Conv2d(channels, 2 * channels, 1)

    def step1(self, x: Tensor) -> Tensor:
        expansion = self.norm1, self.expand1, self.depthwise
        return residual_step(x, *expansion, self.gates[0], self.attention, self.project1, self.a.rows())

    def step2(self, x: Tensor) -> Tensor:
        return residual_step(x, self.norm2, self.expand2, None, self.gates[1], None, self.project2, self.b.rows())


class NAF(MuGI):
    """The block of NAFNet: one stream, gated by the other half of its own channels; (B, C, H, W) -> the same."""

    gates = ("self", "self")


class MuGIM2(MuGI):
    """MuGI with an image Mamba instead of channel attention (M2DSRNet).

    Args:
        channels, split: as of `Block`.
        order: as of `ImageMamba`.
    """

    gates = ("none", "mutual")
    attends = False

    def __init__(self, channels: int, split: bool = True, order: Order = "raster"):
        super().__init__(channels, split)
        self.mamba = ImageMamba(channels, order)

    def step1(self, x: Tensor) -> Tensor:
        g = expand_and_gate(x, self.norm1, self.expand1, self.depthwise)  # (2B, C, H, W)
        return self._add1(self.mamba(g), x)


class MambaAttention(nn.Module):
    """Channel attention that depends on the place: v * (W mean(v) + what a scan over the shrunken image finds there).

    Simplified channel attention (NAFNet) weighs the channels by their mean over the whole image, so the weights are the
    same everywhere. Here an image Mamba scans the features, averaged over squares and projected to fewer channels, and
    its result, enlarged again, is added to the weights. It starts as plain channel attention.

    Args:
        channels: C.
        pool: side of the squares, in pixels.
        order: of the scan, as of `ImageMamba`.

    Shapes: (B, C, H, W) -> the same; H and W multiples of `pool`.
    """

    def __init__(self, channels: int, pool: int, order: Order):
        super().__init__()
        inner = max(32, channels // 4)
        self.pool = pool
        self.weigh = nn.Conv2d(channels, channels, 1)
        self.narrow = nn.Conv2d(channels, inner, 1)
        self.mamba = ImageMamba(inner, order)
        self.widen = nn.Conv2d(inner, channels, 1, bias=False)
        nn.init.zeros_(self.widen.weight)

    def forward(self, v: Tensor) -> Tensor:
        small = F.avg_pool2d(v, self.pool) if self.pool > 1 else v
        places = self.widen(whole.look(self.narrow(small), self.mamba))
        if self.pool > 1:
            places = F.interpolate(places, scale_factor=self.pool, mode="bilinear", align_corners=False)
        mean = whole.mean(small.permute(0, 2, 3, 1), small.mean((2, 3)))  # (2B, C)
        return v * (places + self.weigh(mean[:, :, None, None]))


class MuGIMA(MuGI):
    """MuGI whose channel attention is a `MambaAttention`.

    Args:
        channels, split: as of `Block`.
        pool, order: as of `MambaAttention`.
    """

    gates = ("none", "mutual")
    attends = False

    def __init__(self, channels: int, split: bool = True, pool: int = 1, order: Order = "bidirectional"):
        super().__init__(channels, split)
        self.attend = MambaAttention(channels, pool, order)

    def step1(self, x: Tensor) -> Tensor:
        g = expand_and_gate(x, self.norm1, self.expand1, self.depthwise)  # (2B, C, H, W)
        return self._add1(self.attend(g), x)


class MuGIM(Block):
    """An image Mamba and a grouped convolution instead of norm and expansion (MDSRNet v1)."""

    def __init__(self, channels: int, split: bool = True):
        super().__init__(channels, split)
        self.mamba1, self.mamba2 = ImageMamba(channels), ImageMamba(channels)
        self.expand1, self.expand2 = (
            nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels) for _ in range(2)
        )

    def step1(self, x: Tensor) -> Tensor:
        return self._add1(self.expand1(self.mamba1(x)), x)

    def step2(self, x: Tensor) -> Tensor:
        return self._add2(self.expand2(self.mamba2(x)), x)


class MambaGate(nn.Module):
    """(M(x) * P(y), M(y) * P(x)) with an image Mamba M and a 1x1 convolution P; (2B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.mamba = ImageMamba(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        own, other = self.project(x).chunk(2)
        return self.mamba(x) * torch.cat([other, own])


class MuGIMG(Block):
    """MuGI with Mamba gates (MGDSRNet)."""

    gates = ("none", "none")

    def __init__(self, channels: int, split: bool = True):
        super().__init__(channels, split)
        self.norm1 = ChannelNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, channels, 3, padding=1, groups=channels)
        self.gate1 = MambaGate(channels)
        self.norm2 = ChannelNorm(channels)
        self.expand2 = nn.Conv2d(channels, channels, 1)
        self.gate2 = MambaGate(channels)

    def step1(self, x: Tensor) -> Tensor:
        d = self.depthwise(norm_project(x, self.norm1, self.expand1))  # (2B, C, H, W)
        return self._add1(self.gate1(d), x)

    def step2(self, x: Tensor) -> Tensor:
        return self._add2(self.gate2(norm_project(x, self.norm2, self.expand2)), x)
