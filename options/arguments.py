"""Every option of training, declared once with its role, and the groups that the programs share.

Published names are kept, so published commands run unchanged.
"""

import argparse
import functools
import os
import stat
from pathlib import Path

from dereflect.options import presets
from dereflect.options.parser import FROM, HOW, START, WHAT, WHERE, Parser, Role, option

ROOT = Path(__file__).resolve().parent.parent
STRIDE = 16
"""Sides of crops are multiples of it, as the networks' input is."""
TILE_STRIDE = 32
"""Sides of tiles and overlaps are multiples of it, as many pixels of the image as the coarsest features' stand for."""

_MOST = 2**63 - 1  # that PyTorch takes as a seed or a size
_MOST_PIXELS = 2**20  # of a side


def is_file(path: str | Path) -> bool:
    """Whether the file exists; unlike `Path.is_file`, False instead of an error for a name that no file can have.

    Raises:
        PermissionError: a folder before it may not be searched.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Whether the folder exists; see `is_file`."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode  # noqa: PTH116
    except PermissionError:
        raise
    except (OSError, ValueError):
        return 0


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = natural_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def pixels(text: str) -> int:
    """argparse type: a side of an image."""
    value = positive_int(text)
    if value > _MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text} is above {_MOST_PIXELS} pixels")
    return value


def sixteens(text: str) -> int:
    """argparse type: a positive multiple of STRIDE, which is 16."""
    value = positive_int(text)
    if value % STRIDE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {STRIDE}")
    return value


def thirtytwos(text: str) -> int:
    """argparse type: a positive multiple of TILE_STRIDE, which is 32."""
    value = positive_int(text)
    if value % TILE_STRIDE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {TILE_STRIDE}")
    return value


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is above {_MOST}")
    return value


def readable(text: str) -> str:
    """argparse type: text as it was typed, in UTF-8 whatever the locale; bytes that are no text become \\x.."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def natural_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1)."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def share(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def gpu_list(text: str) -> list[int]:
    """argparse type: `0`, `0,1`, or `-1` for no GPU."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of indices such as 0 or 0,1") from None
    if ids == [-1]:
        return []
    if min(ids) < 0 or len(set(ids)) != len(ids):
        raise argparse.ArgumentTypeError(f"'{text}' has a negative or repeated index (-1 alone means the CPU)")
    return ids


def module_of(folder: str):
    """argparse type: the name of a Python file in `folder`, so that one's own file can be named."""

    def check(name: str) -> str:
        if not (name.isidentifier() and is_file(ROOT / folder / f"{name}.py")):
            found = sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
            raise argparse.ArgumentTypeError(f"there is no {folder}/{name}.py; there are {', '.join(found)}")
        return name

    check.__name__ = "module"
    return check


def train_parser() -> Parser:
    """The parser of train_sirs.py."""
    parser = Parser(
        prog="train_sirs.py",
        description="Train a reflection removal network and evaluate it after every epoch.",
        epilog="./runner.sh GPU MODEL 'COMMENT' [options] sets up Python and calls this program.",
    )
    for add in (add_run, add_device, add_speed, add_model, add_data, add_recipe, add_records):
        add(parser)
    return parser


@functools.cache
def roles() -> dict[str, Role]:
    """The role of each entry of a training's options, by its name."""
    declared = {action.dest: action.role for action in train_parser()._actions if action.dest != "help"}
    return declared | {"demo": WHERE}  # which `parse_train` finds out


def add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run", "the run's name and folder, and how it starts")
    option(group, START, "--name", metavar="NAME", help="folder of the run under --checkpoints_dir (default: --inet)")
    option(group, START, "--comment", type=readable, default="", metavar="TEXT",
           help="describes the run; recorded with it")  # fmt: skip
    option(group, START, "--checkpoints_dir", type=Path, default=Path("checkpoints"), metavar="DIR",
           help="folder of all runs")  # fmt: skip
    option(group, START, "--resume", nargs="?", const="must", choices=("must", "auto", "force"),
           help="continue the run of this name from its last checkpoint, bit for bit; "
                "'auto' starts a new run if there is no checkpoint; 'force' continues even if options or data "
                "have changed so that it becomes another run")  # fmt: skip
    option(group, FROM, "--weight_path", type=Path, metavar="FILE",
           help="start from these weights: a published checkpoint or one of ours; with --nEpochs 0 they "
                "are only evaluated; 'none' starts from scratch where the demo would start from the "
                "bundled weights")  # fmt: skip
    option(group, WHAT, "--seed", type=natural_int, default=2018, help="seed of every random draw")
    option(group, START, "--config", type=Path, metavar="NAME|FILE.yaml",
           help="defaults for any option here, from a file or a recipe of options/presets/ "
                f"({', '.join(presets.names())}); the command line wins")  # fmt: skip


def add_device(parser: Parser, trained: bool = False) -> None:
    """The device and the precision; with `trained` weights, their training's precision is the default."""
    group = parser.add_argument_group("device")
    option(group, HOW, "--gpu_ids", type=gpu_list, metavar="IDS",
           help="index of the GPU, a list for several (under torchrun), -1 for the CPU "
                "(default: a GPU if there is one)")  # fmt: skip
    option(group, WHAT, "--precision", choices=("fp32", "bf16", "auto"), default=None if trained else "fp32",
           help="fp32; bf16 autocast (losses, norms and the scan stay fp32); "
                "auto: bf16 where the hardware multiplies it natively"
                + " (default: as in the training, fp32 for published weights)" * trained)  # fmt: skip


def add_speed(parser: Parser) -> None:
    group = parser.add_argument_group("speed", "what computes, and how much memory it takes")
    option(group, HOW, "--compile", nargs="?", const="on", default="off", choices=("off", "on", "graphs"),
           help="fuse the training step by torch.compile, which needs a C++ compiler and takes minutes at the start; "
                "graphs: also record it as CUDA graphs, for small batches")  # fmt: skip
    option(group, HOW, "--checkpoint_activations", action="store_true",
           help="compute activations again in the backward pass instead of keeping them: less than half of "
                "the memory, a third more time")  # fmt: skip
    option(group, HOW, "--scan_backend", choices=("auto", "mamba_ssm", "triton", "cpu", "reference"),
           help="what computes the Mamba models' selective scan (default: the environment variable "
                "SCAN_BACKEND, else the first of these that works)")  # fmt: skip
    option(group, HOW, "--passes_backend", choices=("auto", "cpu", "reference"),
           help="what computes the blocks between their matrix products on a CPU: cpu, passes compiled by "
                "numba, or reference, plain torch (default: the environment variable PASSES_BACKEND, else cpu "
                "where that works)")  # fmt: skip
    add_workers(group)
    option(group, HOW, "--cache_images", type=natural_float, default=0.0, metavar="GIB",
           help="memory for decoded images, of every process that trains")  # fmt: skip


def add_workers(group: argparse._ArgumentGroup) -> None:
    option(group, HOW, "--nThreads", type=natural_int, default=max(1, min(8, (os.cpu_count() or 1) - 1)), metavar="N",
           help="worker processes that make samples; 0: the main process makes them")  # fmt: skip


def add_weights(parser: Parser) -> argparse._ArgumentGroup:
    """Options that replace what a checkpoint says itself; returns the group, to which a program may add."""
    group = parser.add_argument_group("model")
    group.add_argument("--inet", metavar="MODEL",
                       help="the network (default: the one that the checkpoint names or else the one whose "
                            "parameters it has)")  # fmt: skip
    group.add_argument("--vgg_weights", metavar="imagenet|random|FILE",
                       help="the VGG19 weights of the training (default: those that the checkpoint names, "
                            "else imagenet)")  # fmt: skip
    return group


def add_tiles(parser: Parser) -> argparse._ArgumentGroup:
    """How images that are too large for the memory are separated; returns the group, to which a program may add."""
    group = parser.add_argument_group("separation")
    group.add_argument("--tile", type=thirtytwos, metavar="PIXELS",
                       help="larger photographs are separated in tiles of this side, a multiple of 32 (default: whole "
                            "where half of the machine's memory is enough, else as large as it allows)")  # fmt: skip
    group.add_argument("--overlap", type=thirtytwos, metavar="PIXELS",
                       help="overlap of neighbouring tiles, a multiple of 32, at most half a tile "
                            "(default: 192 or a quarter of a tile)")  # fmt: skip
    group.add_argument("--sizes", type=natural_int, nargs="+", metavar="PIXELS",
                       help="short sides, the largest first, of the views of an image that the network is shown; the "
                            "mean of what it takes away from them is taken away; 0: the image as it is (default: what "
                            "the checkpoint states, else 0)")  # fmt: skip
    group.add_argument("--strength", type=share, default=1.0, metavar="S",
                       help="how much of the reflection is removed, from 0 to 1: I + S (T - I)")  # fmt: skip
    group.add_argument("--self_ensemble", action="store_true",
                       help="separate every image in its eight flips and rotations and take the mean: a bit better, "
                            "eight times as long")  # fmt: skip
    return group


def add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    option(group, WHAT, "--inet", default="dsrnet_s", metavar="MODEL",
           help="a network of models/arch/__init__.py; --list_models shows them")  # fmt: skip
    option(group, START, "--list_models", action="store_true", help="print the networks' names and exit")
    option(group, WHAT, "--model", type=module_of("models"), default="dsrnet_model_sirs", metavar="MODULE",
           help="file of models/ with the training step (a function build)")  # fmt: skip
    option(group, WHAT, "--loss", type=module_of("models"), default="losses", metavar="MODULE",
           help="file of models/ with the losses (a class ReflectionLoss)")  # fmt: skip
    option(group, WHAT, "--sizes", type=natural_int, nargs="+", metavar="PIXELS",
           help="recorded in the checkpoints: short sides of the views of an image that infer.py, evaluate.py and "
                "app.py are to show the network; the training's own evaluation takes images as they are")  # fmt: skip
    option(group, WHAT, "--vgg_weights", default="imagenet", metavar="imagenet|random|FILE",
           help="VGG19's weights: imagenet: torchvision's, downloaded once; random: only to try things out; "
                "or a file")  # fmt: skip


def add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    option(group, WHERE, "--base_dir", type=Path, metavar="DIR",
           help="the data, laid out as the README shows (default: ./dataset/reflection-removal; "
                "where that is missing, a small demo set is made)")  # fmt: skip
    option(group, WHAT, "--dataset", type=module_of("data"), default="sirs_dataset", metavar="MODULE",
           help="file of data/ with the datasets (classes TrainSet and TestSet)")  # fmt: skip
    option(group, WHAT, "--crop_size", type=sixteens, default=224, metavar="PIXELS",
           help="side of the training crops, a multiple of 16")  # fmt: skip
    option(group, WHAT, "--max_scale", type=natural_float, default=2.0, metavar="N",
           help="the short side of a training image is scaled at random to 1 to N times the side of the crop; "
                "N is at least 1")  # fmt: skip
    option(group, WHAT, "--mix", type=natural_float, nargs=3, default=[0.6, 0.2, 0.2],
           metavar=("SYNTHETIC", "REAL", "NATURE"),
           help="share of the samples that comes from each training set; the shares of sets that are there "
                "are scaled to a sum of 1")  # fmt: skip
    option(group, WHAT, "--synthesis", choices=("published", "wide", "physical"), default="published",
           help="how synthetic reflections are made; wide: half of the mixtures keep the transmission undimmed, "
                "and some reflections are weaker, sharper, doubled, uneven, or added in linear light; physical: "
                "most are added as light, with exposures, lamps, veils and panes")  # fmt: skip
    option(group, WHAT, "--transplant", type=fraction, default=0.0, metavar="SHARE",
           help="share of the synthetic samples that get the reflection of a real pair")  # fmt: skip
    option(group, WHAT, "--identity", type=fraction, default=0.0, metavar="SHARE",
           help="share of all samples that have no reflection: the mixture is the transmission")  # fmt: skip
    option(group, WHAT, "--reflection", choices=("layer", "difference"), default="layer",
           help="target of R in synthetic samples: the mirrored photograph, or what it adds to the mixture, I - T, "
                "as in real pairs")  # fmt: skip
    option(group, WHAT, "--match_tone", action="store_true",
           help="bring a real pair's transmission, taken without the glass, to the mixture's exposure")  # fmt: skip
    option(group, WHAT, "--epoch_size", type=natural_int, default=0, metavar="N",
           help="samples per epoch; 0: as many as all sets have together")  # fmt: skip
    option(group, WHAT, "--max_dataset_size", type=positive_int, metavar="N",
           help="use at most N photographs, N training pairs and N test pairs of each set")  # fmt: skip
    option(group, HOW, "--skip_bad_images", action="store_true",
           help="leave out images that can't be used, with their whole pair, and list them; without this option "
                "they stop the run before it starts")  # fmt: skip
    option(group, WHAT, "--val_split", type=fraction, default=0.05, metavar="SHARE",
           help="share of the training pairs that is held out to pick the best epoch, chosen by a hash of the "
                "file's name; 0 trains on all pairs")  # fmt: skip
    option(group, WHAT, "--if_align", action="store_true",
           help="published protocol: resize test images to multiples of 32 (bicubic); "
                "without this option they are padded and cropped back")  # fmt: skip


def add_recipe(parser: Parser) -> None:
    group = parser.add_argument_group("recipe")
    option(group, WHAT, "--nEpochs", type=natural_int, default=25, metavar="N", help="epochs in all; 0 only evaluates")
    option(group, WHAT, "--batchSize", type=positive_int, default=1, metavar="N", help="samples per step and process")
    option(group, WHAT, "--accumulate", type=positive_int, default=1, metavar="N",
           help="batches whose gradients are averaged into one step of the optimiser")  # fmt: skip
    option(group, WHAT, "--optimizer", choices=("adamw", "adam"), default="adamw",
           help="adamw decays the weights of convolutions and linear layers, nothing else")  # fmt: skip
    option(group, WHAT, "--lr", type=natural_float, default=1e-4, help="peak learning rate")
    option(group, WHAT, "--wd", type=natural_float, default=1e-2, help="weight decay of adamw")
    option(group, WHAT, "--scheduler", choices=("cosine_iter", "cosine", "none"), default="cosine_iter",
           help="learning rate: cosine_iter falls and rises again and again, stepped every iteration (the -W "
                "models); cosine falls once over the whole run; none is constant")  # fmt: skip
    option(group, WHAT, "--period", type=positive_int, default=300, metavar="STEPS",
           help="cosine_iter: steps from --lr to --lr_min")  # fmt: skip
    option(group, WHAT, "--lr_min", type=natural_float, default=1e-5, metavar="LR", help="lowest rate of both cosines")
    option(group, WHAT, "--grad_clip", type=natural_float, default=0.0, metavar="NORM",
           help="clip the gradient to this norm; 0: no clipping")  # fmt: skip
    option(group, WHAT, "--guard", action="store_true",
           help="for models that diverge, such as mdsrnet_v1_l: clip unusually large gradients, skip steps "
                "with an extreme gradient, and after several of these return to the last good checkpoint "
                "and continue with half the rate")  # fmt: skip
    option(group, WHAT, "--ema", type=fraction, default=0.0, metavar="DECAY",
           help="evaluate and keep an exponential moving average of the weights, such as 0.999; "
                "0: none")  # fmt: skip
    option(group, WHAT, "--perceptual", choices=("vgg19", "mobilenet", "none"), default="vgg19",
           help="network whose features the perceptual loss compares")  # fmt: skip
    option(group, WHAT, "--lambda_vgg", type=natural_float, default=0.01,
           help="weight of the perceptual loss; 0 leaves it out, and also VGG19 if the network does not take its "
                "features")  # fmt: skip
    option(group, WHAT, "--lambda_excl", type=natural_float, default=1.0, help="weight of the exclusion loss")
    option(group, WHAT, "--lambda_mse", type=natural_float, default=0.3,
           help="weight of the squared errors of T and R; that of their gradients is 0.6")  # fmt: skip
    option(group, WHAT, "--lambda_l1", type=natural_float, default=0.0,
           help="weight of the absolute errors of T and R")  # fmt: skip
    option(group, WHAT, "--lambda_rec", type=natural_float, default=0.2, help="weight of |T + R + residue - I|")


def add_records(parser: Parser) -> None:
    group = parser.add_argument_group("records")
    option(group, WHAT, "--best_by", choices=("val", "test"), default="val",
           help="the best epoch has the highest PSNR on the held-out pairs (val) or on the test sets (test), as for "
                "the published models, whose results this flatters")  # fmt: skip
    option(group, WHERE, "--save_every", type=natural_int, default=0, metavar="N",
           help="keep a checkpoint every N epochs, in addition to last and best; 0 keeps none")  # fmt: skip
    option(group, WHERE, "--keep", type=natural_int, default=0, metavar="N",
           help="of the checkpoints of --save_every, keep the newest N; 0 keeps all")  # fmt: skip
    option(group, WHERE, "--save_steps", type=natural_int, default=500, metavar="N",
           help="write the last checkpoint every N steps within an epoch, too; 0: only at its end")  # fmt: skip
    option(group, HOW, "--log_every", type=positive_int, default=20, metavar="STEPS",
           help="steps between two points of TensorBoard and two lines of a log")  # fmt: skip
    option(group, HOW, "--tracker", choices=("trackio", "wandb"),
           help="also send options and figures to this tracker, a package that must be installed")  # fmt: skip
    option(group, HOW, "--log_norms", action="store_true",
           help="add every block's activations and gradients to the curves, to find where a training begins to "
                "diverge")  # fmt: skip
    option(group, HOW, "--eval_batch", type=positive_int, default=1, metavar="N",
           help="separate up to N test images of equal size together")  # fmt: skip
    option(group, WHERE, "--save_images", action="store_true",
           help="write the newest transmission and reflection of every test image to images/")  # fmt: skip
    option(group, WHERE, "--panels", type=natural_int, default=4, metavar="N",
           help="show N images of each test set in TensorBoard every epoch")  # fmt: skip


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, metavar="DIR",
                       help="folder for NAME_behind_glass.png and so on, with the same subfolders as below "
                            "PATH (default: beside each photograph)")  # fmt: skip
    group.add_argument("--save", nargs="+", choices=("t", "r", "residue", "sidebyside"), default=["t"],
                       help="what to write: t, what is behind the glass (NAME_behind_glass.png); r, the reflection "
                            "(NAME_reflection.png); the residue (grey: none); or all of them side by side, after the "
                            "photograph")  # fmt: skip
    group.add_argument("--format", choices=("jpeg", "png", "webp", "tiff", "bmp", "heic"),
                       help="format of the files (default: the photograph's); PNG and TIFF keep 16 bits")  # fmt: skip
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that exist")
    existing.add_argument("--resume", action="store_true", help="write only what does not exist yet")


def add_measuring(parser: Parser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--base_dir", type=Path, required=True, metavar="DIR",
                       help="data folder; its test/**/{blended,transmission_layer} are the test sets")  # fmt: skip
    group.add_argument("--protocol", choices=("published", "native"), default="published",
                       help="published: resized to multiples of 32, estimates not rounded; native: every pixel, "
                            "estimates rounded to 8 bits, as tools/infer.py saves them")  # fmt: skip
    group.add_argument("-o", "--output", type=Path, metavar="DIR",
                       help="write evaluation.md, .csv, .json and per_image.csv there, over earlier ones")  # fmt: skip
    group.add_argument("--clean", type=Path, metavar="DIR",
                       help="also separate the photographs in this folder, which have no reflection: what comes out "
                            "should be what went in")  # fmt: skip
    group.add_argument("--silence", metavar="PATTERN",
                       help="set the parameters to 0 whose names match, such as '*.attend.widen.weight', to see what "
                            "they are good for")  # fmt: skip
    group.add_argument("--max_dataset_size", type=positive_int, metavar="N",
                       help="use at most N pairs of each set")  # fmt: skip
    group.add_argument("--eval_batch", type=positive_int, default=1, metavar="N",
                       help="separate up to N images of equal size together")  # fmt: skip
    add_workers(group)
