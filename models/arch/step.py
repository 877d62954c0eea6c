"""A block's residual step, from its norm to its sum, as one differentiable operation on the CPU.

On a CPU everything around the matrix products costs more than they do, as it is bound by the memory. Here every
product stands beside one pass over the activations (`models.passes`), and what is linear is folded into the weights,
which are small:

    y = (x - mean x) / deviation x               norm
    e = y (W diag(w))' + (W b + c)               product; w, b scale and shift of the norm; W, c the expansion
    d = conv(e), g = gate(d), mean of g          depthwise and gate, or the gate alone
    s = attention(mean of g)                     for each image, or 1
    x + g (a P s)' + a p                         product; P, p the projection; a the scale of each stream

Kept for the backward pass are x with its statistics, e, d and s; y and g are computed again. The gradients of w, a and
s follow from those of the folded weights; the sums over pixels that biases need come with the passes. Small products
of weights are in the weights' own type (float32); only the folded weights are rounded.

`fused.py` has the same step in plain torch for every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dereflect.models import passes
from dereflect.models.arch import whole

FEW_PIXELS = 4096  # of an image, under which one batched product is faster than a product for each image


class Expansion(NamedTuple):
    """The parameters of norm and expansion, from C to E channels.

    norm_weight, norm_bias (C); weight (E, C), bias (E); depthwise (E, 1, 3, 3), depthwise_bias (E) or None.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    depthwise: Tensor | None
    depthwise_bias: Tensor | None


class Projection(NamedTuple):
    """The parameters of attention, projection and scale, from G to K channels with S streams.

    attention (G, G), attention_bias (G) or None; weight (K, G), bias (K); scale (S, K).
    """

    attention: Tensor | None
    attention_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor


class How(NamedTuple):
    shape: tuple[int, int, int]
    """Images, height, width."""
    eps: float
    gate: str
    backend: str

    @property
    def images(self) -> int:
        return self.shape[0]

    @property
    def pixels(self) -> int:
        return self.shape[1] * self.shape[2]

    def folds(self, s: Tensor | None) -> bool:
        """Whether the attention s (images, G) is folded into a projection of each image: where an image has fewer
        pixels than channels, those projections are more numbers than the rows that s would scale otherwise."""
        return s is not None and self.pixels >= s.shape[1]


def residual_step(x: Tensor, expansion: Expansion, projection: Projection, how: How) -> Tensor:
    """The step of rows x (images * height * width, C), in the type of x."""
    if _wants_gradient(x, *expansion, *projection):
        return _Step.apply(x, how, *expansion, *projection)
    return _project(x, _expand(x, expansion, how, keep=False)[0], projection, how)[0]


def expand_and_gate(x: Tensor, expansion: Expansion, how: How) -> Tensor:
    """The first half of the step alone: rows x (images * height * width, C) to g (the same, E / 2)."""
    if _wants_gradient(x, *expansion):
        return _Expand.apply(x, how, *expansion)
    return _expand(x, expansion, how, keep=False)[0].g


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Step(Function):
    @staticmethod
    def forward(ctx, x, how, *weights):
        expansion, projection = Expansion(*weights[:6]), Projection(*weights[6:])
        gated, kept = _expand(x, expansion, how, keep=True)
        out, s = _project(x, gated, projection, how)
        ctx.save_for_backward(x, *kept, gated.means, s, *weights)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, statistics, e, d, means, s, *weights = ctx.saved_tensors
        how, expansion, projection = ctx.how, Expansion(*weights[:6]), Projection(*weights[6:])
        grad = grad.contiguous()
        with torch.autocast("cpu", enabled=False):
            g = passes.gate(e if d is None else d, how.images, how.gate, how.backend)
            backward = _project_backward if s is None or how.folds(s) else _project_backward_of_few
            dg, products, of_attention = backward(grad, g, means, s, projection)
            del g
            dx, sums, of_expansion = _expand_backward(
                dg, x, (statistics, e, d), grad, len(projection.scale), expansion, how
            )
            of_projection = Projection(
                *of_attention,
                weight=(products * projection.scale[:, :, None]).sum(0),
                bias=(sums * projection.scale).sum(0),
                scale=(products * projection.weight).sum(2) + sums * projection.bias,
            )
        return dx, None, *of_expansion, *of_projection


class _Expand(Function):
    @staticmethod
    def forward(ctx, x, how, *weights):
        gated, kept = _expand(x, Expansion(*weights), how, keep=True)
        ctx.save_for_backward(x, *kept, *weights)
        ctx.how = how
        return gated.g

    @staticmethod
    @once_differentiable
    def backward(ctx, dg):
        x, statistics, e, d, *weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            kept = statistics, e, d
            dx, _, found = _expand_backward(dg.contiguous(), x, kept, None, 1, Expansion(*weights), ctx.how)
        return dx, None, *found


# The two halves, forward and backward -----------------------------------------------------------------------


class _Gated(NamedTuple):
    g: Tensor
    means: Tensor | None
    """Of g, (images, G), float32; None without a depthwise convolution."""


def _expand(x: Tensor, expansion: Expansion, how: How, keep: bool) -> tuple[_Gated, tuple[Tensor | None, ...]]:
    """g, and what is to be kept for the backward pass: the statistics of x, e and d."""
    with torch.autocast("cpu", enabled=False):
        y, statistics = passes.norm(x, how.eps, how.backend)
        bias = torch.addmv(expansion.bias, expansion.weight, expansion.norm_bias)
        e = torch.addmm(bias.to(x.dtype), y, _folded_expansion(expansion, x.dtype).t())
        del y
        if expansion.depthwise is None:
            gated, d = _Gated(passes.gate(e, how.images, how.gate, how.backend), None), None
        else:
            convolution = expansion.depthwise, expansion.depthwise_bias
            d, g, sums = passes.depthwise(e.view(*how.shape, -1), *convolution, how.gate, keep, how.backend)
            gated, d = _Gated(g.flatten(0, 2), sums / how.pixels), d.flatten(0, 2) if keep else None
        return gated, (statistics, e, d) if keep else ()


def _expand_backward(
    dg: Tensor, x: Tensor, kept: tuple, added: Tensor | None, groups: int, expansion: Expansion, how: How
) -> tuple[Tensor, Tensor, Expansion]:
    """`added` plus the gradient of x; the sums of `added` over groups of rows; the gradients of the parameters."""
    statistics, e, d = kept
    if d is None:
        de, bias = passes.gate_backward(dg, e, how.images, how.gate, how.backend)
        of_depthwise = None, None
    else:
        images = [rows.view(*how.shape, -1) for rows in (dg, d, e)]
        de, *of_depthwise, bias = passes.depthwise_backward(*images, expansion.depthwise, how.gate, how.backend)
        de = de.flatten(0, 2)
    y, _ = passes.norm(x, how.eps, how.backend)
    folded = (y.t() @ de).t().to(expansion.weight.dtype)  # the gradient of the folded weight
    del y
    dy = de @ _folded_expansion(expansion, x.dtype)
    del de
    dx, sums = passes.norm_backward(dy, x, statistics, added, groups, how.backend)
    found = Expansion(
        norm_weight=(folded * expansion.weight).sum(0),
        norm_bias=expansion.weight.t() @ bias,
        weight=torch.addr(folded * expansion.norm_weight, bias, expansion.norm_bias),
        bias=bias,
        depthwise=of_depthwise[0],
        depthwise_bias=of_depthwise[1],
    )
    return dx, sums, found


def _project(x: Tensor, gated: _Gated, projection: Projection, how: How) -> tuple[Tensor, Tensor | None]:
    """x plus the scaled projection of g, and s."""
    g, s = gated.g, None
    with torch.autocast("cpu", enabled=False):
        if projection.attention is not None:
            means = whole.mean(g.view(*how.shape, -1), gated.means)
            s = F.linear(means, projection.attention, projection.attention_bias)
        if how.folds(s):
            folded = _folded_projection(projection, s).to(x.dtype)
        else:
            g, folded = _attended(g, s), _folded_projection(projection, None).to(x.dtype)
        bias = (projection.scale * projection.bias).to(x.dtype)
        out = (x.view(len(bias), -1, x.shape[1]) + bias[:, None]).view(len(folded), -1, x.shape[1])
        out.baddbmm_(g.view(len(folded), -1, g.shape[1]), folded.mT)
        return out.view_as(x), s


def _project_backward(
    grad: Tensor, g: Tensor, means: Tensor | None, s: Tensor | None, projection: Projection
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """The gradients of g, of scale * weight of each stream (S, K, G), and of the attention's weight and bias."""
    folded = _folded_projection(projection, s)
    products = transposed_products(grad, g, len(folded)).to(folded.dtype)
    rows = grad.view(len(folded), -1, grad.shape[1])
    if s is None:
        return torch.bmm(rows, folded.to(grad.dtype)).view_as(g), products, (None, None)
    plain = _folded_projection(projection, None)  # (S, K, G)
    products = products.view(len(plain), -1, *plain.shape[1:])  # (S, images of it, K, G)
    ds = (products * plain[:, None]).sum(2).view_as(s)
    dmeans = ((ds @ projection.attention) / rows.shape[1]).to(grad.dtype)
    dg = torch.baddbmm(dmeans[:, None], rows, folded.to(grad.dtype)).view_as(g)
    products = (products * s.view(len(plain), -1, 1, s.shape[1])).sum(1)
    return dg, products, (ds.t() @ means, ds.sum(0))


def _project_backward_of_few(
    grad: Tensor, g: Tensor, means: Tensor, s: Tensor, projection: Projection
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As `_project_backward`, where s scaled the rows."""
    plain = _folded_projection(projection, None)
    products = transposed_products(grad, _attended(g, s), len(plain)).to(plain.dtype)
    dp = torch.bmm(grad.view(len(plain), -1, grad.shape[1]), plain.to(grad.dtype)).view(len(s), -1, g.shape[1])
    ds = (dp * g.view_as(dp)).sum(1, dtype=s.dtype)
    dmeans = ((ds @ projection.attention) / dp.shape[1]).to(grad.dtype)
    dg = torch.addcmul(dmeans[:, None], dp, s.to(grad.dtype)[:, None]).view_as(g)
    return dg, products, (ds.t() @ means, ds.sum(0))


def _attended(g: Tensor, s: Tensor | None) -> Tensor:
    """The rows of each image times its s."""
    return g if s is None else (g.view(len(s), -1, g.shape[1]) * s.to(g.dtype)[:, None]).view_as(g)


def _folded_expansion(expansion: Expansion, dtype: torch.dtype) -> Tensor:
    return (expansion.weight * expansion.norm_weight).to(dtype)


def _folded_projection(projection: Projection, s: Tensor | None) -> Tensor:
    """(groups, K, G): the weight with the scale of each stream and the attention of each image."""
    folded = projection.scale[:, :, None] * projection.weight
    if s is None:
        return folded
    return (folded[:, None] * s.view(len(folded), -1, 1, s.shape[1])).flatten(0, 1)


def transposed_products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """(rows, K) and (rows, G) to (groups, K, G): a' b of each group of rows.

    Of many rows, as products of two matrices: the batched product of a transposed operand copies it first.
    """
    a, b = a.view(groups, -1, a.shape[1]), b.view(groups, -1, b.shape[1])
    if groups > 1 and a.shape[1] < FEW_PIXELS:
        return torch.bmm(a.mT, b)
    return torch.stack([mine.t() @ other for mine, other in zip(a, b, strict=True)])
