"""Command lines into options. Pure: imports neither torch nor any room of the project, creates nothing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from options import arguments

PUBLISHED_DATA = Path("dataset/reflection-removal")
DEMO_DATA = Path("dataset/demo")
PRETRAINED = arguments.ROOT / "models/pretrained/dsrnet_xs.safetensors"
"""What programs use that are told no other weights."""

# What the demo changes where neither the command line nor --config says otherwise: a run of about three
# minutes on two CPU cores, that works without a download.
DEMO_RECIPE = {
    "nEpochs": 4,
    "epoch_size": 80,
    "batchSize": 2,
    "crop_size": 64,
    "lr": 1e-3,
    "scheduler": "cosine",
    "vgg_weights": "random",
    "precision": "auto",
    "grad_clip": 1.0,
    "ema": 0.95,
    "val_split": 0.2,
}

# What the demo changes besides where it goes on from the weights in the box. They were trained without the perceptual
# loss, which means little with a random VGG19.
BOX_RECIPE = {
    "weight_path": PRETRAINED,
    "epoch_size": 320,
    "batchSize": 8,
    "lr": 1e-4,
    "lambda_vgg": 0.0,
    "lambda_mse": 3.0,
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def train_parser() -> argparse.ArgumentParser:
    """The parser of train_sirs.py."""
    parser = argparse.ArgumentParser(
        prog="train_sirs.py",
        description="Train a reflection removal network and evaluate it after every epoch.",
        epilog="./runner.sh GPU MODEL 'COMMENT' [options] sets up Python and calls this program.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    for add in (
        arguments.add_run,
        arguments.add_device,
        arguments.add_speed,
        arguments.add_model,
        arguments.add_data,
        arguments.add_recipe,
        arguments.add_records,
    ):
        add(parser)
    return parser


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
    config = _read_config(parser, early.config) if early.config else {}
    parser.set_defaults(**config)
    early, _ = parser.parse_known_args(argv)
    demo = early.base_dir is None and not PUBLISHED_DATA.is_dir()
    from_box = demo and early.inet == PRETRAINED.stem and early.weight_path is None
    parser.set_defaults(**((DEMO_RECIPE if demo else {}) | (BOX_RECIPE if from_box else {}) | config))
    options = parser.parse_args(argv)
    options.demo = demo
    if options.weight_path == Path("none"):
        options.weight_path = None
    options.name = options.name or options.inet
    options.base_dir = options.base_dir or (DEMO_DATA if demo else PUBLISHED_DATA)
    _check(parser, options)
    return options


def infer_parser() -> argparse.ArgumentParser:
    """The parser of tools/infer.py."""
    parser = argparse.ArgumentParser(
        prog="infer.py",
        description="Separate photographs of any size into what is behind the glass and what is mirrored in it.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="photographs, folders of them, or patterns such as "
                        "'holiday/**/*.jpg'")  # fmt: skip
    arguments.add_weights(parser).add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the weights: a run's best.pt, a published file, or one of tools/export.py "
        f"(default: {PRETRAINED.name}, a small network that is in the box)",
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


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of tools/evaluate.py."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure checkpoints on every test set of a folder.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
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


def as_text(options: argparse.Namespace) -> dict[str, object]:
    """Options as plain values, for a YAML file or a checkpoint: a file of them is a valid --config."""
    plain = {}
    for key, value in sorted(vars(options).items()):
        plain[key] = str(value) if isinstance(value, Path) else value
    return plain


def separator_settings(options: argparse.Namespace) -> dict[str, object]:
    """What options of infer.py, evaluate.py or app.py say to `models.separator.load_separator`."""
    names = ("inet", "vgg_weights", "precision", "gpu_ids", "tile", "overlap", "self_ensemble")
    return {name: getattr(options, name) for name in names if name in options}


def _read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, object]:
    """Values of a YAML file, checked as if they had been typed."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:  # yaml's constructors raise whatever a hostile text happens to trigger
        parser.error(f"--config {path}: {' '.join(str(error).split()) or type(error).__name__}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected lines of the form 'option: value'")
    actions = {action.dest: action for action in parser._actions}
    derived = {"demo", "config", "help", "list_models"}
    known = set(actions) - derived
    typed: list[str] = []
    for key, value in values.items():
        if key in derived or value is None:
            continue
        if key not in known:
            parser.error(f"--config {path}: there is no option {key!r}")
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            parser.error(f"--config {path}: {key} must be a plain value or a list of those")
        if isinstance(actions[key], argparse._StoreTrueAction):
            if not isinstance(value, bool):
                parser.error(f"--config {path}: {key} is either true or false, not {value!r}")
            typed += [f"--{key}"] * value
        elif key == "gpu_ids" and isinstance(value, list):
            typed.append(f"--gpu_ids={','.join(map(str, value)) or '-1'}")
        elif isinstance(value, list):
            if any(isinstance(part, str) and part.startswith("-") for part in value):
                parser.error(f"--config {path}: {key} has another option within: {value!r}")
            typed += [f"--{key}", *map(str, value)]
        else:
            typed.append(f"--{key}={value}")
    parsed = vars(parser.parse_args(typed))
    return {key: parsed[key] for key in values if key in known and values[key] is not None}


def _check_checkpoints(parser: argparse.ArgumentParser, options: argparse.Namespace, files: Sequence[Path]) -> None:
    """What says which weights, and in what tiles they are used."""
    for file in files:
        if not arguments.is_file(file):
            parser.error(f"checkpoint {file}: there is no such file")
    if options.vgg_weights:
        _check_vgg_weights(parser, options)
    if options.overlap and 2 * options.overlap > (options.tile or 0):
        parser.error(f"--overlap {options.overlap}: needs a --tile of at least {2 * options.overlap}")


def _check_vgg_weights(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.vgg_weights not in {"imagenet", "random"} and not arguments.is_file(options.vgg_weights):
        parser.error(f"--vgg_weights {options.vgg_weights}: neither 'imagenet', 'random' nor a file")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Combinations that cannot work."""
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
