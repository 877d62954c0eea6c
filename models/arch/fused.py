"""The three dense steps of a block, each one differentiable operation that keeps little for the backward pass.

Written with ordinary modules, a block of c channels keeps about 15c numbers for each pixel between its forward and its
backward pass; with these operations it keeps 8c, and it reads and writes its activations fewer times. The norm, the
gate and the attention's product are cheap, so the backward pass computes them again.

All activations are (N, C, H, W) in channels_last memory, so a view as rows of C channels, (N*H*W, C), copies nothing.
Under autocast the matrix products run in its type, as those of torch's own layers do.

Symbols: x the block's stream, e the expanded channels, d the gate's input, g the gate's result, s the attention's
scale of each image and channel, p = g * s.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dereflect.models import passes
from dereflect.models.arch import step, whole

Gate = Literal["none", "self", "mutual"]


def residual_step(
    x: Tensor,
    norm: torch.nn.LayerNorm,
    expand: torch.nn.Conv2d,
    depthwise: torch.nn.Conv2d | None,
    gate: Gate,
    attention: torch.nn.Conv2d | None,
    project: torch.nn.Conv2d,
    scale: Tensor,
) -> Tensor:
    """x + scale * project(attend(gate(depthwise(expand(norm x))))), with the arguments of `norm_project` and
    `gate_project_add`: on a CPU as one operation with compiled passes where they work (`models.passes`)."""
    dtype = _compute_type(x)
    backend = passes.chosen_backend(x, dtype)
    if backend is None:
        d = norm_project(x, norm, expand)
        d = d if depthwise is None else depthwise(d)
        return gate_project_add(d, x, project, scale, gate, attention)
    projection = step.Projection(*_parameters(attention), *_parameters(project), scale)
    how = step.How((x.shape[0], *x.shape[2:]), norm.eps, gate, backend)
    return _image(step.residual_step(_rows(x.to(dtype)), _expansion(norm, expand, depthwise), projection, how), x)


def expand_and_gate(x: Tensor, norm: torch.nn.LayerNorm, expand: torch.nn.Conv2d, depthwise: torch.nn.Conv2d) -> Tensor:
    """The mutual gate of depthwise(expand(norm x)), with the arguments of `norm_project`."""
    dtype = _compute_type(x)
    backend = passes.chosen_backend(x, dtype)
    if backend is None:
        return mutual_gate(depthwise(norm_project(x, norm, expand)))
    how = step.How((x.shape[0], *x.shape[2:]), norm.eps, "mutual", backend)
    return _image(step.expand_and_gate(_rows(x.to(dtype)), _expansion(norm, expand, depthwise), how), x)


def _expansion(norm: torch.nn.LayerNorm, expand: torch.nn.Conv2d, depthwise: torch.nn.Conv2d | None) -> step.Expansion:
    of_depthwise = (None, None) if depthwise is None else (depthwise.weight, depthwise.bias)
    return step.Expansion(norm.weight, norm.bias, *_parameters(expand), *of_depthwise)


def _parameters(conv: torch.nn.Conv2d | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight (out, in) and bias of a 1x1 convolution."""
    return (None, None) if conv is None else (conv.weight.flatten(1), conv.bias)


class Conv1x1(torch.nn.Conv2d):
    """A 1x1 convolution; on a CPU a product with the rows of channels, which torch's own is not in every case: in
    float32 with one thread it would turn the image first."""

    def __init__(self, channels: int, out_channels: int, bias: bool = True):
        super().__init__(channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H, W), channels_last."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return _image(F.linear(_rows(x), self.weight.flatten(1), self.bias), x)


def norm_project(x: Tensor, norm: torch.nn.LayerNorm, conv: torch.nn.Conv2d) -> Tensor:
    """LayerNorm over channels, then a 1x1 convolution.

    Args:
        x: (N, C, H, W).
        norm: over C channels, with scale and shift.
        conv: 1x1, C to any number of channels, with a bias.

    Returns:
        (N, conv.out_channels, H, W), channels_last.
    """
    x, norm_weight, norm_bias, weight, bias = _cast(x, norm.weight, norm.bias, conv.weight, conv.bias)
    rows = _apply(_NormProject, _rows(x), norm_weight, norm_bias, norm.eps, weight.flatten(1), bias)
    return _image(rows, x)


def gate_project_add(
    d: Tensor,
    residual: Tensor,
    conv: torch.nn.Conv2d,
    scale: Tensor,
    gate: Gate = "none",
    attention: torch.nn.Conv2d | None = None,
) -> Tensor:
    """residual + scale * conv1x1(g * s): the second half of both steps of every block.

    The gate splits d's channels in halves u and v. Its result g is d itself for "none", u * v for "self" and, for
    "mutual", u times the v of the other stream. The scale s = attention(mean of g over the image) is simplified
    channel attention (NAFNet, Chen et al. 2022), or 1 without it.

    Args:
        d: (N, C, H, W) without a gate, (N, 2C, H, W) with one. For "mutual" N is 2B, transmissions first.
        residual: (N, K, H, W).
        conv: 1x1, C to K channels, with a bias.
        scale: (S, K), S = 1 for all images, S = 2 for a scale of each stream.
        gate: the gate that d goes through first.
        attention: 1x1, C to C channels, with a bias.

    Returns:
        (N, K, H, W), channels_last.
    """
    d, residual, weight, bias, scale = _cast(d, residual, conv.weight, conv.bias, scale)
    squeeze_weight = squeeze_bias = None
    if attention is not None:
        _, squeeze_weight, squeeze_bias = _cast(d, attention.weight.flatten(1), attention.bias)
    n, _, h, w = d.shape
    weights = weight.flatten(1), bias, scale, squeeze_weight, squeeze_bias
    rows = _apply(_GateProjectAdd, _rows(d), _rows(residual), *weights, gate, (n, h, w))
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def mutual_gate(d: Tensor) -> Tensor:
    """The mutual gate alone: (2B, 2C, H, W), transmissions first, to (2B, C, H, W); keeps d only."""
    return _image(_apply(_MutualGate, _rows(d)), d)


def _compute_type(x: Tensor) -> torch.dtype:
    """Autocast's type where autocast is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All tensors in the type of the computation."""
    dtype = _compute_type(x)
    return tuple(tensor.to(dtype) for tensor in (x, *others))


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N*H*W, C) without gaps; a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()  # of a single image the reshaped may have gaps


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(N*H*W, C) to (N, C, H, W), N, H and W as those of `like`."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a * b, in one pass."""
    if torch.compiler.is_compiling():
        out.copy_(a * b)  # the compiler makes one pass of it, but refuses `out=` for parts of a tensor
    else:
        torch.mul(a, b, out=out)


def _gate_forward(d: Tensor, gate: Gate) -> Tensor:
    """(M, 2C) to (M, C); the two halves of the rows are the two streams."""
    if gate == "none":
        return d
    u, v = d.chunk(2, dim=1)
    if gate == "self":
        return u * v
    g = torch.empty_like(u, memory_format=torch.contiguous_format)
    m = d.shape[0] // 2
    _multiply(u[:m], v[m:], g[:m])
    _multiply(u[m:], v[:m], g[m:])
    return g


def _gate_backward(grad: Tensor, d: Tensor, gate: Gate) -> Tensor:
    """Gradient (M, 2C) of d from the gradient (M, C) of the gate's result."""
    if gate == "none":
        return grad
    out = torch.empty_like(d)
    (u, v), (grad_u, grad_v) = d.chunk(2, dim=1), out.chunk(2, dim=1)
    if gate == "self":
        _multiply(grad, v, grad_u)
        _multiply(grad, u, grad_v)
        return out
    m = d.shape[0] // 2
    for mine, other in ((slice(m), slice(m, None)), (slice(m, None), slice(m))):
        _multiply(grad[mine], v[other], grad_u[mine])
        _multiply(grad[other], u[other], grad_v[mine])
    return out


class _KeepsNothing:
    """Stands for autograd's context where no gradient is wanted."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _apply(function: type[Function], *arguments) -> Tensor:
    """The function, with autograd only where a gradient is wanted."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return function.apply(*arguments)
    return function.forward(_KeepsNothing(), *arguments)


class _MutualGate(Function):
    @staticmethod
    def forward(ctx, d):
        ctx.save_for_backward(d)
        return _gate_forward(d, "mutual")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gate_backward(grad, ctx.saved_tensors[0], "mutual")


class _NormProject(Function):
    """Keeps x and its statistics; normalises again in the backward pass."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        with torch.autocast(x.device.type, enabled=False):
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
            ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
            ctx.eps = eps
            return F.linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            normed = torch.native_layer_norm(x, x.shape[1:], norm_weight, norm_bias, ctx.eps)[0]
            grad_weight = grad.t() @ normed
            grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad @ weight, x, x.shape[1:], mean, rstd, norm_weight, norm_bias, [True, True, True]
            )
            return grad_x, grad_norm_weight, grad_norm_bias, None, grad_weight, grad.sum(0)


class _GateProjectAdd(Function):
    """Keeps d and s; gates again in the backward pass.

    Neither y = p W' + b nor p = g * s is kept or computed again. With P the product (gradient of out)' g of each
    image, which the gradient of W needs anyway, the gradients of the scales a and s follow from it: the sum over an
    image's rows of (gradient * y) is the sum over columns of (P * s * W), plus b times the sum of the gradient.
    """

    @staticmethod
    def forward(ctx, d, residual, weight, bias, scale, squeeze_weight, squeeze_bias, gate, shape):
        with torch.autocast(d.device.type, enabled=False):
            g = p = _gate_forward(d, gate)
            s, n = None, shape[0]
            if squeeze_weight is not None:
                images = g.view(n, -1, g.shape[1])
                means = whole.mean(g.view(*shape, -1), images.mean(1))
                s = F.linear(means, squeeze_weight, squeeze_bias)
                p = (images * s[:, None]).view_as(g)
            ctx.save_for_backward(d, s, weight, bias, scale, squeeze_weight)
            ctx.gate, ctx.n = gate, n
            streams = len(scale)
            out = residual.view(streams, -1, residual.shape[1]) + (scale * bias)[:, None]
            folded = scale[:, :, None] * weight  # (S, K, C): the scale costs nothing on the rows
            return out.baddbmm_(p.view(streams, -1, p.shape[1]), folded.transpose(1, 2)).view_as(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d, s, weight, bias, scale, squeeze_weight = ctx.saved_tensors
        with torch.autocast(d.device.type, enabled=False):
            g = _gate_forward(d, ctx.gate)
            images = g.view(ctx.n, -1, g.shape[1])  # (N, HW, C)
            streams = len(scale)
            products = grad.view(ctx.n, -1, grad.shape[1]).transpose(1, 2) @ images  # (N, K, C)
            folded = scale[:, :, None] * weight  # (S, K, C)
            grad_g = (grad.view(streams, -1, grad.shape[1]) @ folded).view_as(g)  # still without s

            by_stream = products.view(streams, -1, *weight.shape)  # (S, N/S, K, C)
            grad_squeeze_weight = grad_squeeze_bias = None
            if s is not None:
                grad_s = (by_stream * folded[:, None]).sum(2).view_as(s)  # (N, C)
                by_stream = by_stream * s.view(streams, -1, 1, s.shape[1])
                grad_squeeze_weight = grad_s.t() @ images.mean(1)
                grad_squeeze_bias = grad_s.sum(0)
                grad_mean = (grad_s @ squeeze_weight) / images.shape[1]
                grad_g = torch.addcmul(grad_mean[:, None], grad_g.view_as(images), s[:, None]).view_as(g)
            by_stream = by_stream.sum(1)  # (S, K, C)
            sums = grad.view(streams, -1, grad.shape[1]).sum(1)  # (S, K)
            grad_scale = (by_stream * weight).sum(2) + sums * bias
            grad_weight = (by_stream * scale[:, :, None]).sum(0)
            grad_bias = (sums * scale).sum(0)
            grad_d = _gate_backward(grad_g, d, ctx.gate)
        return (
            *(grad_d, grad, grad_weight, grad_bias, grad_scale, grad_squeeze_weight, grad_squeeze_bias),
            *(None, None),
        )
