"""DSRNetModel: network, VGG19 and losses together; one training step, one prediction."""

import argparse
import importlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.models.arch import create_model
from dereflect.models.features import build_features
from dereflect.models.weights import load_weights
from dereflect.options.arguments import STRIDE
from dereflect.util.errors import UserError


class DSRNetModel(nn.Module):
    """The network with everything that its training and its use need.

    Args:
        network: net(mixture, features) -> (transmission, reflection, residue).
        features: the frozen network whose features the network takes; None for a network with a stem of its own.
        loss: (transmission, reflection, residue, mixture, target_t, target_r) -> dict of weighted terms. None for a
            model that is not trained.
        bf16: run the networks under autocast to bfloat16. The frozen ones' weights are then converted to bfloat16
            here; autocast would convert them in every pass.
    """

    def __init__(self, network: nn.Module, features: nn.Module | None, loss: nn.Module | None, bf16: bool = False):
        super().__init__()
        self.network = network
        self.features = features
        self.loss = loss
        self.bf16 = bf16
        frozen = [features, getattr(getattr(loss, "perceptual", None), "network", None)]
        for part in (part for part in frozen if bf16 and part is not None):
            part.bfloat16()

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
    def predict(
        self, mixture: Tensor, network: nn.Module | None = None, part: tuple[slice, slice] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Separate mixtures of any size: padded with their edge pixels to multiples of 16, and cropped back.

        Args:
            mixture: (B, 3, H, W) in [0, 1].
            network: the network to use instead of the model's own, such as a moving average.
            part: rows and columns to separate, the rest is only for the features to see. They start at multiples of
                32; H, W and where they stop are multiples of 16.

        Returns:
            Transmission, reflection and residue, (B, 3, H, W) float32, not clipped; of the part if there is one.
        """
        height, width = mixture.shape[-2:]
        mixture = F.pad(mixture, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        mixture = mixture.contiguous(memory_format=torch.channels_last)
        with self._autocast(mixture):
            features = self._features(mixture)
            if part:
                features = features and [_part(f, mixture, part) for f in features]
                mixture = mixture[(..., *part)].contiguous(memory_format=torch.channels_last)
            outputs = (network or self.network)(mixture, features)
        return tuple(output.float()[..., :height, :width] for output in outputs)

    def _features(self, mixture: Tensor) -> list[Tensor] | None:
        if self.features is None:
            return None
        with torch.no_grad():
            return self.features(mixture)

    def _autocast(self, mixture: Tensor) -> torch.autocast:
        return torch.autocast(mixture.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _part(feature: Tensor, mixture: Tensor, part: tuple[slice, slice]) -> Tensor:
    """The part of a map of the mixture's features, each of whose pixels stands for 1 to 32 of the mixture's."""
    scales = (
        2 ** round(math.log2(side / count)) for side, count in zip(mixture.shape[2:], feature.shape[2:], strict=True)
    )
    rows, columns = (slice(p.start // s, -(-p.stop // s)) for p, s in zip(part, scales, strict=True))
    return feature[:, :, rows, columns].contiguous(memory_format=torch.channels_last)


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
    features = build_features(network.features, options.vgg_weights)
    kind = options.perceptual if options.lambda_vgg and options.perceptual != "none" else None
    perceptual = features if kind == network.features else build_features(kind, options.vgg_weights)
    losses = importlib.import_module(f"dereflect.models.{options.loss}")
    weights = (options.lambda_vgg, options.lambda_rec, options.lambda_excl, options.lambda_mse, options.lambda_l1)
    loss = losses.ReflectionLoss(perceptual if kind else None, *weights, options.perceptual)
    return DSRNetModel(network, features, loss, bf16)
