"""The selective scan (S6) of Mamba as one registered torch operator with several backends.

Symbols, as in Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces":

    u      (batch, d, length)   the input sequence, d channels
    delta  (batch, d, length)   the step size of every channel at every step
    A      (d, n)               the state matrix, diagonal for every channel, negative so that states decay
    B      (batch, n, length)   how the input enters the n states
    C      (batch, n, length)   how the states become the output
    D      (d)                  the skip connection
    z      (batch, d, length)   the gate
    h      (batch, d, n)        the state

    delta_t = softplus(delta_t + delta_bias)
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t         (section 3.2: the discretised system)
    y_t     = (C_t h_t + D u_t) silu(z_t)

With `reverse`, h_t follows from h_{t+1}: the scan goes from the last step to the first.

    operator.py              the operator
    causal_conv.py           the short convolution that precedes the scan in a Mamba layer
    layer.py                 the Mamba layer, which is drop-in for `mamba_ssm.Mamba` in training
    flops.py                 what torch's FLOP counter counts for the operator
    backends/__init__.py     the choice of a backend
    backends/reference.py    the recurrence in plain torch, which the other backends are compared with
    backends/cpu.py          compiled by numba, in vectors of sixteen channels (see models/compiled)
    backends/triton.py       Triton, for any GPU that torch's own Triton knows; parallel over chunks of the length too
    backends/mamba_ssm.py    the CUDA kernel of the `mamba_ssm` package
"""

from dereflect.models.scan.backends import BACKENDS, available_backends, set_backend, why_refused
from dereflect.models.scan.backends.reference import selective_scan_reference
from dereflect.models.scan.causal_conv import causal_conv1d
from dereflect.models.scan.layer import Mamba, ScanDirection, scan_along
from dereflect.models.scan.operator import selective_scan

__all__ = [
    "BACKENDS",
    "Mamba",
    "ScanDirection",
    "available_backends",
    "causal_conv1d",
    "scan_along",
    "selective_scan",
    "selective_scan_reference",
    "set_backend",
    "why_refused",
]
