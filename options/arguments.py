"""Every option of training, declared once with its role, and the groups that the programs share.

Published names are kept, so published commands run unchanged.
"""

import argparse
import functools
import os
from pathlib import Path

from options.parser import FROM, HOW, START, WHAT, WHERE, Parser, Role, option

ROOT = Path(__file__).resolve().parent.parent
STRIDE = 16
"""Sides of crops, tiles and overlaps are multiples of it, as the networks' input is."""

_MOST = 2**63 - 1  # that PyTorch takes as a seed or a size


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False, where `Path.is_file` raises, for a name that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """As `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = natural_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def sixteens(text: str) -> int:
    """argparse type: a positive multiple of STRIDE, which is 16."""
    value = positive_int(text)
    if value % STRIDE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {STRIDE}")
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
    group = parser.add_argument_group("run", "what this run is, where it is kept and how it starts")
    option(group, START, "--name", metavar="NAME", help="folder of the run under --checkpoints_dir (default: --inet)")
    option(group, START, "--comment", type=readable, default="", metavar="TEXT",
           help="what this run is, recorded with it")  # fmt: skip
    option(group, START, "--checkpoints_dir", type=Path, default=Path("checkpoints"), metavar="DIR",
           help="folder of all runs")  # fmt: skip
    option(group, START, "--resume", nargs="?", const="must", choices=("must", "auto", "force"),
           help="continue the run of that name from its last checkpoint, bit for bit; "
                "'auto' starts anew where there is none; 'force' continues though options or data "
                "have changed that make it another run")  # fmt: skip
    option(group, FROM, "--weight_path", type=Path, metavar="FILE",
           help="start from these weights: a published checkpoint or one of ours; with --nEpochs 0 they "
                "are only evaluated; 'none' starts from scratch where the demo would start from the "
                "bundled weights")  # fmt: skip
    option(group, WHAT, "--seed", type=natural_int, default=2018, help="of every random draw")
    option(group, START, "--config", type=Path, metavar="FILE.yaml",
           help="defaults for any option here; the command line wins")  # fmt: skip


def add_device(parser: Parser, trained: bool = False) -> None:
    """Where it runs and how; `trained` weights may say themselves how."""
    group = parser.add_argument_group("device")
    option(group, HOW, "--gpu_ids", type=gpu_list, metavar="IDS",
           help="index of the GPU, a list for several (under torchrun), -1 for the CPU "
                "(default: a GPU if there is one)")  # fmt: skip
    option(group, WHAT, "--precision", choices=("fp32", "bf16", "auto"), default=None if trained else "fp32",
           help="fp32; bf16 autocast (losses, norms and the scan stay fp32); "
                "auto: bf16 where the hardware multiplies it natively"
                + " (default: as in the training, fp32 for published weights)" * trained)  # fmt: skip


def add_speed(parser: Parser) -> None:
    group = parser.add_argument_group("speed", "what computes, and what is kept in memory")
    option(group, HOW, "--compile", nargs="?", const="on", default="off", choices=("off", "on", "graphs"),
           help="have torch.compile fuse the training step, which takes minutes at the start and a C++ "
                "compiler; graphs: through CUDA graphs, too, for small batches")  # fmt: skip
    option(group, HOW, "--checkpoint_activations", action="store_true",
           help="compute activations again in the backward pass instead of keeping them: less than half "
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
           help="memory, for every process that trains, to keep decoded images in")  # fmt: skip


def add_workers(group: argparse._ArgumentGroup) -> None:
    option(group, HOW, "--nThreads", type=natural_int, default=max(1, min(8, (os.cpu_count() or 1) - 1)), metavar="N",
           help="worker processes that make samples, 0 for none")  # fmt: skip


def add_weights(parser: Parser) -> argparse._ArgumentGroup:
    """What stands in for the things that a checkpoint says itself; the group, for what a program adds to it."""
    group = parser.add_argument_group("model")
    group.add_argument("--inet", metavar="MODEL",
                       help="the network (default: what the checkpoint says or, where it says nothing, the one "
                            "whose parameters it has)")  # fmt: skip
    group.add_argument("--vgg_weights", metavar="imagenet|random|FILE",
                       help="VGG19's weights, those of the training (default: what the checkpoint says, "
                            "else imagenet)")  # fmt: skip
    return group


def add_tiles(parser: Parser) -> argparse._ArgumentGroup:
    """How images are separated that are too large for the memory; the group, for what a program adds to it."""
    group = parser.add_argument_group("separation")
    group.add_argument("--tile", type=sixteens, metavar="PIXELS",
                       help="larger photographs are separated in tiles of this side, a multiple of 16 "
                            "(default: what half of the free memory is enough for, 1024 at most)")  # fmt: skip
    group.add_argument("--overlap", type=sixteens, metavar="PIXELS",
                       help="of neighbouring tiles, at most half a tile "
                            "(default: 128 or a quarter of a tile)")  # fmt: skip
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
    option(group, WHAT, "--vgg_weights", default="imagenet", metavar="imagenet|random|FILE",
           help="VGG19's weights: torchvision's, downloaded once; random ones, to try things out; "
                "or a file of them")  # fmt: skip


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
           help="how often a sample comes from each training set; missing sets are left out "
                "and the rest renormalised")  # fmt: skip
    option(group, WHAT, "--synthesis", choices=("published", "wide", "physical"), default="published",
           help="how synthetic reflections are made; wide: half of them as sums with an undimmed "
                "transmission, some weaker, sharper, ghosted, stronger here than there, in linear "
                "light; physical: added as light, with exposures, lamps, veils and panes")  # fmt: skip
    option(group, WHAT, "--transplant", type=fraction, default=0.0, metavar="SHARE",
           help="of the synthetic samples, those that get the reflection of a real pair")  # fmt: skip
    option(group, WHAT, "--identity", type=fraction, default=0.0, metavar="SHARE",
           help="of all samples, those without any reflection: the mixture is the transmission")  # fmt: skip
    option(group, WHAT, "--reflection", choices=("layer", "difference"), default="layer",
           help="what R is to become in synthetic samples: the mirrored photograph, or what it adds to the "
                "mixture, I - T, as in real pairs")  # fmt: skip
    option(group, WHAT, "--match_tone", action="store_true",
           help="bring a real pair's transmission, taken without the glass, to the mixture's exposure")  # fmt: skip
    option(group, WHAT, "--epoch_size", type=natural_int, default=0, metavar="N",
           help="samples an epoch; 0 means as many as all sets hold together")  # fmt: skip
    option(group, WHAT, "--max_dataset_size", type=positive_int, metavar="N",
           help="use at most N photographs, N training pairs and N test pairs of each set")  # fmt: skip
    option(group, HOW, "--skip_bad_images", action="store_true",
           help="leave out images that can't be used, a pair as a whole, and say which; without it they "
                "stop the run before it starts")  # fmt: skip
    option(group, WHAT, "--val_split", type=fraction, default=0.05, metavar="SHARE",
           help="share of the training pairs held out, by a hash of the file's name, to pick "
                "the best epoch; 0 trains on all pairs")  # fmt: skip
    option(group, WHAT, "--if_align", action="store_true",
           help="published protocol: resize test images to multiples of 32 (bicubic); "
                "without it they are padded and cropped back")  # fmt: skip


def add_recipe(parser: Parser) -> None:
    group = parser.add_argument_group("recipe")
    option(group, WHAT, "--nEpochs", type=natural_int, default=25, metavar="N", help="epochs in all; 0 only evaluates")
    option(group, WHAT, "--batchSize", type=positive_int, default=1, metavar="N", help="samples a step and process")
    option(group, WHAT, "--accumulate", type=positive_int, default=1, metavar="N",
           help="batches whose gradients are averaged into one step of the optimiser")  # fmt: skip
    option(group, WHAT, "--optimizer", choices=("adamw", "adam"), default="adamw",
           help="adamw decays the weights of convolutions and linear layers, nothing else")  # fmt: skip
    option(group, WHAT, "--lr", type=natural_float, default=1e-4, help="peak learning rate")
    option(group, WHAT, "--wd", type=natural_float, default=1e-2, help="weight decay of adamw")
    option(group, WHAT, "--scheduler", choices=("cosine_iter", "cosine", "none"), default="cosine_iter",
           help="cosine_iter: down and up again, stepped every iteration (the -W models); "
                "cosine: once over the whole run; none: constant")  # fmt: skip
    option(group, WHAT, "--period", type=positive_int, default=300, metavar="STEPS",
           help="cosine_iter: steps from the peak to the floor")  # fmt: skip
    option(group, WHAT, "--lr_min", type=natural_float, default=1e-5, metavar="LR", help="floor of both cosines")
    option(group, WHAT, "--grad_clip", type=natural_float, default=0.0, metavar="NORM",
           help="clip the gradient to this norm; 0 does not")  # fmt: skip
    option(group, WHAT, "--guard", action="store_true",
           help="for models that blow up, such as mdsrnet_v1_l: clip gradients that are unusually large, "
                "skip steps whose gradient is far out, and after several of those go back to the last "
                "good checkpoint and on with half the rate")  # fmt: skip
    option(group, WHAT, "--ema", type=fraction, default=0.0, metavar="DECAY",
           help="evaluate and keep an exponential moving average of the weights, such as 0.999; "
                "0 does not")  # fmt: skip
    option(group, WHAT, "--perceptual", choices=("vgg19", "mobilenet", "none"), default="vgg19",
           help="whose features the perceptual loss compares")  # fmt: skip
    option(group, WHAT, "--lambda_vgg", type=natural_float, default=0.01,
           help="weight of the perceptual loss; 0 leaves it out, and VGG19 with it where the network does "
                "not take VGG19's features")  # fmt: skip
    option(group, WHAT, "--lambda_excl", type=natural_float, default=1.0, help="weight of the exclusion loss")
    option(group, WHAT, "--lambda_mse", type=natural_float, default=0.3,
           help="weight of the squared errors of T and R; that of their gradients is 0.6")  # fmt: skip
    option(group, WHAT, "--lambda_l1", type=natural_float, default=0.0,
           help="weight of the absolute errors of T and R")  # fmt: skip
    option(group, WHAT, "--lambda_rec", type=natural_float, default=0.2, help="weight of |T + R + residue - I|")


def add_records(parser: Parser) -> None:
    group = parser.add_argument_group("records")
    option(group, WHAT, "--best_by", choices=("val", "test"), default="val",
           help="what picks the best epoch: PSNR of the held-out pairs, or (as the published models "
                "did, which flatters them) of the test sets")  # fmt: skip
    option(group, WHERE, "--save_every", type=natural_int, default=0, metavar="N",
           help="keep a checkpoint every N epochs, in addition to last and best; 0 keeps none")  # fmt: skip
    option(group, WHERE, "--keep", type=natural_int, default=0, metavar="N",
           help="of the checkpoints of --save_every, keep the newest N; 0 keeps all")  # fmt: skip
    option(group, WHERE, "--save_steps", type=natural_int, default=500, metavar="STEPS",
           help="write the last checkpoint every N steps within an epoch, too; 0: only at its end")  # fmt: skip
    option(group, HOW, "--log_every", type=positive_int, default=20, metavar="STEPS",
           help="steps between two points of TensorBoard and two lines of a log")  # fmt: skip
    option(group, HOW, "--log_norms", action="store_true",
           help="every block's activations and gradients among the curves, to find where a training "
                "goes astray")  # fmt: skip
    option(group, HOW, "--eval_batch", type=positive_int, default=1, metavar="N",
           help="test images of equal size that are separated together")  # fmt: skip
    option(group, WHERE, "--save_images", action="store_true",
           help="write the transmission and the reflection of every test image, the newest only, "
                "to images/")  # fmt: skip
    option(group, WHERE, "--panels", type=natural_int, default=4, metavar="N",
           help="images of each test set shown in TensorBoard every epoch")  # fmt: skip


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, metavar="DIR",
                       help="where NAME_t.png and the like go; below it, folders are as below the PATH "
                            "(default: beside each photograph)")  # fmt: skip
    group.add_argument("--save", nargs="+", choices=("t", "r", "residue", "sidebyside"), default=["t"],
                       help="what to write: transmission, reflection, residue (grey is none) and these side by side, "
                            "behind the photograph")  # fmt: skip
    group.add_argument("--format", choices=("jpeg", "png", "webp", "tiff", "bmp", "heic"),
                       help="of the files written (default: the photograph's); PNG and TIFF keep 16 bits")  # fmt: skip
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that exist")
    existing.add_argument("--resume", action="store_true", help="write only what does not exist yet")


def add_measuring(parser: Parser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--base_dir", type=Path, required=True, metavar="DIR",
                       help="test/**/{blended,transmission_layer} below it are the test sets")  # fmt: skip
    group.add_argument("--protocol", choices=("published", "native"), default="published",
                       help="published: resized to multiples of 32, estimates not rounded; native: every pixel, "
                            "estimates rounded to 8 bits, as tools/infer.py saves them")  # fmt: skip
    group.add_argument("-o", "--output", type=Path, metavar="DIR",
                       help="write evaluation.md, .csv, .json and per_image.csv there, over earlier ones")  # fmt: skip
    group.add_argument("--max_dataset_size", type=positive_int, metavar="N",
                       help="use at most N pairs of each set")  # fmt: skip
    group.add_argument("--eval_batch", type=positive_int, default=1, metavar="N",
                       help="images of equal size that are separated together")  # fmt: skip
    add_workers(group)
