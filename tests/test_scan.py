"""The selective scan: every backend against the golden numbers and against the reference, which gradcheck checks.

Triton's interpreter must be switched on before Triton is imported, so its tests run in a process of their own,
started by `test_in_tritons_interpreter`.
"""

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.scan import available_backends, backends, causal_conv1d, selective_scan, set_backend
from models.scan.backends.reference import selective_scan_reference
from tests.golden.fill import rng

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_NUMBA = available_backends("cpu")["cpu"] is None
GOLDEN = Path(__file__).parent / "golden"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_tritons_interpreter")
compiled = [
    pytest.param("cpu", marks=pytest.mark.skipif(not HAS_NUMBA or INTERPRETED, reason="numba is not installed")),
    pytest.param("triton", marks=interpreted),
]
every_backend = [pytest.param("reference", marks=pytest.mark.skipif(INTERPRETED, reason="tested once")), *compiled]
cuda = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def no_backend_asked_for(monkeypatch):
    monkeypatch.delenv("SCAN_BACKEND", raising=False)
    yield
    set_backend(None)


@pytest.fixture
def fresh_choice():
    """Forgets what is known to work and what was logged, before and after."""
    caches = (backends.why_not, backends._first_that_works, backends._log_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """The interpreter takes as long for padding as for numbers; and this way there are many tiles."""
    if INTERPRETED:
        from triton.runtime.interpreter import ScanOps

        from models.scan.backends import triton

        triton.CHUNK, triton.CHANNELS, triton.CHUNKS_AT_ONCE, triton.PAIRS = 32, 16, 4, 64
        ScanOps.generic_scan = scan_rows_at_once
    yield


def scan_rows_at_once(self, operands):
    """Replaces the interpreter's own loop, which composes number by number and takes minutes for these tests."""
    values = [np.moveaxis(t.handle.data, self.axis, 0) for t in operands]
    rows = [tuple(self.to_tensor(v[0], t.dtype) for v, t in zip(values, operands, strict=True))]
    for i in range(1, len(values[0])):
        row = tuple(self.to_tensor(v[i], t.dtype) for v, t in zip(values, operands, strict=True))
        rows.append(self.combine_fn.fn(*rows[-1], *row))
    results = [np.stack([t.handle.data for t in column]) for column in zip(*rows, strict=True)]
    return [self.to_tensor(np.moveaxis(r, 0, self.axis), t.dtype) for r, t in zip(results, operands, strict=True)]


def random_inputs(batch, d, length, n, seed=0, options=NAMES[5:], dtype=torch.float32, device="cpu"):
    """A dict of inputs; of D, z and delta_bias only those in `options`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(zip(NAMES, shapes_of(batch, d, length, n), strict=True))
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["delta"] -= 2
    values["A"] = -torch.exp(0.5 * values["A"] + torch.arange(1, n + 1).log())
    in_dtype = {"u", "delta", "B", "C", "z"}
    return {
        name: None
        if name in NAMES[5:] and name not in options
        else value.to(device, dtype if name in in_dtype else torch.float32)
        for name, value in values.items()
    }


def shapes_of(batch, d, length, n):
    return (batch, d, length), (batch, d, length), (d, n), *[(batch, n, length)] * 2, (d,), (batch, d, length), (d,)


def outputs_and_gradients(scan, inputs, softplus=True, dtype=None):
    """y, the last state, and the gradients of both, weighted at random, for every input that isn't None."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()
    }
    y, last_state = scan(*leaves.values(), softplus)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in (y, last_state))
    loss.backward()
    return {
        "y": y.detach(),
        "last_state": last_state.detach(),
        **{f"d{name}": t.grad for name, t in leaves.items() if t is not None},
    }


def op(backend, reverse=False):
    return lambda *arguments: selective_scan(*arguments, return_last_state=True, backend=backend, reverse=reverse)


def assert_close(found, expected, tolerance):
    """Each within `tolerance` of its largest entry (and a floor where everything is nearly zero)."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name].double() - want.double()).abs().max() if want.numel() else 0.0
        scale = want.double().abs().max().clamp(min=1e-2) if want.numel() else 1.0
        assert error <= tolerance * scale, f"{name}: off by {error / scale:.2e} of the largest"


def assert_matches_reference(backend, inputs, softplus=True, tolerance=1e-5, reverse=False):
    """float32 sums in another order than the reference's float64: 1e-5 of the largest entry."""
    found = outputs_and_gradients(op(backend, reverse), inputs, softplus)
    reference = functools.partial(selective_scan_reference, reverse=reverse)
    expected = outputs_and_gradients(reference, inputs, softplus, torch.float64)
    assert found["y"].dtype == inputs["u"].dtype
    for name, t in inputs.items():
        assert t is None or found[f"d{name}"].dtype == t.dtype
    assert_close(found, expected, tolerance)


# Numbers -------------------------------------------------------------------------------------------------


def golden_inputs(dtype=torch.float32):
    golden = np.load(GOLDEN / "selective_scan.npz")
    b, d, n, l = golden["shape"]
    draws = {name: rng(name).standard_normal(shape) for name, shape in zip(NAMES, shapes_of(b, d, l, n), strict=True)}
    draws["delta"] -= 2
    draws["A"] = -np.exp(0.5 * draws["A"] + np.log(np.arange(1, n + 1)))
    draws["delta_bias"] *= 0.5
    weight = rng("grad_y").standard_normal((b, d, l))
    return golden, [torch.tensor(v, dtype=dtype) for v in draws.values()], torch.tensor(weight, dtype=dtype)


@pytest.mark.parametrize("backend", every_backend)
def test_golden(backend):
    golden, leaves, weight = golden_inputs()
    for leaf in leaves:
        leaf.requires_grad_()
    y, last_state = op(backend)(*leaves, True)
    (y * weight).sum().backward()
    found = {"y": y, "last_state": last_state}
    found |= {f"grad_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    expected = {key: torch.tensor(golden[key]) for key in golden if key != "shape"}
    assert_close(found, expected, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="tested once")
@pytest.mark.parametrize(("softplus", "options"), [(True, NAMES[5:]), (False, ())])
def test_gradcheck(softplus, options):
    """The adjoint recurrence of the reference backend against finite differences, in float64."""
    inputs = random_inputs(2, 2, 3, 2, options=options)
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs.values()]
    if not softplus:
        leaves[1] = (leaves[1].detach() + 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: op("reference")(*t, softplus), leaves)


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), st.one_of(st.just(16), st.integers(1, 64))
)
some_options = st.sets(st.sampled_from(NAMES[5:]))


@pytest.mark.skipif(not HAS_NUMBA or INTERPRETED, reason="numba is not installed")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(shapes, some_options, st.booleans())
def test_cpu_matches_reference(shape, options, softplus):
    assert_matches_reference("cpu", with_positive_steps(random_inputs(*shape, options=options), softplus), softplus)


@interpreted
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 10), st.integers(1, 100), st.sampled_from([1, 3, 17])),
    some_options,
    st.booleans(),
)
def test_triton_matches_reference(shape, options, softplus):
    assert_matches_reference("triton", with_positive_steps(random_inputs(*shape, options=options), softplus), softplus)


def with_positive_steps(inputs, softplus):
    """Without softplus delta is the step size itself, negative ones would make states explode."""
    if not softplus:
        inputs["delta"] = inputs["delta"].exp()
        if inputs["delta_bias"] is not None:
            inputs["delta_bias"] = inputs["delta_bias"].abs()
    return inputs


@pytest.mark.parametrize("backend", compiled)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision(backend, dtype, tolerance):
    """Only the results are rounded: to 2^-8 (bfloat16) or 2^-11 (float16) of their size, doubled for safety."""
    assert_matches_reference(backend, random_inputs(2, 20, 70, 4, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("backend", every_backend)
@pytest.mark.parametrize("innermost", ["steps", "channels"])
@pytest.mark.parametrize(("d", "length"), [(20, 70), (32, 150), (3, 5)])
def test_reverse(backend, innermost, d, length):
    inputs = random_inputs(2, d, length, 4)
    if innermost == "channels":
        inputs |= {name: inputs[name].mT.contiguous().mT for name in ("u", "delta", "B", "C", "z")}
    assert_matches_reference(backend, inputs, reverse=True)


def test_reverse_is_the_scan_of_the_turned_sequence():
    inputs = random_inputs(2, 5, 12, 3)
    turned = {name: t.flip(-1) if t.dim() == 3 else t for name, t in inputs.items()}
    y, last = selective_scan_reference(*inputs.values(), True, reverse=True)
    expected = selective_scan_reference(*turned.values(), True)
    assert torch.equal(y, expected[0].flip(-1))
    assert torch.equal(last, expected[1])


@pytest.mark.parametrize("backend", compiled)
def test_any_strides(backend):
    """Channels innermost, every other step, a broadcast: the same numbers, and y laid out like u."""
    inputs = random_inputs(2, 20, 70, 4)
    plain = outputs_and_gradients(op(backend), inputs)
    strided = dict(inputs)
    for name in ("u", "delta"):
        strided[name] = inputs[name].mT.contiguous().mT
    strided["z"] = inputs["z"].repeat_interleave(2, dim=2)[:, :, ::2]
    strided["B"] = inputs["B"].mT.contiguous().mT
    leaves = [t.detach().requires_grad_() for t in strided.values()]
    y = op(backend)(*leaves, True)[0]
    assert y.stride() == strided["u"].stride()
    assert torch.equal(y, plain["y"])
    y.sum().backward()
    expected = [t.detach().requires_grad_() for t in inputs.values()]
    op(backend)(*expected, True)[0].sum().backward()
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-6, atol=1e-6)
    wide = inputs["C"][:1].expand(2, -1, -1)
    same = op(backend)(*{**inputs, "C": wide}.values(), True)[0]
    assert torch.equal(same, op(backend)(*{**inputs, "C": wide.contiguous()}.values(), True)[0])


@pytest.mark.parametrize("backend", every_backend)
def test_only_wanted_gradients(backend):
    inputs = random_inputs(1, 3, 9, 2)
    wanted = ("delta", "B", "delta_bias")
    for name in wanted:
        inputs[name].requires_grad_()
    op(backend)(*inputs.values(), True)[0].sum().backward()
    assert [name for name, t in inputs.items() if t.grad is not None] == list(wanted)


@pytest.mark.parametrize("backend", every_backend)
def test_gradient_of_the_last_state_alone(backend):
    inputs = random_inputs(1, 3, 9, 2)
    found, expected = inputs["u"].clone().requires_grad_(), inputs["u"].double().requires_grad_()
    op(backend)(*{**inputs, "u": found}.values(), True)[1].sum().backward()
    double = {name: t.double() for name, t in inputs.items()}
    selective_scan_reference(*{**double, "u": expected}.values(), True)[1].sum().backward()
    torch.testing.assert_close(found.grad, expected.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", every_backend)
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty(backend, batch, length):
    inputs = random_inputs(batch, 3, length, 4)
    results = outputs_and_gradients(op(backend), inputs)
    assert results["y"].shape == (batch, 3, length)
    assert results["last_state"].shape == (batch, 3, 4)
    for name, t in inputs.items():
        assert results[f"d{name}"].shape == t.shape
        assert not results[f"d{name}"].any()


@pytest.mark.parametrize("backend", compiled)
def test_long_memory(backend):
    """States that hardly decay must not drift: an exponential off by 1e-7 in every step would show."""
    length = 20_000 if backend == "cpu" else 600
    inputs = random_inputs(1, 2, length, 1, options=())
    inputs["delta"] = torch.full_like(inputs["delta"], 0.125)
    inputs["A"] = -torch.tensor([[0.03125], [0.25]])
    inputs["u"] = torch.ones_like(inputs["u"])
    inputs["B"] = inputs["C"] = torch.ones_like(inputs["B"])
    y, _ = op(backend)(*inputs.values(), False)
    y64, _ = selective_scan_reference(*(None if t is None else t.double() for t in inputs.values()))
    assert ((y - y64) / y64).abs().max() < 2e-5


@pytest.mark.skipif(INTERPRETED, reason="numbers of the interpreter are numpy's")
@pytest.mark.parametrize("backend", compiled[:1])
def test_bit_equal_for_any_number_of_threads(backend):
    inputs = random_inputs(2, 70, 700, 16)
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 3, 5, 2):
            torch.set_num_threads(number)
            runs.append(outputs_and_gradients(op(backend), inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.skipif(not HAS_NUMBA or INTERPRETED, reason="numba is not installed")
def test_special_functions():
    """exp2, softplus and sigmoid of the CPU kernels against float64, and that they fill vector registers."""
    import numba

    from models.scan.backends import cpu

    @numba.njit
    def evaluate(function, source, target, rows):
        for address in range(0, rows * cpu.ROW, cpu.ROW):
            x = cpu.load(source + address)
            if function == 0:
                cpu.store(target + address, cpu.exp2(x))
            elif function == 1:
                cpu.store(target + address, cpu.softplus(x))
            else:
                cpu.store(target + address, cpu.sigmoid(x))

    x = torch.linspace(-125, 127, 64 * cpu.LANES)
    for number, scale, exact, tolerance in (
        (0, 1.0, torch.exp2, 1e-6),
        # Below -10 the rounding of x log2(e) in float32 shows, in numbers under 1e-4.
        (1, 0.08, lambda x: torch.logaddexp(x, torch.zeros_like(x)), 1e-6),
        (2, 0.08, torch.sigmoid, 1e-6),
    ):
        argument = x * scale
        found = torch.empty_like(x)
        evaluate(number, argument.data_ptr(), found.data_ptr(), 64)
        expected = exact(argument.double())
        assert ((found - expected) / expected).abs().max() < tolerance


@pytest.mark.skipif(not HAS_NUMBA or INTERPRETED, reason="numba is not installed")
def test_memory_does_not_grow_with_states():
    """Forward and backward at their peak take less than 2.5 times their inputs; all states would be 4.5 times."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of the peak memory")
    code = """
import torch
from pathlib import Path
from models.scan import selective_scan
status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
def scan(length):
    shapes = (1, 64, length), (1, 64, length), (64, 16), (1, 16, length), (1, 16, length), (64,), (1, 64, length)
    inputs = [torch.rand(shape).sub_(1).requires_grad_() for shape in shapes]
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    selective_scan(*inputs, delta_softplus=True, backend="cpu").sum().backward()
    return (status("VmHWM") - before) / sum(t.nbytes for t in inputs)
scan(100)
print(scan(50176))
"""
    assert 1 < float(run_python("-c", code)) < 2.5


# The operator --------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="tested once")
@pytest.mark.parametrize("backend", every_backend[:2])
@pytest.mark.parametrize("options", [NAMES[5:], ()])
def test_opcheck(backend, options):
    inputs = random_inputs(2, 5, 70, 3, options=options)
    leaves = [None if t is None else t.requires_grad_() for t in inputs.values()]
    for reverse in (False, True):
        torch.library.opcheck(torch.ops.scan.selective_scan, (*leaves, True, reverse, backend))


@pytest.mark.skipif(INTERPRETED, reason="tested once")
def test_compiles_into_one_graph():
    def layer(*inputs):
        return selective_scan(*inputs, delta_softplus=True) * 2

    inputs = random_inputs(1, 4, 20, 3)
    expected = outputs_and_gradients(lambda *t: (layer(*t[:-1]), torch.zeros(1)), inputs)
    torch._dynamo.reset()
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(lambda *t: (compiled_layer(*t[:-1]), torch.zeros(1)), inputs)
    assert_close(found, expected, 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="tested once")
def test_first_call_may_be_a_fake_one(fresh_choice):
    """What works is found out by really computing, also where everything else is pretended."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        y = selective_scan(*random_inputs(2, 3, 5, 4).values())
    assert y.shape == (2, 3, 5)
    assert available_backends("cpu")["cpu"] is None or not HAS_NUMBA


@pytest.mark.skipif(INTERPRETED, reason="tested once")
def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    import models.scan.flops  # noqa: F401  registers the formulas

    batch, d, length, n = 2, 3, 5, 4
    inputs = {name: t.requires_grad_() for name, t in random_inputs(batch, d, length, n).items()}
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(*inputs.values(), True)
    assert counter.get_total_flops() == batch * d * length * (7 * n + 8)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == batch * d * length * 19 * n


# The choice of a backend -----------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="tested once")
class TestChoice:
    def test_auto_is_logged_once(self, fresh_choice, caplog):
        inputs = random_inputs(1, 2, 3, 2).values()
        with caplog.at_level(logging.INFO, logger="scan"):
            selective_scan(*inputs)
            selective_scan(*inputs)
        (message,) = [record.message for record in caplog.records if record.name == "scan"]
        assert ("cpu" if HAS_NUMBA else "reference") in message
        assert "not triton: " in message

    def test_without_numba(self, fresh_choice, monkeypatch):
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "models.scan.backends.cpu", raising=False)
        monkeypatch.delattr("models.scan.backends.cpu", raising=False)
        assert "numba" in available_backends("cpu")["cpu"]
        selective_scan(*random_inputs(1, 2, 3, 2).values())
        with pytest.raises(RuntimeError, match=r"'cpu' can't run on cpu tensors: .*numba"):
            selective_scan(*random_inputs(1, 2, 3, 2).values(), backend="cpu")

    def test_strength_of_wishes(self, monkeypatch):
        recorded = []
        monkeypatch.setattr("models.scan.operator._scan", lambda *t: recorded.append(t[-1]) or t[:4])
        inputs = random_inputs(1, 2, 3, 2).values()
        monkeypatch.setenv("SCAN_BACKEND", "mamba_ssm")
        set_backend("reference")
        selective_scan(*inputs)
        selective_scan(*inputs, backend="auto")
        set_backend(None)
        with pytest.raises(RuntimeError, match="'mamba_ssm' can't run on cpu tensors"):
            selective_scan(*inputs)
        monkeypatch.setenv("SCAN_BACKEND", "reference")
        selective_scan(*inputs)
        assert recorded == ["reference", "cpu" if HAS_NUMBA else "reference", "reference"]

    def test_unknown_names(self, monkeypatch):
        inputs = random_inputs(1, 2, 3, 2).values()
        with pytest.raises(ValueError, match="no scan backend 'cuda'"):
            set_backend("cuda")
        with pytest.raises(ValueError, match="backend: no scan backend 'fast'; choose from auto, mamba_ssm"):
            selective_scan(*inputs, backend="fast")
        monkeypatch.setenv("SCAN_BACKEND", "slow")
        with pytest.raises(ValueError, match="SCAN_BACKEND: no scan backend 'slow'"):
            selective_scan(*inputs)

    def test_float64_needs_the_reference(self):
        inputs = [t.double() for t in random_inputs(1, 2, 3, 2).values()]
        assert selective_scan(*inputs).dtype == torch.float64
        with pytest.raises(RuntimeError, match="float64 needs 'reference'"):
            selective_scan(*inputs, backend="cpu")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("u", torch.zeros(2, 3), "not .batch, d, length."),
            ("B", torch.zeros(2, 4, 6), r"B is \(2, 4, 6\), not \(2, 4, 5\)"),
            ("D", torch.zeros(4), r"D is \(4,\), not \(3,\)"),
            ("A", torch.zeros(3, 0), "A has no states"),
            ("z", torch.zeros(2, 3, 5, device="meta"), "z is on meta, u on cpu"),
            ("u", torch.zeros(2, 3, 5, dtype=torch.int64), "not a floating-point tensor"),
        ],
    )
    def test_wrong_inputs(self, name, value, message):
        inputs = random_inputs(2, 3, 5, 4) | {name: value}
        with pytest.raises(ValueError, match=message):
            selective_scan(*inputs.values())

    def test_importing_is_light(self):
        code = "import sys, models.scan; print([m for m in ('numba', 'triton', 'mamba_ssm') if m in sys.modules])"
        assert run_python("-c", code).strip() == "[]"

    def test_read_only_installation(self):
        """Kernels compile and run where no folder can be written to cache them."""
        if not HAS_NUMBA:
            pytest.skip("numba is not installed")
        code = (
            "from numba.core.caching import CacheImpl\n"
            "CacheImpl._locator_classes = []\n"  # as if every folder were read-only
            "import torch, models.scan as s\n"
            "one = torch.ones(1, 1, 2)\n"
            "print(s.selective_scan(one, one, -one[0, :, :1], one, one, backend='cpu').sum().item())"
        )
        assert float(run_python("-c", code)) == pytest.approx(1 + 1 + np.exp(-1))


def run_python(*arguments, **environment):
    """Output of a new Python process in the repository's root; shows what it wrote if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is the inner process")
def test_in_tritons_interpreter():
    pytest.importorskip("triton")
    output = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton or interpreted", __file__),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "passed" in output


@pytest.mark.skipif(INTERPRETED, reason="tested once")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_convolution(activation):
    x, weight, bias = torch.randn(2, 3, 10), torch.randn(3, 4), torch.randn(3)
    y = causal_conv1d(x, weight, bias, activation)
    expected = bias[:, None] + torch.zeros_like(x)
    for t in range(10):
        for k in range(4):
            if t - 3 + k >= 0:
                expected[:, :, t] += weight[:, k] * x[:, :, t - 3 + k]
    if activation:
        expected = expected * torch.sigmoid(expected)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    turned = causal_conv1d(x.flip(-1), weight, bias, activation, reverse=True)
    torch.testing.assert_close(turned.flip(-1), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d(x, weight, bias, "relu")


# On a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("length", [1, 257, 50176])
def test_triton_on_a_gpu(length, n):
    """Against float64 on the same GPU (a long scan by chunks of the length, whose states are handed on)."""
    inputs = random_inputs(2, 24, length, n, device="cuda")
    found = outputs_and_gradients(op("triton"), inputs)
    expected = outputs_and_gradients(float64_scan, inputs, dtype=torch.float64)
    assert_close(found, expected, 2e-5)


def float64_scan(u, delta, A, B, C, D, z, delta_bias, softplus):
    """The reference, but a scan of 50,176 steps as one autograd graph is too slow: with the op's own adjoint."""
    return op("reference")(u, delta, A, B, C, D, z, delta_bias, softplus)


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((2, 128, 784, 16), torch.float32, 2e-5),
        ((1, 37, 300, 5), torch.float32, 2e-5),
        ((1, 40, 130, 64), torch.float32, 2e-5),
        ((2, 64, 1000, 16), torch.bfloat16, 8e-3),
        ((2, 64, 1000, 8), torch.float16, 1e-3),
    ],
)
@pytest.mark.parametrize("options", [NAMES[5:], ()])
def test_triton_shapes_and_dtypes_on_a_gpu(shape, dtype, tolerance, options):
    inputs = random_inputs(*shape, options=options, dtype=dtype, device="cuda")
    found = outputs_and_gradients(op("triton"), inputs)
    expected = outputs_and_gradients(float64_scan, inputs, dtype=torch.float64)
    assert_close(found, expected, tolerance)
    strided = {name: t.mT.contiguous().mT if t is not None and t.dim() == 3 else t for name, t in inputs.items()}
    assert_close(outputs_and_gradients(op("triton"), strided), expected, tolerance)


@pytest.mark.cuda
@cuda
def test_triton_is_deterministic_and_an_operator():
    inputs = random_inputs(2, 128, 5000, 16, device="cuda")
    first, second = (outputs_and_gradients(op("triton"), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    small = random_inputs(2, 5, 300, 3, device="cuda")
    leaves = [t.requires_grad_() for t in small.values()]
    torch.library.opcheck(torch.ops.scan.selective_scan, (*leaves, True, False, "triton"))


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [NAMES[5:], ()])
def test_mamba_ssm(dtype, options):
    reason = available_backends("cuda")["mamba_ssm"]
    if reason:
        pytest.skip(reason)
    inputs = random_inputs(2, 128, 3000, 16, options=options, dtype=dtype, device="cuda")

    def y_alone(backend):  # the package passes no gradient through the last state
        return lambda *t: (selective_scan(*t, backend=backend), torch.zeros(1, device="cuda"))

    expected = outputs_and_gradients(y_alone("reference"), inputs, dtype=torch.float64)
    for backend in ("mamba_ssm", "triton"):
        found = outputs_and_gradients(y_alone(backend), inputs)
        assert_close(found, expected, 5e-5 if dtype == torch.float32 else 1.6e-2)
    leaves = [None if t is None else t.requires_grad_() for t in random_inputs(1, 4, 9, 4, device="cuda").values()]
    # Not its check of all gradients, which asks for the last state's, too.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.scan.selective_scan, (*leaves, True, False, "mamba_ssm"), test_utils=checks)
