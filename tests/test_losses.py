"""Losses and VGG19, against the published implementation's numbers."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

from dereflect.models import losses
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.losses import ReflectionLoss
from dereflect.models.vgg import CUTS, Vgg19
from dereflect.util.errors import UserError
from tests.golden.fill import fill, image
from tests.helpers import golden, relative_error


@pytest.fixture(scope="module")
def network() -> Vgg19:
    network = Vgg19("random")
    for part in network.slices:
        for number, layer in part.named_children():
            if isinstance(layer, nn.Conv2d):
                shape = tuple(layer.weight.shape)
                layer.weight.copy_(torch.from_numpy(fill(f"features.{number}.weight", shape)) * 2**0.5)
                layer.bias.copy_(torch.from_numpy(fill(f"features.{number}.bias", shape[:1])))
    return network


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    made = {
        name: torch.from_numpy(image(name, 48, 64, 2))
        for name in ("out_t", "out_r", "out_rr", "input", "target_t", "target_r")
    }
    made["out_rr"] = 2 * made["out_rr"] - 1
    for name in ("out_t", "out_r", "out_rr"):
        made[name].requires_grad_()
    return made


def test_terms_and_gradients_equal_published_ones(network, images):
    expected = golden("losses")
    terms = ReflectionLoss(network)(*images.values())
    assert set(terms) == {"t_pixel", "r_pixel", "vgg", "exclusion", "reconstruction"}
    for name, value in terms.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-5), name
    total = sum(terms.values())
    assert total.item() == pytest.approx(float(expected["total"]), rel=1e-5)
    total.backward()
    for ours, theirs in (("out_t", "grad_t"), ("out_r", "grad_r"), ("out_rr", "grad_rr")):
        # The perceptual term's gradient goes through 16 convolutions, whose sums differ in order.
        assert relative_error(images[ours].grad, expected[theirs]) < 1e-4, theirs


def test_weights_of_the_terms(images):
    """Each weight scales its term alone; that of the squares is theirs within the pixel terms."""
    values = [images[name].detach() for name in ("out_t", "out_r", "out_rr", "input", "target_t", "target_r")]
    plain = ReflectionLoss(None, lambda_vgg=0)(*values)
    other = ReflectionLoss(None, lambda_vgg=0, lambda_rec=0.6, lambda_excl=0.5, lambda_mse=1.3)(*values)
    squares = {"t_pixel": (values[0] - values[4]).square().mean(), "r_pixel": (values[1] - values[5]).square().mean()}
    for name, square in squares.items():
        torch.testing.assert_close(other[name], plain[name] + square)
    torch.testing.assert_close(other["exclusion"], plain["exclusion"] / 2)
    torch.testing.assert_close(other["reconstruction"], plain["reconstruction"] * 3)


def test_maps_equal_published_ones(network, images):
    expected = golden("losses")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (losses.IMAGENET_MEAN, losses.IMAGENET_STD))
    maps = network((images["out_t"].detach() - mean) / std)
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    assert [m.shape[3] for m in maps] == [64, 32, 16, 8, 4]
    for i, m in enumerate(maps):
        wanted = float(expected[f"vgg_feature_{i}_mean_abs"])
        if f"vgg_feature_{i}_mean_abs" in expected and m.abs().mean().item() != pytest.approx(wanted, rel=1e-4):
            m = network(images["input"])[i]  # the image as it is, as the pyramid takes it
            assert m.abs().mean().item() == pytest.approx(wanted, rel=1e-4)


def test_terms_are_fp32_under_autocast(network, images):
    exact = ReflectionLoss(network)(*images.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ReflectionLoss(network)(*images.values())
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        tolerance = 0.02 if name == "vgg" else 1e-6  # VGG19 itself runs in bf16
        assert value.item() == pytest.approx(exact[name].item(), rel=tolerance), name


def test_weights_converted_once_give_the_same_bits(network, images):
    """Converting VGG19 to bfloat16 does what autocast does in every pass."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(images["input"])
        model = DSRNetModel(nn.Identity(), copy.deepcopy(network), None, bf16=True)
        assert {parameter.dtype for parameter in model.features.parameters()} == {torch.bfloat16}
        found = model.features(images["input"])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_of_terms(network, images):
    one = ReflectionLoss(network, lambda_vgg=0.01, lambda_rec=0.2)(*images.values())
    two = ReflectionLoss(network, lambda_vgg=0.02, lambda_rec=0.6)(*images.values())
    assert two["vgg"].item() == pytest.approx(2 * one["vgg"].item())
    assert two["reconstruction"].item() == pytest.approx(3 * one["reconstruction"].item())
    assert two["t_pixel"].item() == one["t_pixel"].item()


def test_exclusion_is_least_where_edges_do_not_meet():
    left, right = torch.zeros(2, 1, 3, 32, 32)
    left[..., 4] = right[..., 20] = 1
    assert losses.exclusion_loss(left, right) < losses.exclusion_loss(left, left)


def test_vgg_is_frozen_and_always_in_eval_mode():
    network = Vgg19("random")
    holder = nn.ModuleList([network]).train()
    assert holder.training and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), Vgg19("random").parameters(), strict=True))


def test_vgg_has_the_layers_of_torchvisions():
    layers = [layer for part in Vgg19("random").slices for layer in part]
    assert list(map(repr, layers)) == list(map(repr, make_layers(cfgs["E"])[: CUTS[-1]]))


def test_vgg_reads_torchvision_weights_from_a_file(tmp_path):
    first = Vgg19("random")
    state = {f"features.{k.split('.', 2)[2]}": v + 1 for k, v in first.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg19.pth")
    second = Vgg19(tmp_path / "vgg19.pth")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a + 1, b)
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*not the weights"):
        Vgg19(tmp_path / "other.pth")


def test_weights_that_cannot_be_downloaded_are_told_with_the_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(VGG19_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"vgg19-.*--vgg_weights FILE.*--vgg_weights random"):
        Vgg19("imagenet")
