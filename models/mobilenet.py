"""The frozen MobileNetV2 (Sandler et al., CVPR 2018), ImageNet's features where VGG19 is too large or can't be had."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.util.run import checkpoint

WEIGHTS = Path(__file__).parent / "pretrained" / "mobilenet_v2.safetensors"

# Table 2 of the paper: expansion, channels, blocks, stride.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_MAPS = {1: 6.7, 2: 5.9, 4: 4.3, 6: 2.3}
"""The stages whose results are the feature maps, and the standard deviation of their values on photographs."""

MOBILENET_CHANNELS = tuple(_STAGES[stage][1] for stage in _MAPS)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the result has ceil(size / stride), an odd rest pads the end.

    Args:
        kernel: 1 or 3.
        stride: 1 or 2.
        relu6: clamp the result to 0..6.
    """

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu6: bool = True):
        super().__init__(channels, out, kernel, stride, groups=groups)
        self.relu6 = relu6

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] == 3:
            # Every second pixel of an even side is the middle of three of which none precedes the first.
            high, wide = (1 if self.stride[0] == 1 else size % 2 for size in x.shape[-2:])
            x = F.pad(x, (wide, 1, high, 1))
        x = super().forward(x)
        return F.relu6(x) if self.relu6 else x


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (section 3.3); (B, C, H, W) -> (B, out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int):
        super().__init__()
        inner = expansion * channels
        self.expand = SameConv2d(channels, inner) if expansion > 1 else None
        self.depthwise = SameConv2d(inner, inner, 3, stride, groups=inner)
        self.project = SameConv2d(inner, out, relu6=False)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x) if self.expand else x))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """MobileNetV2 up to its last bottleneck, frozen, in eval mode whatever happens around it.

    Args:
        weights: a file with the state dict; None draws them at random.

    Raises:
        UserError: the file can't be read or doesn't fit.
    """

    def __init__(self, weights: Path | None = WEIGHTS):
        super().__init__()
        self.first = SameConv2d(3, 32, 3, 2)
        channels = [32, *(out for _, out, _, _ in _STAGES)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                InvertedResidual(source, out, stride, expansion),
                *(InvertedResidual(out, out, 1, expansion) for _ in range(count - 1)),
            )
            for (source, out), (expansion, _, count, stride) in zip(pairwise(channels), _STAGES, strict=True)
        )
        if weights:
            state = checkpoint.load(weights).get("network", {})
            checkpoint.check_fit(self.state_dict(), state, str(weights))
            self.load_state_dict(state)  # float16 values into float32 parameters
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "MobileNetV2":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] to four maps of about unit variance: 24, 32, 96, 320 channels at strides 4 to 32."""
        x = self.first(2 * image - 1)
        maps = []
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            if stage in _MAPS:
                maps.append(x / _MAPS[stage])
        return maps
