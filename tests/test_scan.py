"""The numbers of the selective scan: every backend against golden numbers and the reference, which gradcheck checks.

Triton's interpreter must be switched on before Triton is imported, so its tests run in a process of their own,
started by `test_in_tritons_interpreter`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dereflect.models.scan.backends.reference import selective_scan_reference
from tests.golden.fill import rng
from tests.helpers import GOLDEN
from tests.scans import (
    INTERPRETED,
    NAMES,
    assert_close,
    assert_matches_reference,
    compiled,
    every_backend,
    interpreted,
    needs_numba,
    once,
    op,
    outputs_and_gradients,
    random_inputs,
    run_python,
    shapes_of,
)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles of which even small tensors have several, in every direction."""
    if INTERPRETED:
        from triton.runtime.interpreter import ScanOps

        from dereflect.models.scan.backends import triton

        triton.CHUNK, triton.CHANNELS, triton.CHUNKS_AT_ONCE, triton.PAIRS = 64, 16, 2, 64
        ScanOps.generic_scan = scan_by_doubling
    yield


def scan_by_doubling(self, operands):
    """Replaces the interpreter's own loop, which composes number by number and takes minutes for these tests.

    After the pass with distance 2^k, every entry is composed with the 2^(k+1) - 1 entries before it.
    """
    values = [t.handle.data for t in operands]
    length, distance = values[0].shape[self.axis], 1
    index = np.arange(length).reshape(-1, *[1] * (values[0].ndim - 1 - self.axis))
    while distance < length:
        earlier = [
            self.to_tensor(np.roll(v, distance, self.axis), t.dtype) for v, t in zip(values, operands, strict=True)
        ]
        later = [self.to_tensor(v, t.dtype) for v, t in zip(values, operands, strict=True)]
        composed = self.combine_fn.fn(*earlier, *later)
        values = [np.where(index < distance, v, c.handle.data) for v, c in zip(values, composed, strict=True)]
        distance *= 2
    return [self.to_tensor(v, t.dtype) for v, t in zip(values, operands, strict=True)]


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


@once
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


@needs_numba
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
@pytest.mark.parametrize(("d", "length"), [(20, 150), (3, 5)])
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


@needs_numba
def test_special_functions():
    """exp2, softplus and sigmoid of the CPU kernels against float64, and that they fill vector registers."""
    import numba

    from dereflect.models.scan.backends import cpu

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


@needs_numba
def test_memory_does_not_grow_with_states():
    """Forward and backward at their peak take less than 2.5 times their inputs; all states would be 4.5 times."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of the peak memory")
    code = """
import torch
from pathlib import Path
from dereflect.models.scan import selective_scan
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


@pytest.mark.skipif(INTERPRETED, reason="this is the inner process")
def test_in_tritons_interpreter():
    pytest.importorskip("triton")
    output = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton or interpreted", __file__),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "passed" in output
