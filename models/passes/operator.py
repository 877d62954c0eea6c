"""The passes as torch operators: autograd, FLOP counters and opcheck understand them.

Activations come as rows of channels, one for each pixel, (images * height * width, channels), or with their neighbours
as (images, height, width, channels), without gaps. Gates: "self", u * v of the two halves u and v of an image's
channels; "mutual", u times the v of the other stream, where one half of the images is one stream and the other half
the other; and "none".

Results and gradients have the type of the activations; statistics, sums and the gradients of weights are float32
(float64 for float64 activations). Weights may have any type. No gradient flows through statistics and sums, and
gradients are not differentiable again.
"""

import torch
from torch import Tensor

from dereflect.models.operators import custom_op
from dereflect.models.passes.backends import backend_module


@custom_op("passes::norm", mutates_args=())
def norm(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 in every row, and (rows, 2): the mean and 1 / deviation of x.

    x: (rows, channels).
    """
    return backend_module(backend).norm(x, eps)


@custom_op("passes::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, added: Tensor | None, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    """`added` plus the gradient of x, and (groups, channels): the sums of `added` over so many groups of rows."""
    return backend_module(backend).norm_backward(dy, x, statistics, added, groups)


@custom_op("passes::gate", mutates_args=())
def gate(d: Tensor, images: int, how: str, backend: str) -> Tensor:
    """(rows, 2C) to (rows, C); the rows are those of so many images."""
    return backend_module(backend).gate(d, images, how)


@custom_op("passes::gate_backward", mutates_args=())
def gate_backward(dg: Tensor, d: Tensor, images: int, how: str, backend: str) -> tuple[Tensor, Tensor]:
    """The gradient of d, and its sum over all rows."""
    return backend_module(backend).gate_backward(dg, d, images, how)


@custom_op("passes::depthwise", mutates_args=())
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """d, the 3x3 convolution of each channel by itself, its gate g, and the sums of g over each image's pixels.

    x: (N, H, W, C); weight: (C, 1, 3, 3); bias: (C). d is like x, g (N, H, W, C / 2), the sums (N, C / 2); without a
    gate the last two are empty. With a gate d is empty, too, unless it is to be kept for the backward pass.
    """
    return backend_module(backend).depthwise(x, weight, bias, how, keep)


@custom_op("passes::depthwise_backward", mutates_args=())
def depthwise_backward(
    dg: Tensor, d: Tensor, x: Tensor, weight: Tensor, how: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from that of g (without a gate, of d), and the sum of x's over all pixels."""
    return backend_module(backend).depthwise_backward(dg, d, x, weight, how)


@custom_op("passes::pixel_loss", mutates_args=())
def pixel_loss(
    estimate: Tensor, target: Tensor, mse: float, l1: float, slopes: float, backend: str
) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient by the estimate.

    mse times the mean squared difference, l1 times the mean absolute one, and slopes times the sum of the mean absolute
    differences' steps from line to line and from column to column. Images: (B, C, H, W), float32, without gaps.
    """
    return backend_module(backend).pixel_loss(estimate, target, mse, l1, slopes)


# What torch has to know of them without computing -----------------------------------------------------------


def _sums(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@norm.register_fake
def _(x, eps, backend):
    return torch.empty_like(x), _sums(x, x.shape[0], 2)


@norm_backward.register_fake
def _(dy, x, statistics, added, groups, backend):
    return torch.empty_like(x), _sums(x, groups, x.shape[1])


@gate.register_fake
def _(d, images, how, backend):
    return d.new_empty(d.shape[0], d.shape[1] // 2)


@gate_backward.register_fake
def _(dg, d, images, how, backend):
    return torch.empty_like(d), _sums(d, d.shape[1])


@depthwise.register_fake
def _(x, weight, bias, how, keep, backend):
    if how == "none":
        return torch.empty_like(x), x.new_empty(0), _sums(x, 0)
    n, h, w, channels = x.shape
    d = torch.empty_like(x) if keep else x.new_empty(0)
    return d, x.new_empty(n, h, w, channels // 2), _sums(x, n, channels // 2)


@depthwise_backward.register_fake
def _(dg, d, x, weight, how, backend):
    channels = len(weight)
    return torch.empty_like(x), _sums(x, *weight.shape), _sums(x, channels), _sums(x, channels)


@pixel_loss.register_fake
def _(estimate, target, mse, l1, slopes, backend):
    return estimate.new_empty(()), torch.empty_like(estimate)


# Gradients ---------------------------------------------------------------------------------------------------


def _norm_setup(ctx, inputs, output) -> None:
    x, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _norm_gradient(ctx, dy, _):
    return norm_backward(dy.contiguous(), *ctx.saved_tensors, None, 1, ctx.backend)[0], None, None


def _gate_setup(ctx, inputs, output) -> None:
    d, *ctx.how = inputs
    ctx.save_for_backward(d)


def _gate_gradient(ctx, dg):
    return gate_backward(dg.contiguous(), *ctx.saved_tensors, *ctx.how)[0], None, None, None


def _depthwise_setup(ctx, inputs, output) -> None:
    x, weight, bias, how, keep, backend = inputs
    if not keep:
        raise RuntimeError("passes::depthwise: gradients need d, which was not to be kept")
    ctx.how = how, backend
    d, g, sums = output
    ctx.gated = ctx.how[0] != "none"
    ctx.mark_non_differentiable(d if ctx.gated else g, sums)
    ctx.save_for_backward(d if ctx.gated else d.new_empty(0), x, weight)
    ctx.bias_type = bias.dtype


def _depthwise_gradient(ctx, dd, dg, _):
    d, x, weight = ctx.saved_tensors
    dx, dweight, dbias, _ = depthwise_backward((dg if ctx.gated else dd).contiguous(), d, x, weight, *ctx.how)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_type), None, None, None


def _pixel_loss_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _pixel_loss_gradient(ctx, dloss, _):
    slope = dloss * ctx.saved_tensors[0]
    return slope, -slope if ctx.needs_input_grad[1] else None, None, None, None, None


norm.register_autograd(_norm_gradient, setup_context=_norm_setup)
gate.register_autograd(_gate_gradient, setup_context=_gate_setup)
depthwise.register_autograd(_depthwise_gradient, setup_context=_depthwise_setup)
pixel_loss.register_autograd(_pixel_loss_gradient, setup_context=_pixel_loss_setup)
