"""Networks and blocks: against the published implementation's numbers and against a plain second one."""

import json

import numpy as np
import pytest
import torch

from dereflect.models.arch import create_model, list_models
from dereflect.models.arch.blocks import NAF, MuGI, MuGIM, MuGIM2, MuGIMA, MuGIMG
from dereflect.models.arch.dsrnet import DSRNet
from dereflect.models.arch.fused import mutual_gate
from dereflect.models.arch.lrm import LearnableResidue
from dereflect.models.arch.plain import plain_forward
from dereflect.models.dsrnet_model_sirs import DSRNetModel, build
from dereflect.models.losses import ReflectionLoss
from dereflect.models.mobilenet import MobileNetV2
from dereflect.models.vgg import Vgg19
from dereflect.models.weights import load_weights, translate
from dereflect.options import parse_train
from dereflect.tools.inspection.costs import costs, kept_bytes
from tests.golden.fill import fill, image, pyramid, rng
from tests.helpers import GOLDEN, golden, published_state, relative_error

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
PARAMETERS = {
    "dsrnet_s": 9_871_590,
    "dsrnet_m": 53_553_830,
    "dsrnet_l": 124_602_022,
    "dsrnet_l_nature": 123_667_622,
    "mdsrnet_l": 209_067_942,
    "mxdsrnet_l": 213_050_598,
    "mgdsrnet_l": 340_611_750,
    "mdsrnet_v1_l": 262_450_854,
}
NETWORKS = sorted(path.stem.removeprefix("network_") for path in GOLDEN.glob("network_*.npz"))


def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng(name).standard_normal(shape).astype(np.float32))


def fill_published(module: torch.nn.Module, names: list[str], prefix: str = "") -> None:
    """Give a part of a network the golden weights; `names` are its parameters' published ones."""
    own = dict(module.named_parameters())
    for name in names:
        ours = translate(prefix + name).removeprefix("residue.")
        own.pop(ours).data.copy_(torch.from_numpy(fill(prefix + name, tuple(module.get_parameter(ours).shape))))
    assert not own, f"without golden weights: {sorted(own)}"


def tiny(**settings) -> DSRNet:
    """A small network whose residual steps do something."""
    return with_scales(DSRNet(16, (1, 1), 1, (1, 1), **{"split": True, **settings}))


def with_scales(net: torch.nn.Module) -> torch.nn.Module:
    """The network with random residual scales, which a fresh one has at 0."""
    for parameter in net.parameters():
        if parameter.shape[2:] == (1, 1) and parameter.shape[0] == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def inputs(height: int = 32, width: int = 48, batch: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    features = [torch.from_numpy(f) for f in pyramid("feats", height, width, batch)]
    return torch.from_numpy(image("image", height, width, batch)), features


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_published_one(name):
    model, size = name.rsplit("_", 1)
    height, width = map(int, size.split("x"))
    expected = golden(f"network_{name}")
    with torch.device("meta"):  # without drawing weights that are replaced at once
        net = create_model(model)
    load_weights(net.to_empty(device="cpu"), published_state(SHAPES[model]))
    mixture, features = inputs(height, width, len(expected["t"]))
    outputs = net(mixture, features)
    for key, output in zip(("t", "r", "rr"), outputs, strict=True):
        assert relative_error(output, expected[key]) < 2e-4, key
    weights = [normal(f"grad_{key}", outputs[0].shape) for key in ("t", "r", "rr")]
    sum((output * weight).mean() for output, weight in zip(outputs, weights, strict=True)).backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in net.named_parameters()}
    assert len(norms) == len(expected["grad_names"])
    for published, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True):
        assert norms[translate(str(published))] == pytest.approx(norm, rel=1e-3, abs=1e-7), published


@pytest.mark.parametrize("scales", ["shared", "split"])
@pytest.mark.parametrize(
    ("kind", "block"), [("mugi", MuGI), ("mugim2", MuGIM2), ("mugim_v1", MuGIM), ("mugimg", MuGIMG)]
)
def test_block_equals_published_one(kind, block, scales):
    expected = golden(f"block_{kind}_{scales}")
    block = block(16, split=scales == "split")
    fill_published(block, [str(name) for name in expected["grad_names"]])
    x, y = (normal(name, (2, 16, 8, 12)).requires_grad_() for name in "lr")
    out = block(torch.cat([x, y])).chunk(2)
    sum((o * normal(f"grad_{i}", o.shape)).sum() for i, o in enumerate(out)).backward()
    assert relative_error(out[0], expected["out_0"]) < 1e-4
    assert relative_error(out[1], expected["out_1"]) < 1e-4
    assert relative_error(x.grad, expected["grad_in_0"]) < 1e-4
    assert relative_error(y.grad, expected["grad_in_1"]) < 1e-4
    norms = {name: parameter.grad.norm().item() for name, parameter in block.named_parameters()}
    assert len(norms) == len(expected["grad_names"])
    for published, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True):
        assert norms[translate(str(published))] == pytest.approx(norm, rel=1e-4), published


def test_residue_module_equals_published_one():
    expected = golden("lrm")
    module = LearnableResidue(8)
    names = [n.removeprefix("lrm.") for n in SHAPES["dsrnet_s"] if n.startswith("lrm.") and "seq_r" not in n]
    fill_published(module, names, "lrm.")
    streams = torch.cat([normal(name, (2, 8, 10, 12)) for name in "lr"])
    assert relative_error(module(streams), expected["out"]) < 1e-4


@pytest.mark.parametrize("name", list_models())
def test_named_model(name):
    net = create_model(name)
    if name in PARAMETERS:
        assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    mixture, features = inputs(16, 32, 1)
    with torch.no_grad():
        outputs = net(mixture, MobileNetV2()(mixture) if net.features == "mobilenet" else features)
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 16, 32)] * 3
    assert all(torch.isfinite(o).all() for o in outputs)
    assert outputs[2].abs().max() < 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("block", [MuGI, MuGIM, MuGIM2, MuGIMA, MuGIMG, NAF])
def test_without_a_gradient_nothing_goes_through_autograd(block, backend, monkeypatch):
    """The same values by the operators alone."""
    monkeypatch.setenv("PASSES_BACKEND", backend)
    block = with_scales(block(16))
    x = normal("x", (2, 16, 8, 12))
    expected = block(x).detach().numpy()

    def refuse(*_):
        raise AssertionError("an autograd function")

    monkeypatch.setattr(torch.autograd.Function, "apply", refuse)
    with pytest.raises(AssertionError, match="an autograd function"):
        block(x)
    for no_gradient in (torch.no_grad(), torch.inference_mode()):
        with no_gradient:
            assert relative_error(block(x), expected) < 1e-6


@pytest.mark.parametrize("name", ["dsrnet_xs", "mdsrnet_xs"])
def test_small_enough_for_a_laptop(name):
    found = costs(name, 224, 224, depth=1)
    assert found.parameters <= 2_000_000
    assert found.forward <= 8e9 and found.vgg == 0


def test_a_stem_of_its_own_stands_in_for_vgg():
    """Features of the number and sizes that the pyramid wants, learnt with the rest."""
    net = tiny(stem=(8, 16, 12), neck=8, shuffle=4)
    assert net.features is None and tiny().features == "vgg19"
    mixture = inputs(32, 48, 2)[0]
    small = torch.nn.functional.pixel_unshuffle(mixture, 4)
    assert [tuple(v.shape) for v in net.stem(small)] == [(2, 8, 8, 12), (2, 16, 4, 6), (2, 12, 2, 3)]
    outputs = net(mixture)
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 32, 48)] * 3
    sum(o.square().sum() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.stem.parameters())


def test_residual_and_no_residue():
    net = tiny(stem=(8, 16), neck=8, residual=True, residue=None)
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.zeros_(net.head.bias)
    mixture = inputs(16, 32, 1)[0]
    t, r, residue = net(mixture)
    assert torch.equal(t, mixture) and not r.any() and not residue.any()


def test_trains_without_vgg(tmp_path):
    """A network with its own stem and no perceptual loss never asks for the weights, which may not be there."""
    options = parse_train(
        f"--base_dir {tmp_path} --inet dsrnet_xs --lambda_vgg 0 --lambda_excl 0.5 --vgg_weights imagenet".split()
    )
    model = build(options, bf16=False)
    assert model.features is None
    batch = [torch.from_numpy(image(name, 32, 32, 2)) for name in "abc"]
    terms = model(*batch)
    assert set(terms) == {"t_pixel", "r_pixel", "exclusion", "reconstruction"}
    whole = ReflectionLoss(None, lambda_vgg=0)(*model.network(batch[0]), *batch)
    assert terms["exclusion"].item() == pytest.approx(0.5 * whole["exclusion"].item())
    assert [tuple(o.shape) for o in model.predict(batch[0][..., :30, :27])] == [(2, 3, 30, 27)] * 3


def test_every_published_parameter_has_a_place():
    for name in SHAPES:
        with torch.device("meta"):
            net = create_model(name)
        assert {translate(n) for n in SHAPES[name]} == set(net.state_dict())


def test_unknown_model_lists_those_there_are():
    with pytest.raises(KeyError, match="dsrnet_s"):
        create_model("dsrnet_xxl")


@pytest.mark.parametrize("split", [True, False])
def test_equals_plain_network(split):
    net = tiny(split=split)
    mixture, features = inputs(16, 32, 1)
    results = []
    for forward in (net, lambda *args: plain_forward(net, *args)):
        net.zero_grad()
        t, r, residue = forward(mixture, features)
        (t.square().mean() + (r * t).mean() + residue.exp().mean()).backward()
        results.append([t, r, residue, *(p.grad.clone() for p in net.parameters())])
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-7


def test_gradients_of_blocks_are_derivatives():
    for block in (MuGI(4, split=True), MuGI(4, split=False), NAF(4)):
        block.double()
        for scale in (*block.a, *block.b):
            torch.nn.init.normal_(scale)
        x = torch.randn(4, 4, 3, 5, dtype=torch.double, requires_grad=True)
        parameters = dict(block.named_parameters())

        def run(x, *values, block=block, names=tuple(parameters)):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_streams_may_be_swapped():
    """With equal scales, exchanging the streams exchanges the results: the weights are shared."""
    block = MuGI(8, split=False)
    for scale in (*block.a, *block.b):
        torch.nn.init.constant_(scale, 0.5)
    x, y = torch.randn(2, 3, 8, 6, 6)
    there, back = block(torch.cat([x, y])), block(torch.cat([y, x]))
    torch.testing.assert_close(there, torch.cat(back.chunk(2)[::-1]))


def test_mutual_gate():
    d = torch.randn(4, 6, 5, 7, requires_grad=True)
    (x1, x2), (y1, y2) = (stream.chunk(2, 1) for stream in d.chunk(2))
    expected = torch.cat([x1 * y2, y1 * x2])
    torch.testing.assert_close(mutual_gate(d), expected)
    weight = torch.randn_like(expected)
    ours, plain = (torch.autograd.grad((out * weight).sum(), d)[0] for out in (mutual_gate(d), expected))
    torch.testing.assert_close(ours, plain)


def test_bf16_is_near_fp32():
    net = tiny()
    mixture, features = inputs()
    exact = net(mixture, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = net(mixture, features)
        sum(o.float().square().mean() for o in rounded).backward()
    for a, b in zip(rounded, exact, strict=True):
        # 8 bits of mantissa, some 30 roundings one after the other
        assert (a.float() - b).norm() / b.norm() < 0.05
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())


def test_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny()(torch.rand(1, 3, 20, 32), [])


def bytes_kept(net: DSRNet, forward) -> int:
    """What `forward()` keeps for its backward pass beside the network's parameters."""
    with kept_bytes(net) as kept:
        forward()
    return kept()


def test_keeps_less_for_the_backward_pass_than_the_plain_network():
    """Bytes kept between forward and backward: at most 0.6 of the plain network's."""

    net = tiny()
    mixture, features = inputs(96, 96, 1)
    ours = bytes_kept(net, lambda: net(mixture, features))
    net.to(memory_format=torch.contiguous_format)
    assert ours < 0.6 * bytes_kept(net, lambda: plain_forward(net, mixture, features))


def few_blocks() -> DSRNet:
    """A network with all parts, but only a block of each kind that DSRNet and M2DSRNet have: MuGI, MuGIM2 and NAF."""
    net = DSRNet(
        *(16, (1,), 1, (0,)),
        split=True,
        block=lambda channels, split: (MuGI if channels == 16 else MuGIM2)(channels, split),
        pyramid_block=lambda channels, split: torch.nn.Identity(),
        residue=(1, 1),
    )
    return with_scales(net)


def step_model(net: DSRNet, bf16: bool) -> tuple[DSRNetModel, list[torch.Tensor]]:
    """All that a training step needs, and a batch for it."""
    vgg = Vgg19("random")
    model = DSRNetModel(net, vgg, ReflectionLoss(vgg), bf16)
    return model, [torch.from_numpy(image(name, 32, 32, 2)) for name in "abc"]


def losses_and_gradients(model, batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.network.zero_grad()
    terms = model(*batch)
    sum(terms.values()).backward()
    return {k: v.item() for k, v in terms.items()}, {k: p.grad.clone() for k, p in model.network.named_parameters()}


@pytest.mark.parametrize(("bf16", "backend"), [(True, "aot_eager"), (False, "eager")])
def test_the_whole_step_is_one_graph(bf16, backend, monkeypatch):
    """Traced without a break, with the same results; without the compiler's code, which takes minutes to make.

    The backend "aot_eager" also traces the backward pass.
    """
    monkeypatch.setenv("PASSES_BACKEND", "reference")  # what is traced
    model, batch = step_model(few_blocks(), bf16)
    losses, gradients = losses_and_gradients(model, batch)
    torch._dynamo.reset()
    model.compile(fullgraph=True, dynamic=False, backend=backend)
    found, others = losses_and_gradients(model, batch)
    precision = 2e-2 if bf16 else 1e-4  # bf16's 8 bits, rounded at other places
    assert found == pytest.approx(losses, rel=precision)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 5 * precision * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("block", [MuGI, MuGIMA])
def test_exported_with_any_height_and_width(block):
    """One program of torch.export for all sizes, with the network's very numbers at another than the example's."""
    net = with_scales(DSRNet(16, (1,), 1, (1,), split=True, block=block, stem=(16, 4))).eval()
    sides = {axis: 16 * torch.export.Dim(name, min=2, max=64) for axis, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(net, (torch.rand(1, 3, 64, 64),), dynamic_shapes=(sides,)).module()
    mixture = torch.rand(1, 3, 96, 48)
    with torch.no_grad():
        for found, expected in zip(program(mixture), net(mixture), strict=True):
            torch.testing.assert_close(found, expected)


def test_every_block_is_one_graph():
    """All kinds of blocks, one after the other, forward and backward in fp32."""
    net = with_scales(torch.nn.Sequential(*(block(16) for block in (MuGI, NAF, MuGIM2, MuGIM, MuGIMG))))
    x = normal("x", (2, 16, 8, 8)).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    results = []
    for run in (net, torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")):
        net.zero_grad()
        y = run(x)
        y.square().mean().backward()
        results.append((y.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(*(y for y, _ in results), rtol=1e-5, atol=1e-5)
    for plain, compiled in zip(*(gradients for _, gradients in results), strict=True):
        assert (compiled - plain).norm() <= 1e-4 * plain.norm() + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("block", [MuGI, MuGIM2, MuGIM, MuGIMG])
def test_compiled_block(block):
    """Code of the compiler itself, forward and backward."""
    torch._dynamo.reset()
    net = block(16)
    for scale in (*net.a, *net.b):
        torch.nn.init.normal_(scale)
    x = normal("x", (2, 16, 8, 8)).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (net, torch.compile(net, fullgraph=True, dynamic=False)):
        net.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(*(y for y, _ in results), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(gradients for _, gradients in results), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [MuGI, MuGIM2])
def test_checkpointed_activations(block):
    """The very same numbers, and less than half as much kept for the backward pass."""

    model, batch = step_model(tiny(block=block), bf16=False)
    net, features = model.network, model.features(batch[0])
    plain, before = losses_and_gradients(model, batch), bytes_kept(net, lambda: net(batch[0], features))
    net.checkpoint_activations()
    checkpointed, after = losses_and_gradients(model, batch), bytes_kept(net, lambda: net(batch[0], features))
    assert checkpointed[0] == plain[0]
    assert all(torch.equal(checkpointed[1][name], gradient) for name, gradient in plain[1].items())
    assert after < 0.5 * before
