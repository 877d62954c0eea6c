"""A large image in overlapping tiles, and the tiles' results joined without seams.

Along each side there are as few tiles as possible, of nearly equal length. All start at multiples of `STRIDE`, where
the network's coarsest pixels start, too. Where two tiles overlap, one fades into the other along half a cosine in the
middle of the overlap: predictions near a tile's border, which lack context, get weight 0. The weights of all tiles
sum to 1 everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dereflect.options.arguments import STRIDE

_FADING = 0.75  # share of the overlap, in its middle, in which one tile fades into the next

Span = tuple[int, int]
"""Where a tile starts and ends along one side of the image."""


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """The tiles that cover `length` pixels: each at most `tile` long, overlapping the next by `overlap` or a bit more.

    Args:
        length: of the side, at least 1.
        tile, overlap: multiples of STRIDE, the tile at least twice the overlap.
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
    image: np.ndarray,
    separate: Callable[[np.ndarray], Sequence[np.ndarray]],
    tile: int,
    overlap: int,
    watch: Callable[[Iterable, int], Iterable] = lambda places, total: places,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Compute an image's results tile by tile; yield them in bands of whole rows, from top to bottom.

    Only one band of each result, as many rows as a tile has, is in memory beside the image.

    Args:
        image: (H, W, ...), of any type.
        separate: a tile (h, w, ...) -> the results, (h, w, C) each, the same number of them for every tile.
        tile, overlap: as of `spans`.
        watch: called with the tiles and their number, returns an iterable of the tiles that shows progress.

    Yields:
        The band's first row, and the band of each result, float32 (rows, W, C), valid until the next band.
    """
    height, width = image.shape[:2]
    down, across = spans(height, tile, overlap), spans(width, tile, overlap)
    down_weights, across_weights = weights(down), weights(across)
    places = [(row, column) for row in range(len(down)) for column in range(len(across))]
    bands: list[np.ndarray] = []
    for row, column in watch(places, len(places)):
        (top, bottom), (left, right) = down[row], across[column]
        results = separate(image[top:bottom, left:right])
        if not bands:
            bands = [np.zeros((bottom - top, width, result.shape[2]), np.float32) for result in results]
        weight = down_weights[row][:, None, None] * across_weights[column][None, :, None]
        for band, result in zip(bands, results, strict=True):
            band[: bottom - top, left:right] += weight * result
        if column == len(across) - 1:
            finished = (down[row + 1][0] if row + 1 < len(down) else height) - top
            yield top, [band[:finished] for band in bands]
            for band in bands:
                band[: len(band) - finished] = band[finished:]
                band[len(band) - finished :] = 0


def _fade(length: int, start: int, end: int) -> np.ndarray:
    """0 to 1 over (length,) pixels, along half a cosine in the middle of [start, end)."""
    place = (np.arange(length) + 0.5 - (start + end) / 2) / (_FADING * (end - start))
    return (1 + np.sin(np.pi * np.clip(place, -0.5, 0.5))) / 2


def _aligned(value: float) -> int:
    """The next multiple of STRIDE."""
    return int(-(-value // STRIDE)) * STRIDE
