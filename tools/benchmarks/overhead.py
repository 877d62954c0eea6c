"""`eval`: an evaluation, with its reading, metrics and pictures, beside its forward passes alone."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dereflect.data import Loaders, build_test_loaders, discover
from dereflect.data.folders import MIXTURE, TRANSMISSION
from dereflect.data.loader import Loader
from dereflect.engine import Engine
from dereflect.models import build_model
from dereflect.options import parse_train
from dereflect.tools.benchmarks import common, machine, output
from dereflect.tools.benchmarks.common import Measurement
from dereflect.util.device import keep_freed_memory, set_deterministic, wants_bf16
from dereflect.util.distributed import join
from dereflect.util.program import Interrupt
from dereflect.util.run.folder import RunFolder

TEST_SET = "random"
COLUMNS = {
    "ms": "{milliseconds:.0f}",
    "min..max": "{fastest:.0f}..{slowest:.0f}",
    "images/s": "{images_a_second:.2f}",
    "x forward passes": "{overhead:.2f}",
}


def run_eval(options: argparse.Namespace) -> None:
    device = common.choose_device(options)
    common.check_models([options.inet])
    rates = machine.ceilings(device)
    with tempfile.TemporaryDirectory() as scratch:
        write_test_set(Path(scratch) / "test" / TEST_SET, options.images, tuple(options.size))
        engine, loader = build_engine(options, device, Path(scratch))
        found = measure(engine, loader, options, device)
    width, height = options.size
    title = f"{options.inet}, {options.images} images of {width} x {height} ({device})"
    output.report(options, machine.setting(options, device, rates), [output.table(title, found, COLUMNS)], found)


def write_test_set(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Pairs of smooth random pictures of `size` (width, height)."""
    rng = np.random.default_rng(0)
    for layer in (MIXTURE, TRANSMISSION):
        (folder / layer).mkdir(parents=True)
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / layer / f"{number:04}.png")


def build_engine(options: argparse.Namespace, device: str, folder: Path) -> tuple[Engine, Loader]:
    """An engine as in a run of train_sirs.py that only evaluates, and the loader of its test set."""
    given = {
        "inet": options.inet,
        "base_dir": folder,
        "checkpoints_dir": folder,
        "precision": options.precision,
        "eval_batch": options.eval_batch,
        "vgg_weights": "random",
    }
    training = parse_train([f"--{name}={value}" for name, value in given.items()])
    training.save_images, training.nEpochs = options.save_images, 0
    world = join(options.gpu_ids if device == "cuda" else [])
    loaders = Loaders(None, None, build_test_loaders(training, discover(training)))
    keep_freed_memory()
    set_deterministic(training.seed)
    model = build_model(training, wants_bf16(training.precision, world.device))
    return Engine(training, model, loaders, world, RunFolder(folder / "run")), loaders.tests[TEST_SET]


def measure(engine: Engine, loader: Loader, options: argparse.Namespace, device: str) -> list[Measurement]:
    """Measure evaluations and, in turn with them, the forward passes of their batches alone."""
    batches = [batch["mixture"].to(device) for batch in loader]

    def forwards() -> None:
        for batch in batches:
            engine.model.predict(batch)

    engine.model.eval()
    engine.model.predict(batches[0])  # warms up
    whole, alone = Measurement({"what": "evaluation"}), Measurement({"what": "forward passes"})
    with Interrupt() as engine.interrupt:
        common.progress("evaluating")
        calls = [(whole, lambda: engine.evaluate(loader, TEST_SET)), (alone, forwards)]
        common.take_turns(calls, [options.repeats] * 2, device)
    for m in (whole, alone):
        m.figures = {
            "images": options.images,
            "images_a_second": 1e3 * options.images / m.milliseconds,
            "overhead": m.milliseconds / alone.milliseconds,
        }
    return [whole, alone]
