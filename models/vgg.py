"""The frozen VGG19 (Simonyan & Zisserman 2015), for the pyramid's features and for the perceptual loss."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint

# The five maps follow these numbers of layers of torchvision's vgg19().features: ReLU 1_1, 2_1, 3_1, 4_1, 5_1.
CUTS = (2, 7, 12, 21, 30)

_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 1))
"""Channels and number of the convolutions between two poolings (configuration E of the paper, up to conv5_1)."""

VGG_CHANNELS = (64, 128, 256, 512, 512)


class Vgg19(nn.Module):
    """VGG19 up to ReLU 5_1, frozen, in eval mode whatever happens around it.

    Args:
        weights: "imagenet" (torchvision's, downloaded once into its cache), "random" (He's initialisation, always the
            same: to try the program out, not for results), or a file with a state dict of torchvision's vgg19.

    Raises:
        UserError: the weights can't be downloaded or read, or don't fit.
    """

    def __init__(self, weights: str | Path = "imagenet"):
        super().__init__()
        layers = _layers()
        if weights == "random":
            _randomise(layers)
        else:
            _load(layers, weights)
        self.slices = nn.ModuleList(layers[start:end] for start, end in zip((0, *CUTS), CUTS, strict=False))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "Vgg19":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to five maps: 64, 128, 256, 512, 512 channels at strides 1, 2, 4, 8, 16.

        The image is not normalised here: the pyramid gives it in [0, 1], the loss normalises it before the call.
        """
        maps = []
        for part in self.slices:
            # The ReLUs work in place, but every slice starts with a convolution, so none changes an earlier map.
            image = part(image)
            maps.append(image)
        return maps


def _layers() -> nn.Sequential:
    """The first 30 of torchvision's vgg19().features; torchvision itself takes a second to import."""
    layers, channels = [], 3
    for number, (out, count) in enumerate(_BLOCKS):
        layers += [nn.MaxPool2d(2)] if number else []
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            channels = out
    return nn.Sequential(*layers)


def _randomise(layers: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(19)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]))
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)


def _load(layers: nn.Sequential, weights: str | Path) -> None:
    state = _imagenet() if weights == "imagenet" else checkpoint.load(weights)
    state = {name.removeprefix("features."): value for name, value in state.items() if isinstance(name, str)}
    wanted = layers.state_dict()
    unfit = [name for name, value in wanted.items() if getattr(state.get(name), "shape", None) != value.shape]
    if unfit:
        raise UserError(
            f"--vgg_weights {weights}: not the weights of torchvision's vgg19; "
            f"features.{unfit[0]} and {len(unfit) - 1} more are missing or of another shape"
        )
    state = {name: state[name] for name in wanted}
    checkpoint.check_finite(state, f"--vgg_weights {weights}")
    layers.load_state_dict(state)


def _imagenet() -> dict[str, Tensor]:
    from torchvision.models import VGG19_Weights  # imports half of torch

    weights = VGG19_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        file = weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"VGG19's ImageNet weights could not be downloaded ({error}). Ways out: put {file}, fetched on another "
            f"machine with torchvision, into {folder}; or name the file with --vgg_weights FILE; or, only to try "
            "the program out, use --vgg_weights random"
        ) from error
