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

from dereflect.util import disk
from dereflect.util.device import release_freed_memory
from dereflect.util.images import write_image
from dereflect.util.metrics import aligned_psnr, joint_psnr, quality_assess

BASELINES: dict[str, Callable] = {"gamma 1.2": lambda image: image**1.2, "times 0.9": lambda image: 0.9 * image}
"""Changes of the mixture that cost nothing; (3, H, W) or (H, W, 3) in 0..1."""

_THREADS = 4  # that measure beside a GPU
_WORSE = 0.1  # dB that count as harm


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


def measure(one: Separated, untouched: dict[str, float] | None = None) -> dict[str, dict[str, float]]:
    """Metrics of the "model" and of the untouched "input", against the true transmission, in 0..255.

    Args:
        untouched: the input's metrics, where they are known.
    """
    target = pixels(one.target_t)
    return {
        "model": quality_assess(pixels(one.transmission.clamp(0, 1)), target),
        "input": untouched or quality_assess(pixels(one.mixture), target),
    }


def estimates_of(one: Separated, rounded: bool, baselines: Sequence[str]) -> dict[str, np.ndarray]:
    """The transmission, what the baselines make of the mixture, and the mixture; (H, W, 3) in 0..255."""
    found = {"model": one.transmission.clamp(0, 1)} | {name: BASELINES[name](one.mixture) for name in baselines}
    estimates = {kind: pixels(image) for kind, image in found.items()}
    if rounded:
        estimates = {kind: np.floor(image + 0.5) for kind, image in estimates.items()}
    return estimates | {"input": pixels(one.mixture)}


def judge(estimates: Mapping[str, np.ndarray], target: np.ndarray) -> dict[str, dict[str, float]]:
    """The metrics of every estimate of an image, "input" among them; (H, W, 3) in 0..255."""
    found: dict[str, dict[str, float]] = {}
    for kind, image in estimates.items():
        found[kind] = quality_assess(image, target)
        found[kind] |= {"PSNR_joint": joint_psnr(image, target), "PSNR_aligned": aligned_psnr(image, target)}
    untouched = found["input"]["PSNR_joint"]
    for values in found.values():
        gain = values["PSNR_joint"] - untouched
        values |= {"worse": float(gain < -_WORSE), "gain": gain}
    return found


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


def pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in 0..1 to (H, W, 3) in 0..255."""
    return image.permute(1, 2, 0).numpy() * 255
