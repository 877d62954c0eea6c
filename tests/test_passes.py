"""The compiled passes between the products: against plain torch in float64, and what they are in a network."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dereflect.models import passes
from dereflect.models.arch import fused, step
from dereflect.models.arch.blocks import NAF, MuGI, MuGIM2
from dereflect.models.passes import backends
from dereflect.tools.inspection.costs import costs

pytest.importorskip("numba")

GATES = ("none", "self", "mutual")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the largest entry; bfloat16: results rounded to 2^-9


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    monkeypatch.delenv("PASSES_BACKEND", raising=False)
    yield
    passes.set_backend(None)


@pytest.fixture
def fresh_choice():
    backends.why_not.cache_clear()
    backends._log_once.cache_clear()
    yield
    backends.why_not.cache_clear()


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def operators(dtype, images=2, height=5, width=7, channels=6, how="mutual") -> dict[str, tuple]:
    """Every operator with its arguments but the backend."""
    rows, gated = images * height * width, channels // 2 if how != "none" else channels
    image = draw(images, height, width, channels, dtype=dtype)
    weight, bias = (draw(channels, *shape).to(torch.promote_types(dtype, torch.float32)) for shape in ((1, 3, 3), ()))
    x, y, added = (draw(rows, channels, dtype=dtype, seed=seed) for seed in range(3))
    statistics = torch.stack([x.mean(1), (x.var(1, correction=0) + 1e-6).rsqrt()], 1).to(weight.dtype)
    found = {
        "norm": (x, 1e-6),
        "norm_backward": (y, x, statistics, added, images),
        "depthwise": (image, weight, bias, how, True),
        "depthwise_backward": (draw(images, height, width, gated, dtype=dtype), image + 1, image, weight, how),
    }
    pictures = [draw(images, 3, max(height, 2), max(width, 2), seed=seed).to(weight.dtype) for seed in range(2)]
    found["pixel_loss"] = (*pictures, 0.3, 0.2, 0.6)
    if how != "none":
        found |= {"gate": (x, images, how), "gate_backward": (draw(rows, gated, dtype=dtype), x, images, how)}
    return found


def call(name: str, arguments, backend: str) -> tuple[torch.Tensor, ...]:
    results = getattr(passes, name)(*arguments, backend)
    return results if isinstance(results, tuple) else (results,)


def double(arguments) -> list:
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_matches_reference(dtype, **shape) -> None:
    for name, arguments in operators(dtype, **shape).items():
        found, expected = call(name, arguments, "cpu"), call(name, double(arguments), "reference")
        plain = call(name, arguments, "reference")  # channels that are nearly equal cost any norm in float32 digits
        for i, (ours, exact, like) in enumerate(zip(found, expected, plain, strict=True)):
            assert ours.shape == exact.shape
            scale = exact.abs().max() if exact.numel() else 1
            error, allowed = ((x.double() - exact).abs().max() if exact.numel() else 0 for x in (ours, like))
            assert error <= max(TOLERANCE[dtype] * scale, 4 * allowed) + 1e-30, (
                f"{name}, result {i}: off by {error / scale:.1e}"
            )


# Numbers ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 35), st.integers(1, 70), st.integers(1, 40)),
    st.sampled_from(GATES),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_compiled_match_plain_torch(shape, how, dtype):
    pairs, height, width, half = shape
    assert_matches_reference(dtype, images=2 * pairs, height=height, width=width, channels=2 * half, how=how)


@pytest.mark.parametrize("how", GATES)
def test_more_than_one_strip_and_tile(how):
    assert_matches_reference(torch.float32, images=3 - (how == "mutual"), height=33, width=65, channels=64, how=how)


def test_without_a_residual():
    y, x, statistics, _, groups = operators(torch.float32)["norm_backward"]
    zeros = torch.zeros_like(x)
    alone, with_zeros = (passes.norm_backward(y, x, statistics, added, groups, "cpu") for added in (None, zeros))
    assert torch.equal(alone[0], with_zeros[0])
    assert not alone[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["self", "mutual"])
def test_without_what_the_backward_pass_needs(dtype, how):
    *arguments, _ = operators(dtype, images=4, height=19, width=67, channels=76, how=how)["depthwise"]
    kept, gone = (passes.depthwise(*arguments, keep, "cpu") for keep in (True, False))
    assert gone[0].numel() == 0
    assert torch.equal(gone[1], kept[1]) and torch.equal(gone[2], kept[2])
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not to be kept"):
        passes.depthwise(*arguments, False, "cpu")


def test_rounding_to_bfloat16():
    """As torch rounds: to the nearest, ties to even, overflow to infinity, NaN stays NaN. Only numbers under 1.2e-38
    may become 0, as the processor's own instruction makes them."""
    import numba

    from dereflect.models.compiled import vector

    @numba.njit
    def round_all(source, target, count):
        for i in range(0, count, 16):
            lanes = min(16, count - i)
            vector.write(target + 2 * i, vector.read(source + 4 * i, 4, lanes), 2, lanes)

    bits = torch.randint(-(2**31), 2**31, (4099,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
    numbers = torch.cat([bits.view(torch.float32), special])
    rounded = torch.empty(len(numbers), dtype=torch.bfloat16)
    round_all(numbers.data_ptr(), rounded.data_ptr(), len(numbers))
    torch.testing.assert_close(rounded, numbers.bfloat16(), rtol=0, atol=1.2e-38, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_for_any_number_of_threads(dtype):
    threads = torch.get_num_threads()
    inputs = operators(dtype, images=4, height=49, width=40, channels=70)
    try:
        runs = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append([result for name, a in inputs.items() for result in call(name, a, "cpu")])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_what_is_not_finite_stays_so():
    """The guard of the training finds it by the loss and the gradients."""
    for name, arguments in operators(torch.bfloat16).items():
        arguments[0].view(-1)[7] = float("nan")
        assert any(result.isnan().any() for result in call(name, arguments, "cpu")), name


# Operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", GATES)
def test_gradcheck(how):
    for name, arguments in operators(torch.float64, height=2, width=3, how=how).items():
        if name.endswith("backward"):
            continue
        leaves = [a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        which = {"norm": 0, "gate": 0, "depthwise": 0 if how == "none" else 1, "pixel_loss": 0}[name]
        assert torch.autograd.gradcheck(lambda *a, name=name, i=which: call(name, a, "reference")[i], leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", ["none", "mutual"])
def test_opcheck(backend, how):
    for name, arguments in operators(torch.float32, how=how).items():
        leaves = [
            a.requires_grad_(not name.endswith("backward")) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.passes, name), (*leaves, backend))


@pytest.mark.parametrize(
    ("depthwise", "attends", "streams", "width"),
    [(True, True, 2, 3), (True, True, 2, 1), (True, True, 1, 1), (True, False, 1, 3), (False, False, 2, 3)],
)
def test_gradcheck_of_the_step(depthwise, attends, streams, width):
    """The algebra of the folded weights, with the plain passes in float64; attention of few pixels isn't folded."""
    images, height, c = 2, 2, 4
    parameters = [draw(c), draw(c), draw(2 * c, c), draw(2 * c)]
    parameters += [draw(2 * c, 1, 3, 3), draw(2 * c)] if depthwise else [None, None]
    half = len(parameters)
    parameters += [draw(c, c), draw(c)] if attends else [None, None]
    parameters += [draw(c, c), draw(c), draw(streams, c)]
    how = step.How((images, height, width), 1e-6, "mutual" if streams == 2 else "self", "reference")
    leaves = [
        None if p is None else p.double().requires_grad_() for p in (draw(images * height * width, c), *parameters)
    ]

    def whole(x, *weights):
        return step.residual_step(x, step.Expansion(*weights[:half]), step.Projection(*weights[half:]), how)

    assert torch.autograd.gradcheck(whole, leaves)
    first = leaves[: half + 1]
    assert torch.autograd.gradcheck(lambda x, *w: step.expand_and_gate(x, step.Expansion(*w), how), first)


# In a network ----------------------------------------------------------------------------------------------


def random_block(kind, channels: int):
    torch.manual_seed(0)
    block = kind(channels)
    for parameter in (*block.a, *block.b, block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias):
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def output_and_gradients(block, x: torch.Tensor, backend: str, autocast: bool = False) -> dict[str, torch.Tensor]:
    passes.set_backend(backend)
    block.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    (out.to(x.dtype) * draw(*out.shape, seed=9).to(x.dtype)).sum().backward()
    return {"out": out, "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", [MuGI, NAF, MuGIM2])
@pytest.mark.parametrize("shape", [(2, 40, 17, 21), (4, 16, 70, 64), (4, 32, 3, 5)])
@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_are_as_exact_as_in_plain_torch(kind, shape, autocast):
    """Output and gradients, against float64; also where the image isn't channels_last."""
    block, x = random_block(kind, shape[1]), draw(*shape)
    exact = output_and_gradients(copy.deepcopy(block).double(), x.double(), "reference")
    plain = output_and_gradients(block, x, "reference", autocast)
    ours = output_and_gradients(block, x, "cpu", autocast)
    assert ours["out"].dtype == plain["out"].dtype
    least = 2**-9 if autocast else 2e-6
    errors = {name: (error(ours[name], value), error(plain[name], value)) for name, value in exact.items()}
    for name, (own, theirs) in errors.items():
        assert own <= 3 * theirs + least, name  # a gradient's own error is chance
    own, theirs = (sum(each) / len(errors) for each in zip(*errors.values(), strict=True))
    assert own <= 1.3 * theirs + 1e-6
    turned = output_and_gradients(block, x.contiguous(memory_format=torch.channels_last), "cpu", autocast)
    assert torch.equal(turned["out"], ours["out"])


def test_a_single_image_that_is_not_channels_last():
    """As rows of channels it is a view with gaps."""
    block, x = random_block(NAF, 8), draw(1, 8, 12, 12)
    passes.set_backend("cpu")
    assert torch.equal(block(x), block(x.contiguous(memory_format=torch.channels_last)))
    with pytest.raises(ValueError, match="has gaps"):
        passes.norm(x[0].flatten(1).t(), 1e-6, "cpu")


def test_without_gradients_nothing_is_recorded(monkeypatch):
    block, x = random_block(MuGI, 16), draw(2, 16, 8, 8)
    expected = block(x).detach()
    for function in (step._Step, step._Expand, fused._NormProject, fused._GateProjectAdd):
        monkeypatch.setattr(function, "apply", lambda *_: pytest.fail("a Function was applied"))
    with torch.no_grad():
        assert torch.equal(block(x), expected)


def test_costs_are_the_same(monkeypatch):
    ours = costs("dsrnet_xs", 64, 64, 1)
    monkeypatch.setenv("PASSES_BACKEND", "reference")
    plain = costs("dsrnet_xs", 64, 64, 1)
    assert ours.forward == pytest.approx(plain.forward, rel=0.01)
    assert ours.kept <= 1.05 * plain.kept


# The choice ------------------------------------------------------------------------------------------------


class TestChoice:
    def test_auto_is_logged_once(self, fresh_choice, caplog):
        with caplog.at_level(logging.INFO, logger="passes"):
            assert {backends.chosen_backend(draw(2, 2), torch.float32) for _ in range(2)} == {"cpu"}
        (record,) = [record for record in caplog.records if record.name == "passes"]
        assert "compiled by numba" in record.message

    def test_what_is_left_to_plain_torch(self):
        x = draw(2, 2)
        assert backends.chosen_backend(x, torch.float64) is None
        assert backends.chosen_backend(x, torch.float16) is None
        assert backends.chosen_backend(x.to("meta"), torch.float32) is None
        assert backends.chosen_backend(x[:0], torch.float32) is None

    def test_under_compile(self):
        """The compiler makes passes of its own: the graph holds none of these."""
        seen = []

        def look(graph, _):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        block = torch.compile(random_block(NAF, 4), backend=look, fullgraph=True)
        with torch.no_grad():
            block(draw(1, 4, 3, 3))
        assert seen
        assert not [name for name in seen if "passes" in name]

    def test_without_numba(self, fresh_choice, monkeypatch):
        monkeypatch.setattr(backends, "backend_module", lambda _: exec("raise ImportError('no numba here')"))
        assert backends.chosen_backend(draw(2, 2), torch.float32) is None
        random_block(MuGI, 4)(draw(2, 4, 3, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="'cpu': numba's passes can't run: ImportError: no numba here"):
            passes.set_backend("cpu")

    def test_wishes(self, monkeypatch):
        x = draw(2, 2)
        monkeypatch.setenv("PASSES_BACKEND", "reference")
        assert backends.chosen_backend(x, torch.float32) is None
        passes.set_backend("auto")
        assert backends.chosen_backend(x, torch.float32) == "cpu"
        passes.set_backend(None)
        monkeypatch.setenv("PASSES_BACKEND", "fast")
        with pytest.raises(ValueError, match="PASSES_BACKEND: no backend 'fast'"):
            backends.chosen_backend(x, torch.float32)
        with pytest.raises(ValueError, match="set_backend: no backend 'slow' of the passes; choose from auto, cpu"):
            passes.set_backend("slow")


def test_kernels_know_the_version_of_what_they_share():
    """Numba's cache looks at a kernel's own file only; its name tells which vector.py it was compiled with."""
    from dereflect.models.compiled import vector
    from dereflect.models.passes import kernels

    assert kernels.add_up.py_func.__qualname__ == f"add_up_{vector._VERSION}"
