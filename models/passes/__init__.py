"""What a block does between its matrix products, each thing in one pass over the activations, forward and backward.

    norm        LayerNorm over channels without scale and shift; its backward pass adds a residual's gradient
    gate        the product of two halves of the channels, of the same image or of two streams
    depthwise   3x3 convolution of each channel by itself, and the gate of the result

and the loss of an image's pixels with its gradient:

    pixel_loss  squares and magnitudes of the differences, and magnitudes of their slopes

They are registered torch operators with two backends, modules with the same functions:

    reference.py   plain torch: what the other is compared with
    cpu.py         compiled by numba

`operator.py` holds the operators, `backends.py` chooses who computes them.
"""

from dereflect.models.passes.backends import BACKENDS, chosen_backend, set_backend, why_not, why_refused
from dereflect.models.passes.operator import (
    depthwise,
    depthwise_backward,
    gate,
    gate_backward,
    norm,
    norm_backward,
    pixel_loss,
)

__all__ = [
    "BACKENDS",
    "chosen_backend",
    "depthwise",
    "depthwise_backward",
    "gate",
    "gate_backward",
    "norm",
    "norm_backward",
    "pixel_loss",
    "set_backend",
    "why_not",
    "why_refused",
]
