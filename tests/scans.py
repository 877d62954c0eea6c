"""What the tests of the selective scan share: random inputs, results with gradients, and how they are compared."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dereflect.models.scan import available_backends, selective_scan
from dereflect.models.scan.backends.reference import selective_scan_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_NUMBA = available_backends("cpu")["cpu"] is None
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

once = pytest.mark.skipif(INTERPRETED, reason="tested once")
needs_numba = pytest.mark.skipif(not HAS_NUMBA or INTERPRETED, reason="numba is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_tritons_interpreter")
compiled = [pytest.param("cpu", marks=needs_numba), pytest.param("triton", marks=interpreted)]
every_backend = [pytest.param("reference", marks=once), *compiled]


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
