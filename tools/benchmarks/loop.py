"""`data`: training samples a second, as the training's loader makes them."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from dereflect.data import build_train_loader, discover
from dereflect.data.demo import build_demo
from dereflect.data.folders import Sets
from dereflect.data.loader import Loader
from dereflect.options import parse_train
from dereflect.tools.benchmarks import machine, output
from dereflect.tools.benchmarks.common import Measurement, progress
from dereflect.tools.benchmarks.published import published_samples
from dereflect.tools.benchmarks.variants import PUBLISHED
from dereflect.util.errors import UserError

ENDLESS = 10**6  # samples an epoch: none ends while it's measured
ROUNDS = 4  # of taking turns with the published code
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
        published = published_samples(options.against, sets) if options.against else None
        found = [
            m
            for workers, cache in itertools.product(options.nThreads, options.cache_images)
            for m in measure(options, folder, sets, workers, cache, published)
        ]
    header = machine.setting(options, "cpu", rates) | {"data": "; ".join(sets.describe())}
    columns = COLUMNS | ({f"x {PUBLISHED}": "{ratio:.2f}"} if published else {})
    output.report(options, header, [output.table("training samples", found, columns)], found)


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


def measure(
    options: argparse.Namespace, folder: Path, sets: Sets, workers: int, cache: float, published: Dataset | None
) -> list[Measurement]:
    """Count samples, in batches of one, for --seconds, once the cache and the workers' queues are full.

    Where there are the published code's samples, they come in turn with ours, one process and no cache.
    """
    ours = Measurement({"code": "ours", "workers": workers, "cache GiB": cache})
    progress(f"{workers} workers, cache of {cache:g} GiB")
    try:
        loader = build_train_loader(training_options(options, folder, workers, cache), sets)
    except UserError as error:
        ours.note = str(error)
        return [ours]
    sources = [(ours, iter(loader))]
    if published:
        theirs = Measurement({"code": PUBLISHED, "workers": 0, "cache GiB": 0.0})
        sources.insert(0, (theirs, endless(DataLoader(published, shuffle=True))))
    for _ in range(sum(sets.sizes.values()) if cache else 8):
        next(sources[-1][1])
    reading = None if workers else time_reading(loader)
    turns = ROUNDS if published else 1
    for _ in range(turns):
        for m, samples in sources:
            for _ in range(8 * m.what["workers"]):  # what was made while others had their turn
                next(samples)
            count, seconds = count_samples(samples, options.seconds / turns)
            m.figures["samples"] = m.figures.get("samples", 0) + count
            m.seconds = [sum(m.seconds) + seconds]
    progress("")
    for m, _ in sources:
        m.figures["rate"] = m.figures["samples"] / m.seconds[0]  # a second
        m.figures["rate_a_core"] = m.figures["rate"] / max(1, m.what["workers"])
        m.figures["ratio"] = m.figures["rate"] / sources[0][0].figures["rate"]
    if reading:
        ours.figures["reading"] = reading() / ours.seconds[0]  # share of the time
    return [m for m, _ in sources]


def endless(samples: Iterable) -> Iterator:
    """The samples, again and again."""
    while True:
        yield from samples


def count_samples(samples: Iterator, least: float) -> tuple[int, float]:
    """Take samples until some seconds are over; return their number and the seconds."""
    count, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < least or not count:
        next(samples)
        count += 1
        seconds = time.perf_counter() - began
    return count, seconds


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
