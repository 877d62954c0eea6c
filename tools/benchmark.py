"""How fast, and in how much memory: tables of measurements made side by side on this machine.

    python tools/benchmark.py scan                           every backend of the selective scan over the length
    python tools/benchmark.py scan --gated --precision bf16  as a Mamba layer calls it, in bfloat16
    python tools/benchmark.py scan --shapes 2,128,50176 2,1024,784 --json scan.json --plot scan.png
    python tools/benchmark.py step                           a training step beside a plainly written network's
    python tools/benchmark.py step --inet dsrnet_l --batches 1 2 4 --variants bf16 bf16+compile bf16+checkpoint
    python tools/benchmark.py step --against ../DSRNet       beside the published code's, out of a clone of it
    python tools/benchmark.py step --sizes 256 --variants bf16 --operators --profile trace.json
    python tools/benchmark.py step --forward_only --inet mdsrnet_s --variants fp32 --sizes 64 128 256 512
    python tools/benchmark.py memory --inet dsrnet_s         peak memory over the size of the images
    python tools/benchmark.py data --nThreads 0 1 2          training samples a second; --against, too
    python tools/benchmark.py eval --images 50               an evaluation beside its forward passes alone
    python tools/benchmark.py metrics --size 544 416         the four measures beside the published computation

Every comparison runs in one process with the competitors in turn, and medians are shown.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import gpu_list, natural_float, natural_int, pixels, positive_int, sixteens
from dereflect.options.parser import Parser
from dereflect.util import disk
from dereflect.util.program import run


def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_scan, _add_step, _add_memory, _add_data, _add_eval, _add_metrics):
        add(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.arguments = " ".join(arguments)
    module, function = options.run.split(".")
    run_it = getattr(importlib.import_module(f"dereflect.tools.benchmarks.{module}"), function)  # imports torch
    from dereflect.util.device import enough_memory

    for option in ("json", "markdown", "plot"):
        if path := getattr(options, option, None):
            with disk.writing(path.parent, f"--{option}"):
                path.parent.mkdir(parents=True, exist_ok=True)
    with enough_memory(lambda: f"{options.command}: there is too little memory for sizes like that"):
        return run_it(options)


def _add_scan(commands) -> None:
    parser = commands.add_parser(
        "scan",
        help="the backends of the selective scan",
        description="Times every backend that works on the device, and mambapy's parallel scan where it is "
        "installed. 'reference' is the sequential loop.",
    )
    parser.set_defaults(run="scan.run_scan")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="B,D,L",
                        default=[(2, 128, length) for length in (1024, 4096, 16384, 50176)],  # 224 x 224 pixels
                        help="batch, channels, length (default: 2,128 and 1024, 4096, 16384, 50176)")  # fmt: skip
    parser.add_argument("--states", type=positive_int, default=16, metavar="N",
                        help="states of every channel (default: 16)")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                        help="of u, delta, B, C and z (default: fp32)")  # fmt: skip
    parser.add_argument("--gated", action="store_true",
                        help="with z, delta_bias and softplus, as a Mamba layer calls it")  # fmt: skip
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="only these (default: all that work)")
    _add_limits(parser, max_seconds=30, repeats=15)
    _add_output(parser, plot="time and memory over the length")


def _add_step(commands) -> None:
    parser = commands.add_parser(
        "step",
        help="a training step, or a prediction",
        description="Times forward, losses, backward, gradient norm and AdamW on random images and with random "
        "weights, and takes the peak of its memory beyond weights and optimiser's state. 'share' is how much of the "
        "time the arithmetic would take at the rate of a matrix product in that precision.",
    )
    parser.set_defaults(run="step.run_step")
    _add_subject(parser, sizes=[224])
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1], metavar="N",
                        help="images at once (default: 1)")  # fmt: skip
    parser.add_argument("--forward_only", action="store_true",
                        help="only predict, and show how far the time a pixel varies over the sizes")  # fmt: skip
    _add_limits(parser, max_seconds=60, repeats=5)
    _add_output(parser, plot="time and peak memory over the image's area, over the batch")
    parser.add_argument("--operators", action="store_true",
                        help="show how long each operator of the last variant there takes, and its floor: products at "
                             "the rate of a matrix product, all else at the rate of a copy (CPU only)")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE.json",
                        help="trace one step of the last variant there, for chrome://tracing or ui.perfetto.dev, and "
                             "print its costliest operators")  # fmt: skip


def _add_memory(commands) -> None:
    parser = commands.add_parser(
        "memory",
        help="peak memory over the size of the images",
        description="Takes the peak memory of the training step and of prediction, at batch 1, beyond weights and "
        "optimiser's state, and its growth: the slope of the line that fits it best.",
    )
    parser.set_defaults(run="step.run_memory", batches=[1], repeats=1)
    _add_subject(parser, sizes=[64, 128, 192, 256])
    _add_limits(parser, max_seconds=60)
    _add_output(parser, plot="peak memory over the image's area")


def _add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="training samples a second",
        description="Makes training samples, decoded, cropped, augmented and mixed, as fast as the workers can, while "
        "nothing else runs. Where images are cached, a first pass over the data fills the cache. 'reading' is the "
        "share of the time that goes into images, from file or cache, where no workers do it.",
    )
    parser.set_defaults(run="loop.run_data")
    parser.add_argument("--against", type=Path, metavar="FOLDER",
                        help="a clone of the published DSRNet repository: its samples, which one process makes, come "
                             "in turn with ours, and ratios are to it")  # fmt: skip
    parser.add_argument("--base_dir", type=Path, metavar="DIR",
                        help="data in the training's layout (default: the demo set, made for the while)")  # fmt: skip
    parser.add_argument("--crop_size", type=sixteens, default=224, metavar="PIXELS",
                        help="side of the crops, a multiple of 16 (default: 224)")  # fmt: skip
    parser.add_argument("--nThreads", nargs="+", type=natural_int, default=[0, 1, 2], metavar="N",
                        help="worker processes, 0 for none (default: 0 1 2)")  # fmt: skip
    parser.add_argument("--cache_images", nargs="+", type=natural_float, default=[0.0, 1.0], metavar="GIB",
                        help="memory to keep decoded images in (default: 0 1)")  # fmt: skip
    parser.add_argument("--seconds", type=natural_float, default=10.0, metavar="S",
                        help="to count samples for, each time (default: 10)")  # fmt: skip
    _add_output(parser)


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="an evaluation beside its forward passes alone",
        description="Evaluates a network with random weights on random pictures, as after an epoch: reading, "
        "forward passes, metrics. In turn with that, the same network separates the same pictures, already read, and "
        "nothing else happens.",
    )
    parser.set_defaults(run="overhead.run_eval")
    parser.add_argument("--inet", default="dsrnet_s", metavar="MODEL", help="the network (default: dsrnet_s)")
    parser.add_argument("--images", type=positive_int, default=50, metavar="N", help="in the test set (default: 50)")
    parser.add_argument("--size", nargs=2, type=pixels, default=[400, 300], metavar=("WIDTH", "HEIGHT"),
                        help="of the images (default: 400 300)")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32",
                        help="as of a training (default: fp32)")  # fmt: skip
    parser.add_argument("--eval_batch", type=positive_int, default=1, metavar="N",
                        help="images separated together (default: 1)")  # fmt: skip
    parser.add_argument("--save_images", action="store_true", help="write what is separated, too")
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="of each (default: 3)")
    _add_gpu(parser)
    _add_output(parser)


def _add_metrics(commands) -> None:
    parser = commands.add_parser(
        "metrics",
        help="PSNR, SSIM, LMSE and NCC beside the published computation",
        description="Measures a random picture, in turn with scikit-image's PSNR and SSIM of every channel, NumPy's "
        "NCC, and LMSE window by window, as the published code computes them.",
    )
    parser.set_defaults(run="metrics.run_metrics")
    parser.add_argument("--size", nargs=2, type=pixels, default=[544, 416], metavar=("WIDTH", "HEIGHT"),
                        help="of the picture (default: 544 416)")  # fmt: skip
    parser.add_argument("--repeats", type=positive_int, default=9, metavar="N", help="of each (default: 9)")
    _add_output(parser)


def _add_subject(parser: argparse.ArgumentParser, sizes: list[int]) -> None:
    """What `step` and `memory` measure."""
    parser.add_argument("--inet", nargs="+", default=["dsrnet_s"], metavar="MODEL",
                        help="networks; train_sirs.py --list_models shows them (default: dsrnet_s)")  # fmt: skip
    parser.add_argument("--variants", nargs="+", metavar="VARIANT",
                        help="'plain' (the network written plainly: two passes in fp32, torch's default AdamW, no "
                             "Mamba), or fp32 or bf16 with any of +compile, +graphs (compiled into CUDA graphs), "
                             "+checkpoint (activations computed again) and +sequential (Mamba's scan as a loop over "
                             "the pixels), such as bf16+compile; ratios are to the first "
                             "(default: plain fp32 bf16)")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="FOLDER",
                        help="a clone of a published DSRNet or MDSRNet repository: its network with our weights, in "
                             "fp32 and with torch's default AdamW, comes first, and ratios are to it")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", type=sixteens, default=sizes, metavar="PIXELS",
                        help="height and width of the images, multiples of 16 "
                             f"(default: {' '.join(map(str, sizes))})")  # fmt: skip
    parser.add_argument("--training", type=shlex.split, default=[], metavar="OPTIONS",
                        help="options of train_sirs.py for features and losses, as one word: "
                             "'--training=--lambda_vgg 0 --lambda_excl 0' (default: none, so all losses)")  # fmt: skip
    parser.add_argument("--keep_freed_memory", action=argparse.BooleanOptionalAction, default=True,
                        help="have the C library keep what is freed, as training does")  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser, max_seconds: float, repeats: int | None = None) -> None:
    if repeats:
        parser.add_argument("--repeats", type=positive_int, default=repeats, metavar="N",
                            help=f"of each competitor at most (default: {repeats})")  # fmt: skip
    parser.add_argument("--max_seconds", type=natural_float, default=max_seconds, metavar="S",
                        help="for all repeats of one competitor in one setting; what would need more even once is "
                             f"left out (default: {max_seconds})")  # fmt: skip
    _add_gpu(parser)


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu_ids", type=gpu_list, metavar="ID",
                        help="index of the GPU, -1 for the CPU (default: a GPU if there is one)")  # fmt: skip


def _add_output(parser: argparse.ArgumentParser, plot: str | None = None) -> None:
    """--json and --markdown; --plot, too, where `plot` says what it draws."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {plot} there")


def _shape(text: str) -> tuple[int, int, int]:
    """argparse type: `2,128,4096`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not batch,channels,length such as 2,128,4096")
    return tuple(map(positive_int, text.split(",")))


if __name__ == "__main__":
    sys.exit(run(main))
