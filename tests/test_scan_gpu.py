"""The selective scan on a GPU: Triton and the mamba_ssm package against float64 on the same GPU."""

import pytest
import torch

from dereflect.models.scan import available_backends, selective_scan
from tests.scans import INTERPRETED, NAMES, assert_close, op, outputs_and_gradients, random_inputs

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")]


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


def test_triton_is_deterministic_and_an_operator():
    inputs = random_inputs(2, 128, 5000, 16, device="cuda")
    first, second = (outputs_and_gradients(op("triton"), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    small = random_inputs(2, 5, 300, 3, device="cuda")
    leaves = [t.requires_grad_() for t in small.values()]
    torch.library.opcheck(torch.ops.scan.selective_scan, (*leaves, True, False, "triton"))


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
