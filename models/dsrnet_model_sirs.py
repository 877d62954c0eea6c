"""DSRNetModel: network, VGG19 and losses together; one training step, one prediction."""

import argparse
import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.arch import create_model
from models.vgg import Vgg19
from models.weights import load_weights
from options.arguments import STRIDE
from util.errors import UserError


class DSRNetModel(nn.Module):
    """The network with everything that its training and its use need.

    Args:
        network: net(mixture, features) -> (transmission, reflection, residue).
        vgg: VGG19, for the network's features; the loss uses it, too. None for a network with a stem of its own.
        loss: (transmission, reflection, residue, mixture, target_t, target_r) -> dict of weighted terms. None for a
            model that is not trained.
        bf16: run the network and VGG19 under autocast to bfloat16. VGG19's weights, which never change, are then
            converted to bfloat16 here; autocast would convert them in every pass.
    """

    def __init__(self, network: nn.Module, vgg: nn.Module | None, loss: nn.Module | None, bf16: bool = False):
        super().__init__()
        self.network = network
        self.vgg = vgg
        self.loss = loss
        self.bf16 = bf16
        if bf16 and vgg is not None:
            vgg.bfloat16()

    def forward(self, mixture: Tensor, target_t: Tensor, target_r: Tensor) -> dict[str, Tensor]:
        """The weighted terms of a batch's loss; the images are (B, 3, H, W), H and W multiples of 16."""
        mixture = mixture.contiguous(memory_format=torch.channels_last)
        with self._autocast(mixture):
            return self.loss(*self.network(mixture, self._features(mixture)), mixture, target_t, target_r)

    def compile_step(self, graphs: bool) -> None:
        """Compile the whole training step when it is first called.

        Args:
            graphs: also record it as CUDA graphs.

        Raises:
            UserError: torch.compile doesn't work here.
        """
        device = next(self.parameters()).device
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        except Exception as error:  # whatever an installation can get wrong
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--compile: torch.compile doesn't work here; leave it out ({reason[0]})") from error
        self.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)

    @torch.no_grad()
    def predict(self, mixture: Tensor, network: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Separate mixtures of any size: padded with their edge pixels to multiples of 16, and cropped back.

        Args:
            mixture: (B, 3, H, W) in [0, 1].
            network: the network to use instead of the model's own, such as a moving average.

        Returns:
            Transmission, reflection and residue, (B, 3, H, W) float32, not clipped.
        """
        height, width = mixture.shape[-2:]
        mixture = F.pad(mixture, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        mixture = mixture.contiguous(memory_format=torch.channels_last)
        with self._autocast(mixture):
            outputs = (network or self.network)(mixture, self._features(mixture))
        return tuple(output.float()[..., :height, :width] for output in outputs)

    def _features(self, mixture: Tensor) -> list[Tensor] | None:
        if not self.network.wants_features:
            return None
        with torch.no_grad():
            return self.vgg(mixture)

    def _autocast(self, mixture: Tensor) -> torch.autocast:
        return torch.autocast(mixture.device.type, dtype=torch.bfloat16, enabled=self.bf16)


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
