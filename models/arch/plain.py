"""DSRNet written plainly: two passes for two streams, ordinary layers, contiguous layout.

It is a second implementation, with which tests compare the real one's results and benchmarks its cost. It reads the
parameters of a real network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.models.arch.blocks import MuGI
from dereflect.models.arch.dsrnet import DSRNet


def plain_forward(net: DSRNet, mixture: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `net(mixture, features)` returns, computed stream by stream."""
    p, u, m = net.pyramid, net.unet, net.residue
    laterals = [_pair(block, v, v) for block, v in zip(p.lateral, features, strict=True)]
    f = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True) for x in laterals[4]]
    for level in (3, 2, 1):
        f = [p.fuse[level](torch.cat(both, 1)) for both in zip(f, laterals[level], strict=True)]
        f = _pair(p.refine[level], *(F.pixel_shuffle(x, 2) for x in f))
    f = _pair(p.refine[0], *(p.fuse[0](torch.cat(both, 1)) for both in zip(f, laterals[0], strict=True)))
    f = _pair(p.refine_narrow, *(p.narrow(x) for x in f))
    fine = _pair(p.image[1], p.image[0](mixture), p.image[0](mixture))
    x = [p.fuse_image(torch.cat(both, 1)) for both in zip(f, fine, strict=True)]
    skips = []
    for blocks, down in zip(u.encoders, u.downs, strict=True):
        for block in blocks:
            x = _pair(block, *x)
        skips.append(x)
        x = [down(stream) for stream in x]
    for block in u.middle:
        x = _pair(block, *x)
    for up, blocks in zip(u.ups, u.decoders, strict=True):
        x = [F.pixel_shuffle(up(stream), 2) + skip for stream, skip in zip(x, skips.pop(), strict=True)]
        for block in blocks:
            x = _pair(block, *x)
    t, r = (net.head(stream, mixture) for stream in x)
    x = [m.expand(stream) for stream in x]
    for block in m.interact:
        x = _pair(block, *x)
    joined = torch.cat(x, 1)
    for block in m.merge:
        joined = _single(block, joined)
    return t, r, torch.tanh(m.head(joined))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return norm.weight.view(1, -1, 1, 1) * (x - mean) / (variance + norm.eps).sqrt() + norm.bias.view(1, -1, 1, 1)


def _attend(block: MuGI, x: Tensor) -> Tensor:
    return x * block.attention(F.adaptive_avg_pool2d(x, 1))


def _pair(block: MuGI, x: Tensor, y: Tensor) -> list[Tensor]:
    a, b = list(block.a), list(block.b) * (3 - len(block.b))
    (x1, x2), (y1, y2) = (block.depthwise(block.expand1(_norm(block.norm1, z))).chunk(2, 1) for z in (x, y))
    x = x + block.project1(_attend(block, x1 * y2)) * a[0]
    y = y + block.project1(_attend(block, y1 * x2)) * a[1]
    (x1, x2), (y1, y2) = (block.expand2(_norm(block.norm2, z)).chunk(2, 1) for z in (x, y))
    return [x + block.project2(x1 * y2) * b[0], y + block.project2(y1 * x2) * b[1]]


def _single(block: MuGI, x: Tensor) -> Tensor:
    x1, x2 = block.depthwise(block.expand1(_norm(block.norm1, x))).chunk(2, 1)
    x = x + block.project1(_attend(block, x1 * x2)) * block.a[0]
    x1, x2 = block.expand2(_norm(block.norm2, x)).chunk(2, 1)
    return x + block.project2(x1 * x2) * block.b[0]
