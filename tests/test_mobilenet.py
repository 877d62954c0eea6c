"""MobileNetV2 as features and as perceptual loss, and the head that leaves no dot pattern."""

import numpy as np
import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.models.arch.head import ColourHead, DetailHead
from dereflect.models.features import CHANNELS, build_features
from dereflect.models.losses import PerceptualLoss
from dereflect.models.mobilenet import MobileNetV2


@pytest.fixture(scope="module")
def mobilenet():
    return MobileNetV2()


def test_maps(mobilenet):
    image = torch.rand(2, 3, 80, 48, generator=torch.Generator().manual_seed(0))
    maps = mobilenet(image)
    assert [m.shape[1] for m in maps] == list(CHANNELS["mobilenet"]) == [24, 32, 96, 320]
    assert [tuple(m.shape[2:]) for m in maps] == [(20, 12), (10, 6), (5, 3), (3, 2)]
    assert all(0.1 < m.std() < 3 for m in maps)
    assert not any(p.requires_grad for p in mobilenet.parameters()) and not mobilenet.train().training


def test_same_padding_is_tensorflows(mobilenet):
    # A stride of 2 over an even size pads one row and column, at the end.
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = mobilenet.first(x)
    wanted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (0, 1, 0, 1)), mobilenet.first.weight, mobilenet.first.bias, stride=2
    ).clamp(0, 6)
    torch.testing.assert_close(found, wanted)


def test_weights_are_those_of_a_trained_network(mobilenet):
    """Edges and a flat grey image give other features; random weights would tell them apart far less at the end."""
    flat = torch.full((1, 3, 64, 64), 0.5)
    stripes = flat.clone()
    stripes[..., ::8] = 1.0
    drawn = MobileNetV2(None)

    def distance(network):
        one, two = network(flat)[-1].flatten(), network(stripes)[-1].flatten()
        return (one - two).norm() / (one.norm() + two.norm())

    assert distance(mobilenet) > 0.3 > distance(drawn)


def test_as_perceptual_loss(mobilenet):
    loss = PerceptualLoss(mobilenet, "mobilenet")
    target = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert loss(target, target) == 0
    estimate = (target + 0.1).requires_grad_()
    loss(estimate, target).backward()
    assert estimate.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["dsrnet_mobile_xs", "madsrnet_xs", "madsrnet_half_xs", "madsrnet80_xs"])
@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
def test_networks_start_as_the_identity(name, size):
    network = create_model(name).eval()
    mixture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = build_features(network.features, "random")(mixture)
        transmission, reflection, residue = network(mixture, features)
    assert torch.equal(transmission, mixture) and not reflection.any() and not residue.any()


def pattern(picture: torch.Tensor, shuffle: int) -> float:
    """The share of a picture's deviation from its mean that repeats every `shuffle` pixels."""
    spectrum = np.abs(np.fft.fft2(picture.numpy() - picture.mean().item())) ** 2
    step = picture.shape[0] // shuffle
    return float(spectrum[::step, ::step].sum() / spectrum.sum())


def test_detail_head_has_no_dot_pattern():
    torch.manual_seed(0)
    features, mixture = torch.randn(1, 16, 1, 1).expand(2, 16, 16, 16), torch.full((1, 3, 64, 64), 0.5)
    detail, plain = DetailHead(16, 4, 8), ColourHead(16, 4)
    torch.nn.init.normal_(detail.colour.weight)
    with torch.no_grad():
        smooth, dotted = (head(features, mixture)[0, 0, 8:-8, 8:-8] for head in (detail, plain))
    assert smooth.std() < 1e-5
    assert dotted.std() > 0.01 and pattern(dotted, 4) > 0.9
