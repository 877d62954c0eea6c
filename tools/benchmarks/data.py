"""`data`: training samples a second, as the training's loader makes them."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data import build_train_loader, discover
from data.demo import build_demo
from data.folders import Sets
from data.loader import Loader
from options import parse_train
from options.arguments import natural_float, natural_int, positive_int
from tools.benchmarks import common
from util.errors import UserError

ENDLESS = 10**6  # samples an epoch: none ends while it's measured


@dataclass
class Measurement:
    """One number of workers with one size of the cache."""

    workers: int
    cache: float  # GiB
    samples: int = 0
    seconds: float = 0.0
    reading: float | None = None  # share of the time in reading and decoding files; without workers
    note: str = ""

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds

    @property
    def rate_a_core(self) -> float:
        return self.rate / max(1, self.workers)


def add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="training samples a second",
        description="Makes training samples, decoded, cropped, augmented and mixed, as fast as the workers can and "
        "nobody else does anything. Where images are cached, a first pass over the data fills the cache. 'reading' "
        "is the share of the time that goes into images, from file or cache, where no workers do it.",
    )
    parser.set_defaults(run=run_data)
    parser.add_argument("--base_dir", type=Path, metavar="DIR",
                        help="data in the training's layout (default: the demo set, made for the while)")  # fmt: skip
    parser.add_argument("--crop_size", type=positive_int, default=224, metavar="PIXELS",
                        help="side of the crops, a multiple of 16 (default: 224)")  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=natural_int, default=[0, 1, 2], metavar="N",
                        help="worker processes, 0 for none (default: 0 1 2)")  # fmt: skip
    parser.add_argument("--cache_images", nargs="+", type=natural_float, default=[0.0, 1.0], metavar="GIB",
                        help="memory to keep decoded images in (default: 0 1)")  # fmt: skip
    parser.add_argument("--seconds", type=natural_float, default=10.0, metavar="S",
                        help="to count samples for, each time (default: 10)")  # fmt: skip
    common.add_output(parser)


def run_data(options: argparse.Namespace) -> int:
    if options.crop_size % 16:
        raise UserError(f"--crop_size {options.crop_size}: must be a multiple of 16")
    if options.base_dir and not options.base_dir.is_dir():
        raise UserError(f"--base_dir {options.base_dir}: there is no such folder")
    rates = common.ceilings("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.base_dir or Path(scratch) / "demo"
        if not options.base_dir:
            build_demo(folder)
        sets = discover(training_options(options, folder, workers=0, cache=0))
        results = [
            measure(options, folder, sets, workers, cache)
            for workers, cache in itertools.product(options.workers, options.cache_images)
        ]
    header = common.with_ceilings(options, "cpu", rates) | {"data": "; ".join(sets.describe())}
    common.report(options, header, [data_table(results)], ceilings=rates, measurements=[_record(m) for m in results])
    return 0


def training_options(options: argparse.Namespace, folder: Path, workers: int, cache: float) -> argparse.Namespace:
    """Those of a training on that data."""
    given = {"base_dir": folder, "crop_size": options.crop_size, "epoch_size": ENDLESS} | {
        "nThreads": workers,
        "cache_images": cache,
    }
    return parse_train([f"--{name}={value}" for name, value in given.items()])


def measure(options: argparse.Namespace, folder: Path, sets: Sets, workers: int, cache: float) -> Measurement:
    """Count samples, one a batch, for --seconds, after those that fill the cache and the workers' queues."""
    result = Measurement(workers, cache)
    common.progress(f"{workers} workers, cache of {cache:g} GiB")
    try:
        loader = build_train_loader(training_options(options, folder, workers, cache), sets)
    except UserError as error:
        result.note = str(error)
        return result
    samples = iter(loader)
    for _ in range(sum(sets.sizes.values()) if cache else 8 * max(1, workers)):
        next(samples)
    clock = None if workers else time_reading(loader)
    began = time.perf_counter()
    while result.seconds < options.seconds or not result.samples:
        next(samples)
        result.samples += 1
        result.seconds = time.perf_counter() - began
    if clock:
        result.reading = clock() / result.seconds
    common.progress("")
    return result


def time_reading(loader: Loader) -> Callable[[], float]:
    """From now on, time the reading of images in this process; returns what tells the seconds so far."""
    images = loader.dataset.images
    read, spent = images.read, []

    def timed(file: Path):
        began = time.perf_counter()
        image = read(file)
        spent.append(time.perf_counter() - began)
        return image

    images.read = timed
    return lambda: sum(spent)


def data_table(results: list[Measurement]) -> tuple[str, common.Rows]:
    """Title and rows."""
    rows = [["workers", "cache GiB", "samples", "samples/s", "a core", "reading"]]
    for m in results:
        if m.note:
            rows.append([str(m.workers), f"{m.cache:g}", m.note, "", "", ""])
            continue
        reading = "" if m.reading is None else f"{m.reading:.0%}"
        rows.append([str(m.workers), f"{m.cache:g}", str(m.samples), f"{m.rate:.1f}", f"{m.rate_a_core:.1f}", reading])
    return "training samples", rows


def _record(m: Measurement) -> dict[str, object]:
    """As JSON has it."""
    return asdict(m) | ({} if m.note else {"rate": m.rate, "rate_a_core": m.rate_a_core})
