"""Layers that look at a whole image, in a network that is given the image tile by tile.

Channel attention weighs channels by their mean over the image, `MambaAttention` scans it, and the pyramid stretches its
coarsest features over it. In a tile they find something else than in its neighbours, so the tiles' results would not
fit together. Therefore the tiles go through the network several times. First every such layer notes what it finds in
each tile, and goes on with that. Together the notes are of the whole image, and the next time every tile is given them.

Layers are told apart by the order of their calls, which is the same in every pass.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dereflect.options.arguments import TILE_STRIDE

Span = tuple[int, int]
"""The first pixel, and the one behind the last."""

_here = threading.local()


@dataclass(frozen=True)
class Side:
    """Where a tile lies along one side of an image, in pixels.

    Attributes:
        span: of the tile; it starts at a multiple of 32.
        core: the part of the span that counts for this tile; all cores together are the side, each pixel once.
        length: of the image.
    """

    span: Span
    core: Span
    length: int

    def turned(self) -> "Side":
        """The same, counted from the other end."""
        span, core = ((self.length - end, self.length - start) for start, end in (self.span, self.core))
        return Side(span, core, self.length)

    def widened(self, margin: int) -> slice:
        """The span with so many pixels more at both ends where there are as many.

        Below, features go on from the image's top or from one pixel before it, depending on whether its pixels there
        are even or odd in number. Therefore, modulo 32, the result is as long as the image.
        """
        return slice(max(self.span[0] - margin, 0), min(self.span[1] + margin + self.length % TILE_STRIDE, self.length))

    def within(self, margin: int) -> slice:
        """Where the span lies in the widened one."""
        start = self.widened(margin).start
        return slice(*(edge - start for edge in self.span))

    def scale(self, count: int) -> int:
        """How many pixels of the image each of the tile's `count` pixels stands for, a power of 2."""
        return 2 ** round(math.log2((self.span[1] - self.span[0]) / count))

    def of_core(self, count: int) -> slice:
        """The core among the tile's `count` pixels."""
        scale = self.scale(count)
        return slice(*(-(-(edge - self.span[0]) // scale) for edge in self.core))

    def of_image(self, count: int, core: bool = False) -> slice:
        """The tile's `count` pixels, or the core, among those of the image."""
        scale = self.scale(count)
        start = -(-self.span[0] // scale)
        if not core:
            return slice(start, start + count)
        part = self.of_core(count)
        return slice(start + part.start, start + part.stop)


Place = tuple[Side, Side]
"""Where a tile lies: among the rows, and among the columns."""


Turn = tuple[int, bool]
"""How an image is turned: so many times by 90 degrees to the left, and whether it is then flipped across."""
TURNS: list[Turn] = [(turns, flipped) for turns in range(4) for flipped in (False, True)]


def turned(place: Place, turns: int, flipped: bool) -> Place:
    """The place in the image that was turned."""
    rows, columns = place
    for _ in range(turns):
        rows, columns = columns.turned(), rows
    return (rows, columns.turned()) if flipped else (rows, columns)


@dataclass
class Found:
    """What a network's layers have found in an image, in the order of their calls.

    Attributes:
        means: the sum over the image, (N, C), and the number of its pixels.
        maps: an image that the layer looks at, (N, C, H, W).
    """

    means: list[tuple[Tensor, int]] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)


class Whole:
    """What a network's layers find in an image; gathered by all tiles once, and again with what is known by then."""

    def __init__(self) -> None:
        self._known: Found | None = None
        self._noted: Found | None = Found()
        self._looked: set[int] = set()

    def finish(self, last: bool) -> None:
        """All tiles have been seen; from now on layers take what was found. `last`: and no longer note anything."""
        self._known, self._noted = self._noted, None if last else Found()
        self._looked.clear()

    @contextmanager
    def tile(self, place: Place) -> Iterator[None]:
        """The network is given the tile at this place, in this thread and in the block."""
        self._place, self._mean, self._map = place, 0, 0
        _here.whole = self
        try:
            yield
        finally:
            _here.whole = None

    def mean(self, x: Tensor, own: Tensor) -> Tensor:
        number, self._mean = self._mean, self._mean + 1
        if self._noted:
            core = x[:, self._place[0].of_core(x.shape[1]), self._place[1].of_core(x.shape[2])]
            found = core.sum((1, 2), dtype=torch.float32), core.shape[1] * core.shape[2]
            if number == len(self._noted.means):
                self._noted.means.append(found)
            else:
                total, count = self._noted.means[number]
                self._noted.means[number] = total + found[0], count + found[1]
        if not self._known:
            return own
        total, count = self._known.means[number]
        return (total / count).to(own.dtype)

    def look(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        number, self._map = self._map, self._map + 1
        sides = list(zip(self._place, x.shape[2:], strict=True))
        if self._noted:
            maps = self._noted.maps
            if number == len(maps):
                maps.append(x.new_zeros(*x.shape[:2], *(-(-side.length // side.scale(n)) for side, n in sides)))
            top, left = (side.of_image(n, core=True) for side, n in sides)
            own_top, own_left = (side.of_core(n) for side, n in sides)
            maps[number][:, :, top, left] = x[:, :, own_top, own_left]
        if not self._known:
            return layer(x)
        if number not in self._looked:  # once, and then its result stands here
            self._looked.add(number)
            image = self._known.maps[number].contiguous(memory_format=torch.channels_last)
            self._known.maps[number] = layer(image)
        top, left = (side.of_image(n) for side, n in sides)
        return self._known.maps[number][:, :, top, left]

    def stretch(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        for dim, side, count in zip((2, 3), self._place, size, strict=True):
            coarse, fine = side.scale(x.shape[dim]), side.scale(count)
            step = (-(-side.length // coarse) - 1) / max(-(-side.length // fine) - 1, 1)
            at = step * (torch.arange(count, device=x.device) + side.span[0] // fine) - side.span[0] // coarse
            x = _interpolated(x, at.clamp(0, x.shape[dim] - 1), dim)
        return x


def _interpolated(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """x between its pixels at these places along one side."""
    before = at.floor().long()
    after = (before + 1).clamp(max=x.shape[dim] - 1)
    share = (at - before).to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim))
    return torch.lerp(x.index_select(dim, before), x.index_select(dim, after), share)


def _whole() -> Whole | None:
    # A compiled or exported network is never given tiles.
    return None if torch.compiler.is_compiling() else getattr(_here, "whole", None)


def mean(x: Tensor, own: Tensor) -> Tensor:
    """The mean over the image that x belongs to.

    Args:
        x: (N, H, W, C), of an image or of a tile.
        own: the mean of x, (N, C).
    """
    whole = _whole()
    return own if whole is None else whole.mean(x, own)


def look(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's result at x, (N, C, H, W) each, where the layer looks at the whole image that x belongs to."""
    whole = _whole()
    return layer(x) if whole is None else whole.look(x, layer)


def stretch(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) to another size by bilinear interpolation between the corners of the image that x belongs to."""
    whole = _whole()
    if whole is None:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    return whole.stretch(x, size)
