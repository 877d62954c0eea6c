"""The Mamba layer and image Mamba: golden outputs and gradients, initial values, layouts and precisions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dereflect.models.arch.mamba import DIRECTIONS, ImageMamba
from dereflect.models.scan import Mamba, set_backend
from dereflect.models.scan.backends import why_not
from dereflect.util.optim import parameter_groups
from tests.golden.fill import fill, rng

GOLDEN = Path(__file__).parent / "golden"
needs_numba = pytest.mark.skipif(why_not("cpu", "cpu") is not None, reason="numba is not installed")


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_numba)])
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend(None)


def filled(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(fill(name, tuple(parameter.shape))))
    return module


def check_golden(module, x, golden):
    """Float32 against float32: 1e-4 of the largest entry, as much for the norms of gradients."""
    x.requires_grad_()
    y = module(x)
    (y * torch.from_numpy(rng("grad_0").standard_normal(y.shape)).float()).sum().backward()
    for found, name in ((y, "out_0"), (x.grad, "grad_in_0")):
        expected = torch.from_numpy(golden[name])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name
    norms = {name: parameter.grad.norm().item() for name, parameter in module.named_parameters()}
    assert norms == pytest.approx(dict(zip(golden["grad_names"], golden["grad_norms"], strict=True)), rel=1e-4)


def test_golden_mamba(backend):
    x = torch.from_numpy(rng("x").standard_normal((2, 150, 32))).float()
    check_golden(filled(Mamba(32)), x, np.load(GOLDEN / "mamba_block.npz"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_golden_image_mamba(backend, memory_format):
    x = torch.from_numpy(rng("x").standard_normal((2, 16, 9, 14))).float().to(memory_format=memory_format)
    check_golden(filled(ImageMamba(16)), x, np.load(GOLDEN / "image_mamba.npz"))


def test_layout_of_parameters():
    """Names and shapes of mamba_ssm.Mamba, so that published weights fit."""
    shapes = {name: tuple(p.shape) for name, p in Mamba(40, d_state=8, d_conv=3, expand=3).named_parameters()}
    assert shapes == {
        "A_log": (120, 8),
        "D": (120,),
        "in_proj.weight": (240, 40),
        "conv1d.weight": (120, 1, 3),
        "conv1d.bias": (120,),
        "x_proj.weight": (3 + 16, 120),
        "dt_proj.weight": (120, 3),
        "dt_proj.bias": (120,),
        "out_proj.weight": (40, 120),
    }


def test_initial_values():
    layer = Mamba(64)
    delta = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.9e-3 < delta.min() < 3e-3
    assert 3e-2 < delta.max() < 0.11
    bound = layer.dt_proj.in_features**-0.5
    assert 0.9 * bound < layer.dt_proj.weight.abs().max() <= bound
    torch.testing.assert_close(layer.A_log[5], torch.arange(1.0, 17).log())
    assert torch.equal(layer.D, torch.ones(128))
    spared = {id(p) for p in parameter_groups(layer, 0.01)[1]["params"]}
    names = {name for name, p in layer.named_parameters() if id(p) in spared}
    assert names == {"A_log", "D", "conv1d.bias", "dt_proj.bias"}, "never decayed"
    assert layer.in_proj.weight.abs().max() <= 1 / math.sqrt(64)  # PyTorch's default


def test_causal():
    layer = Mamba(16)
    x = torch.randn(1, 20, 16)
    changed = x.clone()
    changed[:, 12:] += 1
    difference = (layer(x) - layer(changed)).abs().amax((0, 2))
    assert (difference[:12] < 1e-6).all()
    assert (difference[12:] > 1e-6).all()


@pytest.mark.parametrize("order", DIRECTIONS)
def test_orders_are_the_scans_of_turned_images(backend, order):
    """Each direction is the raster scan, with its own parameters, of an image that is turned there and back."""
    layer = filled(ImageMamba(8, order))
    x = torch.randn(2, 8, 5, 6)
    turns = [
        lambda image: image,
        lambda image: image.flip(2, 3),
        lambda image: image.mT,
        lambda image: image.mT.flip(2, 3),
    ]
    back = [*turns[:3], lambda image: image.flip(2, 3).mT]
    expected = 0
    for number in range(DIRECTIONS[order]):
        raster = ImageMamba(8)
        raster.mamba_model.load_state_dict(layer.mamba_model.state_dict())
        if number:
            raster.mamba_model.load_state_dict(layer.others[number - 1].state_dict(), strict=False)
        expected = expected + back[number](raster(turns[number](x)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", DIRECTIONS)
def test_directions_have_parameters_of_their_own(order):
    layer = ImageMamba(8, order)
    layer(torch.randn(1, 8, 5, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    own = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in ImageMamba(8).parameters())
    one = sum(p.numel() for name, p in Mamba(8).named_parameters() if name.split(".")[0] not in {"in_proj", "out_proj"})
    assert own == (DIRECTIONS[order] - 1) * one


@pytest.mark.parametrize("order", DIRECTIONS)
def test_what_a_pixel_sees(order):
    """All of the image in more than one direction; before it in raster order otherwise."""
    layer = filled(ImageMamba(8, order))
    x = torch.randn(1, 8, 5, 6)
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    differs = ((layer(x) - layer(changed)).abs().amax(1)[0] > 1e-6).flatten()
    assert differs[2 * 6 + 3 :].all()
    assert differs[: 2 * 6 + 3].all() == (order != "raster")


@pytest.mark.parametrize("order", DIRECTIONS)
def test_channels_last_stays(order):
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    assert ImageMamba(8, order)(x).is_contiguous(memory_format=torch.channels_last)


def test_autocast(monkeypatch):
    """What has a length may be bfloat16; A, the bias of delta and D reach the scan in float32."""
    from dereflect.models.scan import layer as home

    dtypes = {}
    scan = home.selective_scan

    def spy(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
        tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        dtypes.update({name: t.dtype for name, t in tensors.items()})
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse=reverse)

    monkeypatch.setattr(home, "selective_scan", spy)
    layer = filled(Mamba(32))
    x = torch.randn(2, 50, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A", "D", "delta_bias"}
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 3e-2 * expected.abs().max()  # seven roundings to 2^-9 on the way
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_compiles_into_one_graph():
    """With all four directions, of which the other orders have the first or the first two."""
    layer = filled(ImageMamba(16, "cross"))
    x = torch.randn(1, 16, 4, 5)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(autocast, monkeypatch):
    """Whatever `auto` picks there against the CPU; float32 agrees to 1e-4 without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = filled(ImageMamba(32))
    x = torch.randn(2, 32, 24, 20)
    expected = layer(x)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = layer(x.cuda())
    y.float().sum().backward()
    tolerance = 5e-2 if autocast else 1e-4
    assert (y.float().cpu() - expected).abs().max() < tolerance * expected.abs().max()
    for name, parameter in layer.named_parameters():
        error = (parameter.grad.cpu() - gradients[name]).abs().max()
        assert error < tolerance * gradients[name].abs().max().clamp(min=1e-2), name
