"""The losses of DSRNet (ICCV 2023, section 3.4): each one a function, and their weighted sum.

All are computed in fp32 whatever the network's precision; only VGG19 itself runs in autocast's type.
Images are (B, 3, H, W), around [0, 1].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.models import passes
from dereflect.models.features import CHANNELS, Kind

VGG_TERM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
SLOPES = 0.6  # weight of the gradients in the pixel terms
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along height and width: (B, C, H-1, W) and (B, C, H, W-1)."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def pixel_loss(estimate: Tensor, target: Tensor, lambda_mse: float = 0.3, lambda_l1: float = 0.0) -> Tensor:
    """lambda_mse * mean squared error + lambda_l1 * mean absolute error + 0.6 * that of the gradients.

    On a CPU one pass gives it with its gradient, where compiled passes work (`models.passes`)."""
    backend = passes.chosen_backend(estimate, estimate.dtype)
    if backend and estimate.dtype == torch.float32:
        images = estimate.contiguous(), target.contiguous()
        return passes.pixel_loss(*images, lambda_mse, lambda_l1, SLOPES, backend)[0]
    difference = estimate - target
    # Differences are linear: the gradients' difference is the difference's gradient.
    vertical, horizontal = gradients(difference)
    colours = lambda_mse * difference.square().mean()
    if lambda_l1:
        colours = colours + lambda_l1 * difference.abs().mean()
    return colours + SLOPES * (vertical.abs().mean() + horizontal.abs().mean())


def exclusion_loss(transmission: Tensor, reflection: Tensor, scales: int = 3) -> Tensor:
    """Edges of the two layers should not coincide (Zhang et al. 2018), over `scales` halvings of the image."""
    total = transmission.new_zeros(())
    for scale in range(scales):
        if scale:
            transmission = F.interpolate(transmission, scale_factor=0.5, mode="bilinear")
            reflection = F.interpolate(reflection, scale_factor=0.5, mode="bilinear")
        for of_t, of_r in zip(gradients(transmission), gradients(reflection), strict=True):
            alpha = 2 * of_t.abs().mean() / (of_r.abs().mean() + 1e-6)
            # 2 sigmoid(v) - 1 = tanh(v / 2)
            product = torch.tanh(of_t / 2).square() * torch.tanh(alpha * of_r / 2).square()
            total = total + (product.mean() + 1e-6) ** 0.25
    return total / (2 * scales)


class PerceptualLoss(nn.Module):
    """Weighted mean absolute differences of the feature maps of two images.

    Args:
        network: gives the maps of an image: VGG19, which gets the image normalised with ImageNet's mean and standard
            deviation and five published weights, or MobileNetV2, whose four maps count alike.
        kind: which of them it is.
    """

    def __init__(self, network: nn.Module, kind: Kind = "vgg19"):
        super().__init__()
        self.network, self.kind = network, kind
        self.weights = VGG_TERM_WEIGHTS if kind == "vgg19" else [1 / len(CHANNELS[kind])] * len(CHANNELS[kind])
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Scalar; no gradient flows to the target."""
        with torch.no_grad():
            wanted = self._maps(target)
        maps = self._maps(estimate)
        return sum(
            weight * F.l1_loss(ours.float(), theirs.float())
            for weight, ours, theirs in zip(self.weights, maps, wanted, strict=True)
        )

    def _maps(self, image: Tensor) -> list[Tensor]:
        return self.network((image - self.mean) / self.std if self.kind == "vgg19" else image)


class ReflectionLoss(nn.Module):
    """The terms whose sum is minimised.

    Args:
        features: network of the `PerceptualLoss`; None where that term is left out.
        lambda_vgg: weight of the perceptual term; 0 leaves it out.
        lambda_rec: weight of the reconstruction term.
        lambda_excl: weight of the exclusion term.
        lambda_mse: weight of the mean squared error in the pixel terms.
        lambda_l1: weight of the mean absolute error in the pixel terms.
        perceptual: which network the features are of.
    """

    def __init__(
        self,
        features: nn.Module | None,
        lambda_vgg: float = 0.01,
        lambda_rec: float = 0.2,
        lambda_excl: float = 1.0,
        lambda_mse: float = 0.3,
        lambda_l1: float = 0.0,
        perceptual: Kind = "vgg19",
    ):
        super().__init__()
        self.perceptual = PerceptualLoss(features, perceptual) if features and lambda_vgg else None
        self.lambda_vgg = lambda_vgg
        self.lambda_rec = lambda_rec
        self.lambda_excl = lambda_excl
        self.lambda_mse = lambda_mse
        self.lambda_l1 = lambda_l1

    def forward(
        self,
        transmission: Tensor,
        reflection: Tensor,
        residue: Tensor,
        mixture: Tensor,
        target_t: Tensor,
        target_r: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted terms t_pixel, r_pixel, reconstruction and, where they have a weight, vgg (of whatever features)
        and exclusion, fp32 scalars."""
        perceptual = {}
        if self.perceptual:  # under autocast, as the network itself
            perceptual["vgg"] = self.lambda_vgg * self.perceptual(transmission, target_t)
        with torch.autocast(mixture.device.type, enabled=False):
            t, r, rest = transmission.float(), reflection.float(), residue.float()
            return {
                "t_pixel": pixel_loss(t, target_t, self.lambda_mse, self.lambda_l1),
                "r_pixel": pixel_loss(r, target_r, self.lambda_mse, self.lambda_l1),
                **perceptual,
                **({"exclusion": self.lambda_excl * exclusion_loss(t, r)} if self.lambda_excl else {}),
                "reconstruction": self.lambda_rec * F.l1_loss(t + r + rest, mixture),
            }
