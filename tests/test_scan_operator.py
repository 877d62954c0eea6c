"""The selective scan as an operator, the choice of its backend, and the causal convolution before it."""

import logging
import sys

import pytest
import torch

from dereflect.models.scan import available_backends, backends, causal_conv1d, selective_scan, set_backend
from tests.scans import (
    HAS_NUMBA,
    INTERPRETED,
    NAMES,
    assert_close,
    every_backend,
    needs_numba,
    outputs_and_gradients,
    random_inputs,
    run_python,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="tested once")


@pytest.fixture(autouse=True)
def no_backend_requested(monkeypatch):
    monkeypatch.delenv("SCAN_BACKEND", raising=False)
    yield
    set_backend(None)


@pytest.fixture
def fresh_choice():
    """Forget what is known to work and what was logged, before and after."""
    caches = (backends.why_not, backends._first_that_works, backends._log_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("backend", every_backend[:2])
@pytest.mark.parametrize("options", [NAMES[5:], ()])
def test_opcheck(backend, options):
    inputs = random_inputs(2, 5, 70, 3, options=options)
    leaves = [None if t is None else t.requires_grad_() for t in inputs.values()]
    for reverse in (False, True):
        torch.library.opcheck(torch.ops.scan.selective_scan, (*leaves, True, reverse, backend))


def test_compiles_into_one_graph():
    def layer(*inputs):
        return selective_scan(*inputs, delta_softplus=True) * 2

    inputs = random_inputs(1, 4, 20, 3)
    expected = outputs_and_gradients(lambda *t: (layer(*t[:-1]), torch.zeros(1)), inputs)
    torch._dynamo.reset()
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(lambda *t: (compiled_layer(*t[:-1]), torch.zeros(1)), inputs)
    assert_close(found, expected, 1e-6)


def test_first_call_may_be_a_fake_one(fresh_choice):
    """What works is found out by really computing, also where everything else is pretended."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        y = selective_scan(*random_inputs(2, 3, 5, 4).values())
    assert y.shape == (2, 3, 5)
    assert available_backends("cpu")["cpu"] is None or not HAS_NUMBA


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    import dereflect.models.scan.flops  # noqa: F401  registers the formulas

    batch, d, length, n = 2, 3, 5, 4
    inputs = {name: t.requires_grad_() for name, t in random_inputs(batch, d, length, n).items()}
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(*inputs.values(), True)
    assert counter.get_total_flops() == batch * d * length * (7 * n + 8)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == batch * d * length * 19 * n


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
        monkeypatch.delitem(sys.modules, "dereflect.models.scan.backends.cpu", raising=False)
        monkeypatch.delattr("dereflect.models.scan.backends.cpu", raising=False)
        assert "numba" in available_backends("cpu")["cpu"]
        selective_scan(*random_inputs(1, 2, 3, 2).values())
        with pytest.raises(RuntimeError, match=r"'cpu' can't run on cpu tensors: .*numba"):
            selective_scan(*random_inputs(1, 2, 3, 2).values(), backend="cpu")

    def test_strength_of_wishes(self, monkeypatch):
        recorded = []
        monkeypatch.setattr("dereflect.models.scan.operator._scan", lambda *t: recorded.append(t[-1]) or t[:4])
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
        """The scan imports no backend's package, and VGG19 no network."""
        code = (
            "import sys, dereflect.models.scan\n"
            "print([name for name in ('numba', 'triton', 'mamba_ssm') if name in sys.modules])\n"
            "import dereflect.models.vgg\n"
            "print('dereflect.models.arch' in sys.modules)"
        )
        assert run_python("-c", code).split() == ["[]", "False"]

    @needs_numba
    def test_read_only_installation(self, monkeypatch):
        """A kernel compiles and runs where no folder can be written to cache it."""
        from numba import int64
        from numba.core import caching

        from dereflect.models.scan.backends import cpu

        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # as if every folder were read-only

        @cpu.kernel((int64, int64))
        def copy(source, target):
            cpu.copy_number(source, target)

        source, target = torch.tensor([3.5]), torch.zeros(1)
        copy(source.data_ptr(), target.data_ptr())
        assert target.item() == 3.5
