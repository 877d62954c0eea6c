"""How far an image that is separated in tiles is from the same image separated as a whole."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dereflect.data.demo import write_examples
from dereflect.models import tiles
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.features import build_features
from dereflect.models.separator import PARTS, Separator, load_separator
from dereflect.options.arguments import TILE_STRIDE
from dereflect.tools.inspection.field import prepared
from dereflect.util.device import choose_device
from dereflect.util.images import read_image

_ENLARGED = 2  # times, the example photograph
WAYS = ("by themselves", "as parts of the whole")


class Difference(NamedTuple):
    """Largest and mean absolute difference of a part of the result, in levels of 255."""

    largest: float
    mean: float


def example() -> np.ndarray:
    """A photograph with a soft reflection, made of two that come with scikit-image; uint8 (768, 1152, 3)."""
    with tempfile.TemporaryDirectory() as folder, Image.open(write_examples(Path(folder))[0]) as image:
        size = [_ENLARGED * side for side in image.size]
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def photograph(path: Path | None) -> np.ndarray:
    """A file's pixels, or, without one, the example's."""
    return example() if path is None else read_image(path)


def separator_of(name: str, checkpoint: Path | None, scales: float, vgg_weights: str, tile: int) -> Separator:
    """A separator with tiles of that size; weights as of `tools.inspection.field.prepared`."""
    if checkpoint:
        loaded = load_separator(checkpoint, name, vgg_weights, precision="fp32")
        return Separator(loaded.model, tile)
    network = prepared(name, None, scales)
    model = DSRNetModel(network, build_features(network.features, vgg_weights), loss=None)
    return Separator(model.to(choose_device(None)), tile)


def differences(separator: Separator, image: np.ndarray) -> dict[str, list[Difference]]:
    """T and R of an image in tiles against the whole, by the ways in which tiles are separated (`WAYS`).

    Args:
        separator: with tiles smaller than the image.
        image: as of `Separator.separate`.
    """
    whole = _whole(separator, image).separate(image)
    alone = _tiles_alone(separator, image)
    together = separator.separate(image)
    return {
        way: [_difference(getattr(whole, part), made) for part, made in zip(PARTS[:2], parts, strict=True)]
        for way, parts in zip(WAYS, (alone, [getattr(together, part) for part in PARTS[:2]]), strict=True)
    }


def _tiles_alone(separator: Separator, image: np.ndarray) -> list[np.ndarray]:
    """T and R where every tile is separated as if it were an image of its own."""
    one = _whole(separator, image)

    def separate(place: tiles.Place) -> Sequence[np.ndarray]:
        parts = one.separate(image[tuple(slice(*side.span) for side in place)])
        return [getattr(parts, part) for part in PARTS[:2]]

    size = image.shape[:2]
    made = [np.empty(image.shape, np.float32) for _ in PARTS[:2]]
    for top, bands in tiles.blend(size, separate, separator.tile_for(*size), separator.overlap_for(*size)):
        for part, band in zip(made, bands, strict=True):
            part[top : top + len(band)] = band
    return made


def _whole(separator: Separator, image: np.ndarray) -> Separator:
    """The same, without tiles."""
    side = -(-max(image.shape[:2]) // TILE_STRIDE) * TILE_STRIDE
    return Separator(separator.model, max(side, 2 * TILE_STRIDE), self_ensemble=separator.self_ensemble)


def _difference(a: np.ndarray, b: np.ndarray) -> Difference:
    error = np.abs(a.clip(0, 1) - b.clip(0, 1)) * 255
    return Difference(float(error.max()), float(error.mean()))
