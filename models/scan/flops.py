"""FLOPs of the selective scan, for torch's FLOP counter: importing this module registers the formulas.

A counter knows what is registered when it is made. `models.scan` itself does not import this module, because torch's
FLOP counter imports Triton, which most programs never need.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

import dereflect.models.scan.operator  # noqa: F401  the formulas belong to its operators


@register_flop_formula(torch.ops.scan.selective_scan)
def scan_flops(u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, z_shape, *args, **kwargs) -> int:
    """Seven operations for each state and step: delta A, exp, times h, x B, their sum, and C h added to y."""
    batch, d, length = u_shape
    around = 1 + 2 * (D_shape is not None) + 5 * (z_shape is not None)  # delta u, D u, silu(z) y
    return batch * d * length * (7 * A_shape[1] + around)


@register_flop_formula(torch.ops.scan.selective_scan_backward)
def scan_backward_flops(
    dy_shape, dlast_shape, saved_shape, ungated_shape, u_shape, delta_shape, A_shape, *args, **kwargs
) -> int:
    """Nineteen for each state and step: five for the state again, two each for g, dx, dA, dB, dC and A q, two for q."""
    batch, d, length = u_shape
    return batch * d * length * 19 * A_shape[1]
