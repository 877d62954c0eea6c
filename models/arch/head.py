"""From features to colours: the last layer of DSRNet, and one for networks that work at a fraction of the size."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.models.arch.fused import Conv1x1


class ColourHead(nn.Conv2d):
    """A 3x3 convolution to colours, each pixel of which becomes a square of `shuffle` x `shuffle` pixels.

    Shapes: (2B, width, H, W), (B, 3, shuffle H, shuffle W) -> (2B, 3, shuffle H, shuffle W); the mixture isn't used.
    """

    def __init__(self, width: int, shuffle: int):
        super().__init__(width, 3 * shuffle**2, 3, padding=1)
        self.shuffle = shuffle

    def forward(self, x: Tensor, mixture: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), self.shuffle)


class DetailHead(nn.Module):
    """Features to colours at the full size, with the mixture's own detail and without a dot pattern.

    Where every pixel of a shuffled square comes from weights of its own, smooth regions get a pattern of dots. Here
    the weights of a square start equal (ICNR, Aitken et al., "Checkerboard artifact free sub-pixel convolution", 2017),
    and two 3x3 convolutions at the full size follow, which see the mixture. The result starts as 0.

    Args:
        width: channels of the features.
        shuffle: size of the mixture over that of the features.
        detail: channels at the full size.

    Shapes: (2B, width, H, W), (B, 3, shuffle H, shuffle W) -> (2B, 3, shuffle H, shuffle W).
    """

    def __init__(self, width: int, shuffle: int, detail: int):
        super().__init__()
        self.shuffle = shuffle
        self.spread = Conv1x1(width, detail * shuffle**2)
        self.mix = nn.Conv2d(detail + 3, detail, 3, padding=1)
        self.colour = nn.Conv2d(detail, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.spread.parameters():
                parameter.copy_(parameter[:: shuffle**2].repeat_interleave(shuffle**2, dim=0))
        nn.init.zeros_(self.colour.weight)
        nn.init.zeros_(self.colour.bias)

    def forward(self, x: Tensor, mixture: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.spread(x), self.shuffle)  # (2B, detail, shuffle H, shuffle W)
        x = torch.cat([x, torch.cat([mixture, mixture]).to(x.dtype)], dim=1)
        return self.colour(F.gelu(self.mix(x.contiguous(memory_format=torch.channels_last))))
