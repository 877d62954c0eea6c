"""The losses of DSRNet (ICCV 2023, section 3.4): each one a function, and their weighted sum.

All are computed in fp32 whatever the network's precision; only VGG19 itself runs in autocast's type.
Images are (B, 3, H, W), around [0, 1].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VGG_TERM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along height and width: (B, C, H-1, W) and (B, C, H, W-1)."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def pixel_loss(estimate: Tensor, target: Tensor, lambda_mse: float = 0.3) -> Tensor:
    """lambda_mse * mean squared error + 0.6 * mean absolute error of the gradients."""
    difference = estimate - target
    # Differences are linear: the gradients' difference is the difference's gradient.
    vertical, horizontal = gradients(difference)
    return lambda_mse * difference.square().mean() + 0.6 * (vertical.abs().mean() + horizontal.abs().mean())


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
    """Weighted mean absolute differences of the five VGG19 maps of two images.

    Args:
        vgg: gives the maps of an image normalised with ImageNet's mean and standard deviation.
    """

    def __init__(self, vgg: nn.Module):
        super().__init__()
        self.vgg = vgg
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Scalar; no gradient flows to the target."""
        with torch.no_grad():
            wanted = self.vgg((target - self.mean) / self.std)
        maps = self.vgg((estimate - self.mean) / self.std)
        return sum(
            weight * F.l1_loss(ours.float(), theirs.float())
            for weight, ours, theirs in zip(VGG_TERM_WEIGHTS, maps, wanted, strict=True)
        )


class ReflectionLoss(nn.Module):
    """The terms whose sum is minimised.

    Args:
        vgg: as of `PerceptualLoss`; None where that term is left out.
        lambda_vgg: weight of the perceptual term; 0 leaves it out.
        lambda_rec: weight of the reconstruction term.
        lambda_excl: weight of the exclusion term.
        lambda_mse: weight of the mean squared error in the pixel terms.
    """

    def __init__(
        self,
        vgg: nn.Module | None,
        lambda_vgg: float = 0.01,
        lambda_rec: float = 0.2,
        lambda_excl: float = 1.0,
        lambda_mse: float = 0.3,
    ):
        super().__init__()
        self.perceptual = PerceptualLoss(vgg) if lambda_vgg else None
        self.lambda_vgg = lambda_vgg
        self.lambda_rec = lambda_rec
        self.lambda_excl = lambda_excl
        self.lambda_mse = lambda_mse

    def forward(
        self,
        transmission: Tensor,
        reflection: Tensor,
        residue: Tensor,
        mixture: Tensor,
        target_t: Tensor,
        target_r: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted terms t_pixel, r_pixel, vgg (where it has a weight), exclusion and reconstruction, fp32 scalars."""
        perceptual = {}
        if self.perceptual:  # under autocast, as the network itself
            perceptual["vgg"] = self.lambda_vgg * self.perceptual(transmission, target_t)
        with torch.autocast(mixture.device.type, enabled=False):
            t, r, rest = transmission.float(), reflection.float(), residue.float()
            return {
                "t_pixel": pixel_loss(t, target_t, self.lambda_mse),
                "r_pixel": pixel_loss(r, target_r, self.lambda_mse),
                **perceptual,
                "exclusion": self.lambda_excl * exclusion_loss(t, r),
                "reconstruction": self.lambda_rec * F.l1_loss(t + r + rest, mixture),
            }
