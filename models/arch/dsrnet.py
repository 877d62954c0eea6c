"""DSRNet (Hu & Guo, "Single Image Reflection Separation via Component Synergy", ICCV 2023).

One network for the whole family: the members differ in width, depth and in which block stands where.
Glossary: v1..v5 the VGG19 features of the mixture, f0..f5 the pyramid's, 2B the two streams of B images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.arch.blocks import Block, MuGI
from models.arch.lrm import LearnableResidue

STRIDE = 16
"""Height and width of the network's input must be multiples of it."""

VGG_CHANNELS = (64, 128, 256, 512, 512)

MakeBlock = Callable[[int, bool], nn.Module]
"""block(channels, split) makes a dual-stream block, (2B, C, H, W) -> (2B, C, H, W)."""


class Pyramid(nn.Module):
    """VGG19's features from coarse to fine into one dual-stream feature (DSFNet, section 3.1).

    Args:
        width: channels of the result.
        block: makes the blocks.
        split: passed to every block.
    """

    def __init__(self, width: int, block: MakeBlock, split: bool):
        super().__init__()
        self.lateral = nn.ModuleList(block(c, split) for c in VGG_CHANNELS)
        self.image = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), block(32, split))
        # fuse[i] joins the coarser feature with v(i+1)'s and refine[i] works on the result.
        self.fuse = nn.ModuleList(nn.Conv2d(c, c, 1) for c in (128, 256, 512, 1024))
        self.refine = nn.ModuleList(block(c, split) for c in (128, 64, 128, 256))
        self.narrow = nn.Conv2d(128, 32, 1)
        self.refine_narrow = block(32, split)
        self.fuse_image = nn.Conv2d(64, width, 1)

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) and v1..v5 to (2B, width, H, W)."""
        laterals = [block(_both(v)) for block, v in zip(self.lateral, features, strict=True)]
        f = F.interpolate(laterals[4], scale_factor=2, mode="bilinear", align_corners=True)
        for level in (3, 2, 1):
            f = self.fuse[level](torch.cat([f, laterals[level]], dim=1))
            f = self.refine[level](F.pixel_shuffle(f, 2))
        f = self.refine[0](self.fuse[0](torch.cat([f, laterals[0]], dim=1)))
        f = self.refine_narrow(self.narrow(f))  # (2B, 32, H, W)
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
        self.ups = nn.ModuleList(nn.Conv2d(c, 2 * c, 1, bias=False) for c in widths[:0:-1])
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
    ):
        super().__init__()
        self.pyramid = Pyramid(width, pyramid_block, split)
        self.unet = UNet(width, encoder, middle, decoder, block, split)
        self.head = nn.Conv2d(width, 3, 3, padding=1)
        self.residue = LearnableResidue(width)
        self.to(memory_format=torch.channels_last)

    def checkpoint_activations(self) -> None:
        """Keep only the input of every block for the backward pass, which computes the rest again: a fraction of the
        memory for a third more arithmetic, and the very same numbers."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointed = True

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Separate a batch of mixtures.

        Args:
            image: (B, 3, H, W) in [0, 1]; H and W multiples of 16.
            features: five maps of VGG19 of the same image, not normalised, (B, 64, H, W) to (B, 512, H/16, W/16).

        Returns:
            Transmission, reflection (around [0, 1], not clipped) and residue (in (-1, 1)), (B, 3, H, W) each.

        Raises:
            ValueError: H or W is not a multiple of 16.
        """
        if image.shape[-2] % STRIDE or image.shape[-1] % STRIDE:
            raise ValueError(f"height and width must be multiples of {STRIDE}, not {tuple(image.shape[-2:])}")
        x = self.unet(self.pyramid(image, features))  # (2B, width, H, W)
        transmission, reflection = self.head(x).chunk(2)
        return transmission, reflection, self.residue(x)


def _both(x: Tensor) -> Tensor:
    """(B, C, H, W) to (2B, C, H, W): both streams start from the same features."""
    return torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
