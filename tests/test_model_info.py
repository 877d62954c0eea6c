"""Costs and receptive fields of networks, held against hand counts and real tensors."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dereflect.models.arch import create_model
from dereflect.models.arch.blocks import MuGI, MuGIM2
from dereflect.models.arch.dsrnet import DSRNet
from dereflect.models.vgg import Vgg19
from dereflect.tools import model_info
from dereflect.tools.inspection import field
from dereflect.tools.inspection.costs import costs, kept_bytes
from dereflect.util import program
from dereflect.util.run import checkpoint


@pytest.fixture(scope="module")
def found():
    return {name: costs(name, 64, 48, 2) for name in ("dsrnet_s", "mdsrnet_s")}


def test_parameters_are_the_published_ones(found):
    assert found["dsrnet_s"].parameters == 9_871_590
    assert found["mdsrnet_s"].parameters == sum(p.numel() for p in create_model("mdsrnet_s").parameters())


def test_parts_are_all_of_it(found):
    for model in found.values():
        assert sum(part.parameters for part in model.modules) == model.parameters
        assert sum(part.forward for part in model.modules) == model.forward
        assert [part.forward for part in model.modules] == sorted((p.forward for p in model.modules), reverse=True)
    deeper = costs("dsrnet_s", 64, 48, 4)
    assert len(deeper.modules) > len(found["dsrnet_s"].modules)
    assert sum(part.forward for part in deeper.modules) == deeper.forward == found["dsrnet_s"].forward


def test_flops_are_those_counted_by_hand(found):
    parts = {part.name: part for part in found["dsrnet_s"].modules}
    assert parts["head"].forward == 2 * 2 * 3 * 32 * 9 * 64 * 48, "both streams, 32 to 3 channels, 3x3"
    c, pixels, streams = 256, 64 * 48 // 64, 2
    dense = 2 * pixels * streams * (2 * c * c + c * c + 2 * c * c + c * c)  # expand, project, twice
    depthwise = 2 * pixels * streams * 2 * c * 9
    attention = 2 * streams * c * c
    assert parts["unet.middle"].forward == 4 * (dense + depthwise + attention)


def test_the_scan_is_counted(found):
    """M2DSRNet has Mamba where DSRNet has attention: what is more is the layer's own arithmetic."""
    more = {
        part.name: part.forward - other.forward
        for part, other in zip(
            sorted(found["mdsrnet_s"].modules, key=lambda part: part.name),
            sorted(found["dsrnet_s"].modules, key=lambda part: part.name),
            strict=True,
        )
    }
    assert more["head"] == 0 and more["pyramid.lateral"] == 0
    c, steps, n = 256, 2 * 64 * 48 // 64, 16
    d, rank = 2 * c, c // 16
    products = 2 * steps * (c * 2 * d + d * (rank + 2 * n) + rank * d + d * c)
    scan = steps * d * (7 * n + 1 + 2 + 5)
    attention = 2 * 2 * c * c
    short = 2 * 2 * d * 4 * (steps // 2 + 3)  # the causal convolution, padded by three steps
    assert more["unet.middle"] == 4 * (products + scan - attention + short)


def test_cost_is_proportional_to_pixels(found):
    small, large = found["dsrnet_s"], costs("dsrnet_s", 128, 96, 1)
    assert large.forward / small.forward == pytest.approx(4, rel=1e-3)
    assert large.kept / small.kept == pytest.approx(4, rel=1e-2)
    assert large.vgg / small.vgg == 4


@pytest.mark.parametrize("name", ["dsrnet_s", "mdsrnet_s"])
def test_kept_memory_is_what_real_tensors_keep(name, found):
    network = create_model(name)
    image = torch.rand(1, 3, 64, 48)
    features = Vgg19("random")(image)
    with kept_bytes(network) as kept:
        network(image, features)
    assert kept() == pytest.approx(found[name].kept, rel=0.01)


def test_kept_memory_counts_a_storage_once_and_no_parameters():
    layer = nn.Linear(10, 10, bias=False)
    x = torch.zeros(7, 10, requires_grad=True)
    with kept_bytes(layer) as kept:
        y = layer(x)  # keeps x and the weight
        _ = (y * x.view(7, 10)).sum()  # keeps y and x
    assert kept() == 2 * 7 * 10 * 4


def small(block) -> nn.Module:
    """A network of few blocks of a kind, whose residual scales are 0."""
    return DSRNet(width=16, encoder=(1,), middle=1, decoder=(1,), split=True, block=block, pyramid_block=block).eval()


def test_a_fresh_network_sees_only_what_its_convolutions_see():
    values = field.receptive_field(small(MuGI), "random", 64, 1, hold_features=True)
    assert values[28:37, 28:37].sum() == pytest.approx(values.sum()) and values[32, 32] > 0
    through_vgg = field.receptive_field(small(MuGI), "random", 64, 1)
    assert through_vgg[:20].sum() > 0


def test_attention_sees_everything_and_mamba_what_came_before():
    seen = {}
    for block in (MuGI, MuGIM2):
        network = field.scaled_at_random(small(block), 0.5)
        seen[block] = field.receptive_field(network, "random", 64, 1, hold_features=True)
    assert (seen[MuGI] > 0).all()
    assert (seen[MuGIM2][:8] > 0).all() and (seen[MuGIM2][56:] == 0).all()


def test_prepared_networks_have_random_scales_and_are_the_same_every_time():
    a, b = (field.prepared("dsrnet_s", None, 0.5).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    scales = torch.cat([value.flatten() for name, value in a.items() if name.endswith((".a.0", ".a.1", ".b.0"))])
    assert scales.std().item() == pytest.approx(0.5, rel=0.05)


def test_radius_and_halves():
    values = np.zeros((32, 32))
    values[16, 16], values[16, 19], values[6, 16] = 5, 4, 1
    assert [field.radius(values, share) for share in (0.5, 0.9, 0.99)] == [0, 3, 10]
    assert field.halves(values) == (0.1, 0)


def test_the_program(tmp_path, capsys):
    picture = tmp_path / "reach.png"
    command = ["dsrnet_s", "mdsrnet_s", "--size", "60", "48", "--receptive_field", str(picture)]
    assert program.run(model_info.main, [*command, "--field_size", "30", "--images", "1"]) == 0
    told = capsys.readouterr().out
    assert "9,871,590" in told and "64 x 48 pixels" in told and "32 x 32 pixels" in told
    assert "random residual scales, std 0.5" in told
    width, height = Image.open(picture).size
    assert width > 1.2 * height and len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 50


def test_a_checkpoint_decides_what_is_seen(tmp_path, capsys):
    network = create_model("dsrnet_s")
    state = network.state_dict() | {"head.weight": torch.zeros_like(network.head.weight)}
    checkpoint.save({"network": state}, tmp_path / "zero.pt")
    picture = tmp_path / "reach.png"
    command = ["dsrnet_s", "--size", "16", "16", "--receptive_field", str(picture), "--field_size", "32"]
    assert program.run(model_info.main, [*command, "--checkpoint", str(tmp_path / "zero.pt")]) == 2
    assert "gradient is 0" in capsys.readouterr().err and not picture.exists()
    checkpoint.save({"network": network.state_dict()}, tmp_path / "fresh.pt")
    assert program.run(model_info.main, [*command, "--checkpoint", str(tmp_path / "fresh.pt"), "--images", "1"]) == 0
    assert "fresh.pt" in capsys.readouterr().out
    assert math.prod(Image.open(picture).size) > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dsrnet_xl"], "dsrnet_s"),
        (["dsrnet_s", "mdsrnet_s", "--checkpoint", "x.pt", "--receptive_field", "y.png"], "single MODEL"),
        (["dsrnet_s", "--checkpoint", "x.pt"], "--receptive_field"),
        (["dsrnet_s", "--size", "1000000000", "1000000000"], "1000000000 is above 1048576 pixels"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, told, capsys):
    try:
        status = program.run(model_info.main, arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
