"""An evaluation: test images through a network, how close the results are to the truth, and the means over sets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util import disk
from util.device import release_freed_memory
from util.images import write_image
from util.metrics import quality_assess

_THREADS = 4  # that measure beside a GPU


@dataclass(frozen=True)
class Separated:
    """A test image, what a network makes of it and the truth; (3, H, W) on the CPU, around 0..1.

    The residue, around 0, is None for results that were read from files, which don't keep it.
    """

    name: str
    mixture: Tensor
    transmission: Tensor
    reflection: Tensor
    residue: Tensor | None
    target_t: Tensor
    target_r: Tensor


class Mean(NamedTuple):
    """The mean metrics of a number of images."""

    count: int
    values: dict[str, float]


def separate_batches(batches: Iterable[dict], predict: Callable[[Tensor], tuple[Tensor, ...]]) -> Iterator[Separated]:
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


def measure(one: Separated) -> dict[str, dict[str, float]]:
    """Metrics of the "model" and of the untouched "input", against the true transmission, in 0..255."""
    target = _pixels(one.target_t)
    return {
        "model": quality_assess(_pixels(one.transmission.clamp(0, 1)), target),
        "input": quality_assess(_pixels(one.mixture), target),
    }


def write_layers(one: Separated, files: Mapping[str, Path]) -> None:
    """Write some of the results; `files` names a PNG for each."""
    for part, file in files.items():
        with disk.writing(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_image(file, getattr(one, part).permute(1, 2, 0).numpy())


def measure_images(
    images: Iterable[Separated],
    device: torch.device,
    measure: Callable[[Separated], dict[str, dict[str, float]]] = measure,
) -> list[dict]:
    """The metrics of every image of a set.

    Beside a GPU's forward passes, images are measured in threads. On the CPU they are not: the forward passes use all
    cores, and threads beside them would slow them down by more than the measuring takes.

    Args:
        images: of `separate_batches`.
        device: that computes the forward passes.
        measure: returns the metrics of an image; called in a thread.

    Returns:
        A row per image, in the order of the names: {"name": ..., "model": {metric: value}, "input": {metric: value}}.
    """
    if device.type == "cpu":
        measured = [(one.name, measure(one)) for one in images]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            jobs = [(one.name, pool.submit(measure, one)) for one in images]
        measured = [(name, job.result()) for name, job in jobs]
    return sorted(({"name": name} | metrics for name, metrics in measured), key=itemgetter("name"))


def mean_over_images(rows: Sequence[Mapping[str, float]]) -> Mean:
    """The mean of every metric over the images of a set."""
    return Mean(len(rows), {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]})


def mean_over_sets(sets: Sequence[Mean]) -> Mean:
    """The mean of every metric over several sets, weighted by their numbers of images."""
    counts = [one.count for one in sets]
    values = {
        metric: float(np.average([one.values[metric] for one in sets], weights=counts)) for metric in sets[0].values
    }
    return Mean(sum(counts), values)


def _pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in 0..1 to (H, W, 3) in 0..255."""
    return image.permute(1, 2, 0).numpy() * 255
