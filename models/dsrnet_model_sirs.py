"""DSRNetModel: network, VGG19 and losses together: one training step, one prediction."""

import argparse
import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.arch import create_model
from models.arch.dsrnet import STRIDE
from models.vgg import Vgg19
from models.weights import load_weights


class DSRNetModel(nn.Module):
    """The network with all that its training and its use need.

    Args:
        network: net(image, features) -> (transmission, reflection, residue).
        vgg: VGG19, for the network's features; the loss has it, too. None for a network with a stem of its own.
        loss: (transmission, reflection, residue, image, target_t, target_r) -> dict of weighted terms.
        bf16: run the network and VGG19 under autocast to bfloat16.
    """

    def __init__(self, network: nn.Module, vgg: nn.Module | None, loss: nn.Module | None, bf16: bool = False):
        super().__init__()
        self.network = network
        self.vgg = vgg
        self.loss = loss
        self.bf16 = bf16

    def forward(self, image: Tensor, target_t: Tensor, target_r: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the loss of a batch, (B, 3, H, W) each, H and W multiples of 16."""
        image = image.contiguous(memory_format=torch.channels_last)
        with self._autocast(image):
            return self.loss(*self.network(image, self._features(image)), image, target_t, target_r)

    @torch.no_grad()
    def predict(self, image: Tensor, network: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Separate mixtures of any size: padded at the edge to multiples of 16, cropped back.

        Args:
            image: (B, 3, H, W) in [0, 1].
            network: another one to use, such as a moving average.

        Returns:
            Transmission, reflection and residue, (B, 3, H, W) float32, not clipped.
        """
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        image = image.contiguous(memory_format=torch.channels_last)
        with self._autocast(image):
            outputs = (network or self.network)(image, self._features(image))
        return tuple(output.float()[..., :height, :width] for output in outputs)

    def _features(self, image: Tensor) -> list[Tensor] | None:
        if not self.network.wants_features:
            return None
        with torch.no_grad():
            return self.vgg(image)

    def _autocast(self, image: Tensor) -> torch.autocast:
        return torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def build(options: argparse.Namespace, bf16: bool) -> DSRNetModel:
    """The model that the options describe, on the CPU, with the weights they name.

    Raises:
        UserError: the weights of VGG19 or of --weight_path can't be had or don't fit.
    """
    network = create_model(options.inet)
    if options.weight_path:
        load_weights(network, options.weight_path)
    if options.checkpoint_activations:
        network.checkpoint_activations()
    vgg = Vgg19(options.vgg_weights) if network.wants_features or options.lambda_vgg else None
    losses = importlib.import_module(f"models.{options.loss}")
    weights = (options.lambda_vgg, options.lambda_rec, options.lambda_excl, options.lambda_mse)
    loss = losses.ReflectionLoss(vgg, *weights)
    return DSRNetModel(network, vgg, loss, bf16)
