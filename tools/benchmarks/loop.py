"""`data`: training samples a second, as the training's loader makes them."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dereflect.data import build_train_loader, discover
from dereflect.data.demo import build_demo
from dereflect.data.folders import Sets
from dereflect.data.loader import Loader
from dereflect.options import parse_train
from dereflect.tools.benchmarks import machine, output
from dereflect.tools.benchmarks.common import Measurement, progress
from dereflect.util.errors import UserError

ENDLESS = 10**6  # samples an epoch: none ends while it's measured
COLUMNS = {
    "samples": "{samples}",
    "samples/s": "{rate:.1f}",
    "a core": "{rate_a_core:.1f}",
    "reading": "{reading:.0%}",
}


def run_data(options: argparse.Namespace) -> None:
    if options.base_dir and not options.base_dir.is_dir():
        raise UserError(f"--base_dir {options.base_dir}: there is no such folder")
    rates = machine.ceilings("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.base_dir or Path(scratch) / "demo"
        if not options.base_dir:
            build_demo(folder)
        sets = discover(training_options(options, folder, workers=0, cache=0))
        found = [
            measure(options, folder, sets, workers, cache)
            for workers, cache in itertools.product(options.nThreads, options.cache_images)
        ]
    header = machine.setting(options, "cpu", rates) | {"data": "; ".join(sets.describe())}
    output.report(options, header, [output.table("training samples", found, COLUMNS)], found)


def training_options(options: argparse.Namespace, folder: Path, workers: int, cache: float) -> argparse.Namespace:
    """The options of a training on the data of `folder`."""
    given = {
        "base_dir": folder,
        "crop_size": options.crop_size,
        "epoch_size": ENDLESS,
        "nThreads": workers,
        "cache_images": cache,
    }
    return parse_train([f"--{name}={value}" for name, value in given.items()])


def measure(options: argparse.Namespace, folder: Path, sets: Sets, workers: int, cache: float) -> Measurement:
    """Count samples, in batches of one, for --seconds, once the cache and the workers' queues are full."""
    result = Measurement({"workers": workers, "cache GiB": cache})
    progress(f"{workers} workers, cache of {cache:g} GiB")
    try:
        loader = build_train_loader(training_options(options, folder, workers, cache), sets)
    except UserError as error:
        result.note = str(error)
        return result
    samples = iter(loader)
    for _ in range(sum(sets.sizes.values()) if cache else 8 * max(1, workers)):
        next(samples)
    reading = None if workers else time_reading(loader)
    count, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < options.seconds or not count:
        next(samples)
        count += 1
        seconds = time.perf_counter() - began
    result.seconds = [seconds]
    result.figures = {
        "samples": count,
        "rate": count / seconds,  # a second
        "rate_a_core": count / seconds / max(1, workers),
        "reading": reading() / seconds if reading else None,  # share of the time
    }
    progress("")
    return result


def time_reading(loader: Loader) -> Callable[[], float]:
    """Start timing the reading of images in this process; return a function that gives the seconds so far."""
    images = loader.dataset.images
    read, spent = images.read, []

    def timed(file: Path):
        began = time.perf_counter()
        image = read(file)
        spent.append(time.perf_counter() - began)
        return image

    images.read = timed
    return lambda: sum(spent)
