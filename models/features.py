"""The frozen networks whose features feed a pyramid or a perceptual loss."""

from pathlib import Path
from typing import Literal

from torch import nn

from dereflect.models.mobilenet import MOBILENET_CHANNELS, MobileNetV2
from dereflect.models.vgg import VGG_CHANNELS, Vgg19

Kind = Literal["vgg19", "mobilenet"]

CHANNELS: dict[Kind, tuple[int, ...]] = {"vgg19": VGG_CHANNELS, "mobilenet": MOBILENET_CHANNELS}
"""Channels of the maps, finest first. VGG19's finest map has the size of the image, MobileNetV2's a quarter of it."""


def build_features(kind: Kind | None, vgg_weights: str | Path) -> nn.Module | None:
    """The network of that kind, frozen: image (B, 3, H, W) in [0, 1] -> feature maps, finest first; None for None.

    Args:
        kind: which network.
        vgg_weights: as of `Vgg19`; MobileNetV2's weights are bundled.

    Raises:
        UserError: the weights can't be had or don't fit.
    """
    if kind is None:
        return None
    return Vgg19(vgg_weights) if kind == "vgg19" else MobileNetV2()
