"""`eval`: an evaluation, with its reading, metrics and pictures, beside its forward passes alone."""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data import Loaders, build_test_loaders, discover
from data.folders import MIXTURE, TRANSMISSION
from data.loader import Loader
from engine import Engine
from models import build_model
from options import parse_train
from options.arguments import positive_int
from tools.benchmarks import common
from util.device import keep_freed_memory, set_deterministic, wants_bf16
from util.distributed import join
from util.program import Interrupt

TEST_SET = "random"
EVALUATION, FORWARDS = "evaluation", "forward passes"


def add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="an evaluation beside its forward passes alone",
        description="Evaluates a network with random weights on random pictures, as after an epoch: reading, "
        "forward passes, metrics. In turn with that, the same network separates the same pictures, already read, and "
        "nothing else happens.",
    )
    parser.set_defaults(run=run_eval)
    parser.add_argument("--model", default="dsrnet_s", metavar="NAME", help="the network (default: dsrnet_s)")
    parser.add_argument("--images", type=positive_int, default=50, metavar="N", help="in the test set (default: 50)")
    parser.add_argument("--size", nargs=2, type=positive_int, default=[400, 300], metavar=("WIDTH", "HEIGHT"),
                        help="of the images (default: 400 300)")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="as of a training")
    parser.add_argument("--eval_batch", type=positive_int, default=1, metavar="N",
                        help="images separated together (default: 1)")  # fmt: skip
    parser.add_argument("--save_images", action="store_true", help="write what is separated, too")
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="of each (default: 3)")
    common.add_device(parser)
    common.add_output(parser)


def run_eval(options: argparse.Namespace) -> int:
    device = common.choose_device(options)
    common.check_models("--model", [options.model])
    rates = common.ceilings(device)
    with tempfile.TemporaryDirectory() as scratch:
        write_test_set(Path(scratch) / "test" / TEST_SET, options.images, tuple(options.size))
        engine, loader = build_engine(options, device, Path(scratch))
        times = measure(engine, loader, options.repeats, device)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    overhead = seconds[EVALUATION] / seconds[FORWARDS]
    header = common.with_ceilings(options, device, rates)
    record = {"images": options.images, "seconds": seconds, "all_seconds": times, "overhead": overhead}
    common.report(options, header, [eval_table(times, options, device)], ceilings=rates, **record)
    return 0


def write_test_set(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Pairs of smooth random pictures of `size` (width, height)."""
    rng = np.random.default_rng(0)
    for layer in (MIXTURE, TRANSMISSION):
        (folder / layer).mkdir(parents=True)
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / layer / f"{number:04}.png")


def build_engine(options: argparse.Namespace, device: str, folder: Path) -> tuple[Engine, Loader]:
    """As train_sirs.py has it when it only evaluates; and the loader of the one test set."""
    given = {
        "inet": options.model,
        "base_dir": folder,
        "checkpoints_dir": folder,
        "gpu_ids": 0 if device == "cuda" else -1,
        "precision": options.precision,
        "eval_batch": options.eval_batch,
        "vgg_weights": "random",
    }
    training = parse_train([f"--{name}={value}" for name, value in given.items()])
    training.save_images, training.nEpochs = options.save_images, 0
    world = join(training.gpu_ids)
    loaders = Loaders(None, None, build_test_loaders(training, discover(training)))
    keep_freed_memory()
    set_deterministic(training.seed)
    model = build_model(training, wants_bf16(training.precision, world.device))
    return Engine(training, model, loaders, world, folder / "run"), loaders.tests[TEST_SET]


def measure(engine: Engine, loader: Loader, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every evaluation and of every pass over its batches without anything else, in turn."""
    batches = [batch["mixture"].to(device) for batch in loader]

    def forwards() -> None:
        for batch in batches:
            engine.model.predict(batch)

    engine.model.eval()
    engine.model.predict(batches[0])  # warms up
    calls = {EVALUATION: lambda: engine.evaluate(loader, TEST_SET), FORWARDS: forwards}
    with Interrupt() as engine.interrupt:
        common.progress("evaluating")
        return common.take_turns(calls, dict.fromkeys(calls, repeats), device, "evaluating")


def eval_table(times: dict[str, list[float]], options: argparse.Namespace, device: str) -> tuple[str, common.Rows]:
    """Title and rows."""
    rows = [["what", "seconds", "min..max", "images/s", f"x {FORWARDS}"]]
    base = statistics.median(times[FORWARDS])
    for name, values in times.items():
        seconds = statistics.median(values)
        spread = f"{min(values):.2f}..{max(values):.2f}"
        rows.append([name, f"{seconds:.2f}", spread, f"{options.images / seconds:.2f}", f"{seconds / base:.2f}"])
    width, height = options.size
    return f"{options.model}, {options.images} images of {width} x {height} ({device})", rows
