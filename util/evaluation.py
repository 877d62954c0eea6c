"""Test images through a network, one by one, and how close what comes out is to the truth."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from util.device import release_freed_memory
from util.metrics import quality_assess


@dataclass(frozen=True)
class Separated:
    """A test image, what a network makes of it and the truth; (3, H, W) on the CPU, around 0..1."""

    name: str
    mixture: Tensor
    transmission: Tensor
    reflection: Tensor
    residue: Tensor
    target_t: Tensor
    target_r: Tensor


def separate(batches: Iterable[dict], predict: Callable[[Tensor], tuple[Tensor, ...]]) -> Iterator[Separated]:
    """Every image of a test set.

    Args:
        batches: of `data.build_test_loaders`.
        predict: (B, 3, H, W) -> transmission, reflection and residue, each of the same shape.
    """
    shape = None
    for batch in batches:
        if batch["mixture"].shape != shape:
            release_freed_memory()
            shape = batch["mixture"].shape
        outputs = zip(*(output.cpu() for output in predict(batch["mixture"])), strict=True)
        given = zip(*(batch[key] for key in ("name", "mixture", "target_t", "target_r")), strict=True)
        for parts, (name, mixture, target_t, target_r) in zip(outputs, given, strict=True):
            yield Separated(name, mixture, *parts, target_t, target_r)


def measure(one: Separated, rounded: bool = False) -> dict[str, dict[str, float]]:
    """Metrics of the "model" and of the untouched "input", against the true transmission, in 0..255.

    Args:
        one: the image.
        rounded: take the estimate as a file of 8 bits holds it; the published protocol doesn't.
    """
    target, estimate = _pixels(one.target_t), _pixels(one.transmission.clamp(0, 1))
    return {
        "model": quality_assess(np.floor(estimate + 0.5) if rounded else estimate, target),
        "input": quality_assess(_pixels(one.mixture), target),
    }


def _pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in 0..1 to (H, W, 3) in 0..255."""
    return image.permute(1, 2, 0).numpy() * 255
