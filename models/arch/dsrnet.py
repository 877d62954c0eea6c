"""DSRNet (Hu & Guo, "Single Image Reflection Separation via Component Synergy", ICCV 2023).

One network for the whole family: the members differ in width, depth, in which block stands where and in what feeds
the pyramid. Glossary: v1..v5 the features of the mixture, f0..f5 the pyramid's, 2B the two streams of B images.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.models.arch.blocks import NAF, Block, MuGI
from dereflect.models.arch.fused import Conv1x1
from dereflect.models.arch.head import ColourHead, DetailHead
from dereflect.models.arch.lrm import LearnableResidue
from dereflect.models.arch.whole import stretch
from dereflect.models.features import CHANNELS, Kind
from dereflect.options.arguments import STRIDE

MakeBlock = Callable[[int, bool], nn.Module]
"""block(channels, split) makes a dual-stream block, (2B, C, H, W) -> (2B, C, H, W)."""


class LearnedStem(nn.Module):
    """Features of the image that are learnt with the network, instead of VGG19's.

    Args:
        colours: channels of the image.
        channels: of the features, finest first; each has half the height and width of the one before.

    Shapes: (B, colours, H, W) -> (B, channels[0], H, W), (B, channels[1], H/2, W/2), ...
    """

    def __init__(self, colours: int, channels: Sequence[int]):
        super().__init__()
        self.downs = nn.ModuleList([nn.Conv2d(colours, channels[0], 3, padding=1)])
        self.downs.extend(nn.Conv2d(c, d, 2, stride=2) for c, d in pairwise(channels))
        self.blocks = nn.ModuleList(NAF(c) for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            features.append(x)
        return features


class Pyramid(nn.Module):
    """Features from coarse to fine into one dual-stream feature (DSFNet, section 3.1).

    Args:
        channels: of the features, finest first; each has half the height and width of the one before.
        colours: channels of the image.
        neck: channels of the image's and of the finest features at the end.
        width: channels of the result.
        block: makes the blocks.
        split: passed to every block.
    """

    def __init__(self, channels: Sequence[int], colours: int, neck: int, width: int, block: MakeBlock, split: bool):
        super().__init__()
        self.lateral = nn.ModuleList(block(c, split) for c in channels)
        self.image = nn.Sequential(nn.Conv2d(colours, neck, 3, padding=1), block(neck, split))
        # fuse[i] joins the coarser feature with v(i+1)'s and refine[i] works on the result, which but for the finest
        # has spread its channels over twice the height and width.
        joined, coarser = [], channels[-1]
        for c in channels[-2::-1]:
            joined.insert(0, coarser + c)
            coarser = joined[0] // 4
        self.fuse = nn.ModuleList(Conv1x1(c, c) for c in joined)
        self.refine = nn.ModuleList(block(c, split) for c in (joined[0], *(c // 4 for c in joined[1:])))
        self.narrow = Conv1x1(joined[0], neck)
        self.refine_narrow = block(neck, split)
        self.fuse_image = Conv1x1(2 * neck, width)

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """(B, colours, H, W) and v1, v2, ... to (2B, width, H, W); v1 may be smaller than the image."""
        laterals = [block(_both(v)) for block, v in zip(self.lateral, features, strict=True)]
        size = features[-2].shape[-2:]  # twice that of the last, or one less
        f = stretch(laterals[-1], size)
        for level in range(len(laterals) - 2, 0, -1):
            f = self.fuse[level](torch.cat([f, laterals[level]], dim=1))
            f = self.refine[level](F.pixel_shuffle(f, 2))
        f = self.refine[0](self.fuse[0](torch.cat([f, laterals[0]], dim=1)))
        f = self.refine_narrow(self.narrow(f))  # (2B, neck, size of the finest features)
        if f.shape[-2:] != image.shape[-2:]:
            f = F.interpolate(f, image.shape[-2:], mode="bilinear", align_corners=False)
        return self.fuse_image(torch.cat([f, self.image(_both(image))], dim=1))


class UNet(nn.Module):
    """Dual-stream encoder and decoder with skip connections (DSDNet, section 3.2).

    Args:
        width: channels at full resolution; every level down doubles them.
        encoder, middle, decoder: numbers of blocks, the encoder's and the decoder's by level.
        block: makes the blocks.
        split: passed to every block.

    Shapes: (2B, width, H, W) -> the same.
    """

    def __init__(
        self,
        width: int,
        encoder: Sequence[int],
        middle: int,
        decoder: Sequence[int],
        block: MakeBlock,
        split: bool,
    ):
        super().__init__()

        def stage(count: int, channels: int) -> nn.Sequential:
            return nn.Sequential(*(block(channels, split) for _ in range(count)))

        widths = [width << level for level in range(len(encoder) + 1)]
        self.encoders = nn.ModuleList(stage(n, c) for n, c in zip(encoder, widths, strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths[:-1])
        self.middle = stage(middle, widths[-1])
        self.ups = nn.ModuleList(Conv1x1(c, 2 * c, bias=False) for c in widths[:0:-1])
        self.decoders = nn.ModuleList(stage(n, c) for n, c in zip(decoder, widths[-2::-1], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            skips.append(blocks(x))
            x = down(skips[-1])
        x = self.middle(x)
        for up, blocks in zip(self.ups, self.decoders, strict=True):
            x = blocks(F.pixel_shuffle(up(x), 2) + skips.pop())
        return x


class DSRNet(nn.Module):
    """A mixture into transmission, reflection and residue.

    Args:
        width: channels at full resolution.
        encoder, middle, decoder: numbers of blocks of the U-Net.
        split: whether the blocks' second step has a scale of each stream.
        block: makes the U-Net's blocks.
        pyramid_block: makes the pyramid's blocks.
        features: the frozen network whose features the pyramid takes.
        stem: channels of a `LearnedStem`, whose features the pyramid takes instead.
        shuffle: factor by which height and width are divided first, for its square times as many channels.
        neck: channels of the pyramid's last step.
        residue: numbers of blocks of each kind of the `LearnableResidue`; None for no residue, which then is 0.
        residual: whether the transmission is the mixture plus the network's output.
        detail: channels of a `DetailHead`; 0 for a `ColourHead`.
    """

    def __init__(
        self,
        width: int,
        encoder: Sequence[int],
        middle: int,
        decoder: Sequence[int],
        split: bool,
        block: MakeBlock = MuGI,
        pyramid_block: MakeBlock = MuGI,
        features: Kind = "vgg19",
        stem: Sequence[int] | None = None,
        shuffle: int = 1,
        neck: int = 32,
        residue: tuple[int, int] | None = (2, 4),
        residual: bool = False,
        detail: int = 0,
    ):
        super().__init__()
        colours = 3 * shuffle**2
        self.shuffle, self.residual = shuffle, residual
        self.stem = LearnedStem(colours, stem) if stem else None
        self.features: Kind | None = None if stem else features
        self.pyramid = Pyramid(stem or CHANNELS[features], colours, neck, width, pyramid_block, split)
        self.unet = UNet(width, encoder, middle, decoder, block, split)
        self.head = DetailHead(width, shuffle, detail) if detail else ColourHead(width, shuffle)
        self.residue = LearnableResidue(width, colours, *residue) if residue else None
        self.to(memory_format=torch.channels_last)

    def checkpoint_activations(self) -> None:
        """Keep only every block's input for the backward pass, which computes the rest again.

        This takes a fraction of the memory and a third more arithmetic; the numbers are the very same.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointed = True

    def forward(self, mixture: Tensor, features: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Separate a batch of mixtures.

        Args:
            mixture: (B, 3, H, W) in [0, 1]; H and W multiples of 16.
            features: maps of the mixture as it is, not normalised, by the frozen network that `features` names: VGG19's
                are (B, 64, H, W) to (B, 512, H/16, W/16). None for a network with a stem of its own.

        Returns:
            Transmission, reflection (around [0, 1], not clipped) and residue (in (-1, 1)), (B, 3, H, W) each.

        Raises:
            ValueError: H or W is not a multiple of 16.
        """
        if mixture.shape[-2] % STRIDE or mixture.shape[-1] % STRIDE:
            raise ValueError(f"height and width must be multiples of {STRIDE}, not {tuple(mixture.shape[-2:])}")
        image = F.pixel_unshuffle(mixture, self.shuffle)  # (B, colours, H / shuffle, W / shuffle)
        x = self.unet(self.pyramid(image, self.stem(image) if self.stem else features))  # (2B, width, H, W)
        transmission, reflection = self.head(x, mixture).chunk(2)
        if self.residual:
            transmission = mixture + transmission
        if self.residue is None:
            return transmission, reflection, torch.zeros_like(mixture)
        return transmission, reflection, F.pixel_shuffle(self.residue(x), self.shuffle)


def _both(x: Tensor) -> Tensor:
    """(B, C, H, W) to (2B, C, H, W): both streams start from the same features."""
    return torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
