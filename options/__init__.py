"""Command lines into options. Pure: imports neither torch nor any room of the project, creates nothing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dereflect.options import arguments
from dereflect.options.arguments import train_parser
from dereflect.options.config import PRETRAINED, as_text, demo_defaults, read_config
from dereflect.options.parser import Parser

__all__ = ["DEMO_DATA", "PRETRAINED", "PUBLISHED_DATA", "as_text", "parse_evaluate", "parse_infer", "parse_train",
           "separator_settings", "train_parser"]  # fmt: skip

PUBLISHED_DATA = Path("dataset/reflection-removal")
DEMO_DATA = Path("dataset/demo")


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a training run.

    Args:
        argv: arguments, by default the command line's.

    Returns:
        A namespace with every option resolved: `name`, `base_dir` and `demo` (whether the demo set stands in
        for data that is not there) included.

    Exits with status 2 and one line on stderr for anything wrong, before anything is created.
    """
    parser = train_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    early, _ = parser.parse_known_args(argv)
    config = read_config(parser, early.config) if early.config else {}
    like_a_demo = config.pop("demo", False)
    if like_a_demo and early.base_dir is None:
        config.pop("base_dir", None)
    parser.set_defaults(**config)
    early, _ = parser.parse_known_args(argv)
    demo = early.base_dir is None and (like_a_demo or not PUBLISHED_DATA.is_dir())
    pretrained = demo and early.inet == PRETRAINED.stem and early.weight_path is None
    parser.set_defaults(**((demo_defaults(pretrained) if demo else {}) | config))
    options = parser.parse_args(argv)
    options.demo = demo
    if options.weight_path == Path("none"):
        options.weight_path = None
    options.name = options.name or options.inet
    options.base_dir = options.base_dir or (DEMO_DATA if demo else PUBLISHED_DATA)
    _check(parser, options)
    return options


def infer_parser() -> Parser:
    """The parser of tools/infer.py."""
    parser = Parser(
        prog="infer.py",
        description="Separate photographs of any size into what is behind the glass and what is mirrored in it.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="photographs, folders of them, or patterns such as "
                        "'holiday/**/*.jpg'")  # fmt: skip
    arguments.add_weights(parser).add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the weights: a run's best.pt, a published file, or one of tools/export.py "
        f"(default: {PRETRAINED.name}, a small network that comes with the code)",
    )
    arguments.add_output(parser)
    arguments.add_tiles(parser)
    arguments.add_device(parser, trained=True)
    return parser


def parse_infer(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of tools/infer.py.

    Exits with status 2 and one line on stderr for anything wrong, before anything is created.
    """
    parser = infer_parser()
    options = parser.parse_args(argv)
    options.checkpoint = options.checkpoint or PRETRAINED
    _check_checkpoints(parser, options, [options.checkpoint])
    return options


def evaluate_parser() -> Parser:
    """The parser of tools/evaluate.py."""
    parser = Parser(prog="evaluate.py", description="Measure checkpoints on every test set of a folder.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT",
                        help="the weights: a run's best.pt or a published file")  # fmt: skip
    arguments.add_weights(parser)
    arguments.add_measuring(parser)
    arguments.add_tiles(parser)
    arguments.add_device(parser, trained=True)
    return parser


def parse_evaluate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of tools/evaluate.py.

    Exits with status 2 and one line on stderr for anything wrong, before anything is created.
    """
    parser = evaluate_parser()
    options = parser.parse_args(argv)
    _check_checkpoints(parser, options, options.checkpoints)
    if not arguments.is_folder(options.base_dir):
        parser.error(f"--base_dir {options.base_dir}: there is no such folder")
    if options.protocol == "published" and (options.tile or options.overlap or options.self_ensemble):
        parser.error("--tile, --overlap and --self_ensemble: only with --protocol native")
    return options


def separator_settings(options: argparse.Namespace) -> dict[str, object]:
    """The arguments of `models.separator.load_separator`, from the options of infer.py, evaluate.py or app.py."""
    names = ("inet", "vgg_weights", "precision", "gpu_ids", "tile", "overlap", "self_ensemble", "strength", "sizes")
    return {name: getattr(options, name) for name in names if name in options}


def _check_checkpoints(parser: Parser, options: argparse.Namespace, files: Sequence[Path]) -> None:
    """Check the options about the weights and the tiles."""
    for file in files:
        if not arguments.is_file(file):
            parser.error(f"checkpoint {file}: there is no such file")
    if options.vgg_weights:
        _check_vgg_weights(parser, options)
    if options.overlap and 2 * options.overlap > (options.tile or 0):
        parser.error(f"--overlap {options.overlap}: needs a --tile of at least {2 * options.overlap}")


def _check_vgg_weights(parser: Parser, options: argparse.Namespace) -> None:
    if options.vgg_weights not in {"imagenet", "random"} and not arguments.is_file(options.vgg_weights):
        parser.error(f"--vgg_weights {options.vgg_weights}: neither 'imagenet', 'random' nor a file")


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse combinations that cannot work."""
    if options.max_scale < 1:
        parser.error(f"--max_scale {options.max_scale:g}: must be at least 1, as a crop has to fit in")
    if sum(options.mix) == 0:
        parser.error("--mix: at least one of the three must be above 0")
    if options.lr_min > options.lr and options.scheduler != "none":
        parser.error(f"--lr_min {options.lr_min} is above --lr {options.lr}")
    if options.weight_path and not arguments.is_file(options.weight_path):
        parser.error(f"--weight_path {options.weight_path}: there is no such file")
    if options.name in {".", ".."} or set(options.name) & set("/\\") or not options.name.isprintable():
        option = "--inet" if options.name == options.inet else "--name"
        parser.error(f"{option} {options.name!r}: must be a plain folder name")
    if not options.demo and not arguments.is_folder(options.base_dir):
        parser.error(f"--base_dir {options.base_dir}: there is no such folder")
    _check_vgg_weights(parser, options)
    if options.compile == "graphs" and options.accumulate > 1:
        parser.error("--compile graphs: doesn't go with --accumulate; raise --batchSize instead")
    if options.compile != "off" and options.log_norms:
        parser.error("--log_norms: doesn't go with --compile, which takes the blocks apart")
    if options.nEpochs == 0 and not (options.weight_path or options.resume):
        parser.error("--nEpochs 0 only evaluates: say which weights with --weight_path or --resume")
