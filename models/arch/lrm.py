"""The learnable residue module of DSRNet (ICCV 2023, section 3.3)."""

import torch
from torch import Tensor, nn

from dereflect.models.arch.blocks import NAF, MuGI
from dereflect.models.arch.fused import Conv1x1


class LearnableResidue(nn.Module):
    """What T + R leaves unexplained of the mixture, from the features of both streams.

    Args:
        width: C, channels of the features.
        colours: channels of the result.
        interact, merge: numbers of blocks on both streams, and on what they are joined to.

    Shapes: (2B, C, H, W), transmissions first -> (B, colours, H, W), in (-1, 1).
    """

    def __init__(self, width: int, colours: int = 3, interact: int = 2, merge: int = 4):
        super().__init__()
        self.expand = Conv1x1(width, 2 * width)
        self.interact = nn.Sequential(*(MuGI(2 * width, split=True) for _ in range(interact)))
        self.merge = nn.Sequential(*(NAF(4 * width) for _ in range(merge)))
        self.head = nn.Conv2d(4 * width, colours, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        streams = self.interact(self.expand(features))  # (2B, 2C, H, W)
        joined = torch.cat(streams.chunk(2), dim=1)  # (B, 4C, H, W)
        return torch.tanh(self.head(self.merge(joined)))
