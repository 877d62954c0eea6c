"""Effective receptive fields (Luo et al. 2016, "Understanding the Effective Receptive Field")."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from dereflect.models.arch import create_model
from dereflect.models.arch.blocks import StreamScale
from dereflect.models.features import build_features
from dereflect.models.weights import load_weights
from dereflect.util.errors import UserError
from dereflect.util.images import write_image
from dereflect.util.progress import track

DECADES = 8
"""Powers of ten that the picture shows."""

_SEED = 2018
_PANEL = 384  # pixels of a model's picture, at least
_MARGIN, _TITLE, _BAR = 16, 56, 40


def prepared(name: str, checkpoint: Path | None, scales: float) -> nn.Module:
    """A network whose blocks have an effect: with a checkpoint's weights, or with random residual scales.

    Args:
        name: of a model of `models.arch`.
        checkpoint: its weights.
        scales: standard deviation of the random scales.
    """
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        network = create_model(name)
        if checkpoint:
            load_weights(network, checkpoint)
        else:
            scaled_at_random(network, scales)
    return network.eval().requires_grad_(False)


def scaled_at_random(network: nn.Module, std: float) -> nn.Module:
    """Give the network normally distributed residual scales; in a new network they are 0."""
    for module in network.modules():
        if isinstance(module, StreamScale):
            for parameter in module:
                nn.init.normal_(parameter, std=std)
    return network


def receptive_field(
    network: nn.Module, vgg_weights: str, size: int, images: int, hold_features: bool = False
) -> np.ndarray:
    """The absolute gradient of the centre pixel's transmission with respect to the mixture, (size, size): the sum over
    the colours, the mean over images of uniform noise.

    Args:
        network: the result of `prepared`.
        vgg_weights: the weights of VGG19.
        size: side of the images, a multiple of 16.
        images: number of images.
        hold_features: leave out the gradient through VGG19's features, whose reach hides the network's own.

    Raises:
        UserError: the gradient is 0 or not finite.
    """
    frozen = build_features(network.features, vgg_weights)
    noise = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(_SEED))
    total = np.zeros((size, size))
    for image in track(noise, "receptive field", images):
        image = image[None].requires_grad_()
        features = frozen(image.detach() if hold_features else image) if frozen else None
        transmission = network(image, features)[0]
        (gradient,) = torch.autograd.grad(transmission[..., size // 2, size // 2].sum(), image)
        total += gradient[0].abs().sum(0).double().numpy() / images
    if not np.isfinite(total).all() or not total.any():
        raise UserError("the gradient is 0 or not finite; try another --scales or --checkpoint")
    return total


def radius(field: np.ndarray, share: float) -> float:
    """The radius in pixels, around the centre, of the circle that holds this share of the sum."""
    distance = _from_centre(field)
    order = np.argsort(distance, axis=None)
    within = np.cumsum(field.ravel()[order]) >= share * field.sum()
    return float(distance.ravel()[order][np.argmax(within)])


def halves(field: np.ndarray) -> tuple[float, float]:
    """The shares of the rows above and below the centre: a scan along the rows sees only earlier pixels."""
    middle = len(field) // 2
    return field[:middle].sum() / field.sum(), field[middle + 1 :].sum() / field.sum()


def draw(fields: dict[str, np.ndarray], origin: str, path: Path) -> None:
    """Draw the fields side by side, each relative to its own largest value.

    Raises:
        UserError: the file can't be written.
    """
    panels = [_panel(name, field) for name, field in fields.items()]
    width = sum(panel.width + _MARGIN for panel in panels) + _MARGIN
    picture = Image.new("RGB", (width, panels[0].height + _BAR + 2 * _MARGIN), "white")
    for number, panel in enumerate(panels):
        picture.paste(panel, (_MARGIN + number * (panel.width + _MARGIN), _MARGIN))
    _add_bar(picture, origin)
    write_image(path, np.asarray(picture))


def _panel(name: str, field: np.ndarray) -> Image.Image:
    """A model's picture under its name."""
    logarithm = np.log10(np.maximum(field / field.max(), 10.0**-DECADES))
    colours = _coloured(1 + logarithm / DECADES)
    side = len(field) * max(1, -(-_PANEL // len(field)))
    image = Image.new("RGB", (side, side + _TITLE), "white")
    image.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (0, _TITLE))
    pen = ImageDraw.Draw(image)
    pen.text((0, 0), name, "black", ImageFont.load_default(22))
    reach = f"half of it within {radius(field, 0.5):.0f} px, 99 % within {radius(field, 0.99):.0f} px"
    pen.text((0, 30), reach, "black", ImageFont.load_default(15))
    return image


def _add_bar(picture: Image.Image, origin: str) -> None:
    """Draw the meaning of the colours along the lower edge."""
    width = min(256, picture.width - 2 * _MARGIN)
    top = picture.height - _BAR - _MARGIN // 2
    ramp = _coloured(np.tile(np.linspace(0, 1, width), (12, 1)))
    picture.paste(Image.fromarray(ramp), (_MARGIN, top))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    pen.text((_MARGIN, top + 16), f"1e-{DECADES}", "black", font)
    pen.text((_MARGIN + width, top + 16), "1 (largest)", "black", font, anchor="ra")
    pen.text((_MARGIN + width + 12, top), origin, "black", font)


def _coloured(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 to (H, W, 3), uint8."""
    return cv2.applyColorMap((values * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[:, :, ::-1]


def _from_centre(field: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(field.shape) - len(field) // 2
    return np.hypot(rows, columns)
