"""A large image in overlapping tiles, and the tiles' results joined without seams.

Along each side there are as few tiles as possible, of nearly equal length. All start at multiples of 32, where the
coarsest pixels of the networks' features start, too. Where two tiles overlap, one fades into the other along half a
cosine in the middle of the overlap: predictions near a tile's border, which lack context, get weight 0. The weights of
all tiles sum to 1 everywhere. What layers find in the whole image is gathered first (see `models.arch.whole`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise, product

import numpy as np

from dereflect.models.arch.whole import Place, Side, Span
from dereflect.options.arguments import TILE_STRIDE

_FADING = 0.75  # share of the overlap, in its middle, in which one tile fades into the next
LOOKS = 2
_LOOKING_OVERLAP = TILE_STRIDE  # of the tiles in which layers look for what is in the whole image


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """The tiles that cover `length` pixels: each at most `tile` long, overlapping the next by `overlap` or a bit more.

    Args:
        length: of the side, at least 1.
        tile, overlap: multiples of 32, the tile at least twice the overlap.
    """
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    size = _aligned((length + (count - 1) * overlap) / count)
    starts = [_aligned(index * (length - size) / (count - 1)) for index in range(count)]
    return [(start, min(start + size, length)) for start in starts]


def weights(tiles: Sequence[Span]) -> list[np.ndarray]:
    """The weight of each pixel of every tile along one side, float32; at every place the tiles' weights sum to 1."""
    length = tiles[-1][1]
    entering = np.ones(length)
    result = []
    for (start, end), following in zip(tiles, [*tiles[1:], None], strict=True):
        leaving = np.zeros(length) if following is None else _fade(length, following[0], end)
        result.append((entering - leaving)[start:end].astype(np.float32))
        entering = leaving
    return result


def blend(
    size: tuple[int, int],
    separate: Callable[[Place], Sequence[np.ndarray]],
    tile: int,
    overlap: int,
    watch: Callable[[Iterable, int], Iterable] = lambda places, total: places,
    look: Callable[[Place, bool], None] | None = None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Compute an image's results tile by tile; yield them in bands of whole rows, from top to bottom.

    Only one band of each result, as many rows as a tile has, is in memory.

    Args:
        size: height and width of the image.
        separate: a tile's place -> its results, (h, w, C) each, the same number of them for every tile.
        tile, overlap: as of `spans`.
        watch: called with the tiles and their number, returns an iterable of the tiles that shows progress.
        look: called `LOOKS` times with the place of each of several tiles that overlap less, and with whether it is the
            last of them, before `separate` is called.

    Yields:
        The band's first row, and the band of each result, float32 (rows, W, C), valid until the next band.
    """
    height, width = size
    down, across = (_sides(length, tile, overlap) for length in size)
    down_weights, across_weights = (weights([side.span for side in sides]) for sides in (down, across))
    places = list(product(down, across))
    looks = list(product(*(_sides(length, tile, _LOOKING_OVERLAP) for length in size))) if look and places[1:] else []
    coming = iter(watch([*looks * LOOKS, *places], len(looks) * LOOKS + len(places)))
    for number, place in enumerate(islice(coming, len(looks) * LOOKS), 1):
        look(place, number % len(looks) == 0)
    bands: list[np.ndarray] = []
    for number, place in enumerate(coming):
        row, column = divmod(number, len(across))
        (top, bottom), (left, right) = (side.span for side in place)
        results = separate(place)
        if not bands:
            bands = [np.zeros((bottom - top, width, result.shape[2]), np.float32) for result in results]
        weight = down_weights[row][:, None, None] * across_weights[column][None, :, None]
        for band, result in zip(bands, results, strict=True):
            band[: bottom - top, left:right] += weight * result
        if column == len(across) - 1:
            finished = (down[row + 1].span[0] if row + 1 < len(down) else height) - top
            yield top, [band[:finished] for band in bands]
            for band in bands:
                band[: len(band) - finished] = band[finished:]
                band[len(band) - finished :] = 0


def _sides(length: int, tile: int, overlap: int) -> list[Side]:
    """The tiles along one side; their cores meet in the middle of the overlaps."""
    tiles = spans(length, tile, overlap)
    middles = [_aligned((start + end) / 2 - TILE_STRIDE / 2) for (_, end), (start, _) in pairwise(tiles)]
    cuts = [0, *middles, length]
    return [Side(span, core, length) for span, core in zip(tiles, pairwise(cuts), strict=True)]


def _fade(length: int, start: int, end: int) -> np.ndarray:
    """0 to 1 over (length,) pixels, along half a cosine in the middle of [start, end)."""
    place = (np.arange(length) + 0.5 - (start + end) / 2) / (_FADING * (end - start))
    return (1 + np.sin(np.pi * np.clip(place, -0.5, 0.5))) / 2


def _aligned(value: float) -> int:
    """The next multiple of 32."""
    return int(-(-value // TILE_STRIDE)) * TILE_STRIDE
