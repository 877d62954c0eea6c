"""Options as YAML, in and out, and the recipes of the demo."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from options import arguments
from options.parser import START, Parser, Role, nearest

PRETRAINED = arguments.ROOT / "models/pretrained/madsrnet_xs.safetensors"
"""The bundled weights, which programs use where no others are named."""

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

# What the demo changes in addition where it starts from the bundled weights: the losses that they were trained with
# (the perceptual loss means little with a random VGG19) and a low rate, for the demo set's own kind of reflections.
PRETRAINED_RECIPE = {
    "weight_path": PRETRAINED,
    "epoch_size": 160,
    "batchSize": 8,
    "crop_size": 96,
    "lr": 2e-4,
    "lambda_vgg": 0.0,
    "lambda_excl": 0.0,
    "lambda_mse": 3.0,
    "lambda_l1": 0.6,
    "reflection": "difference",
}

RECORDED = tuple(role for role in Role if role is not START)
"""The roles of the options that describe a run, however it was started."""

_OLD_RECORD = "list_models"  # an entry that only an options.yaml written by an older version has


def as_text(options: argparse.Namespace, chosen: Iterable[Role] = Role) -> dict[str, object]:
    """Options as plain values, for a YAML file or a checkpoint: a file of them is a valid --config.

    Args:
        options: of `parse_train`.
        chosen: only the options of these roles.
    """
    role, chosen = arguments.roles(), set(chosen)
    plain = {key: value for key, value in sorted(vars(options).items()) if role.get(key, START) in chosen}
    return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}


def read_config(parser: Parser, path: Path) -> dict[str, object]:
    """The values of a YAML file, checked as if they were typed; `demo` is among them if it is in the file.

    The options.yaml of a run is such a file. Those of older versions say how the run was started, too; that is left
    out, so that the file starts a new run like that one.
    """
    values = _load(parser, path)
    if _OLD_RECORD in values:
        role = arguments.roles()
        values = {key: value for key, value in values.items() if role.get(key) is not START}
    demo = values.pop("demo", None)
    if values.get("weight_path", ...) is None:
        values["weight_path"] = "none"  # from scratch, where the demo would start from the bundled weights
    values = {key: value for key, value in values.items() if value is not None}
    return parsed(parser, values, f"--config {path}") | {"demo": demo is True}


def parsed(parser: Parser, values: dict[str, object], where: str) -> dict[str, object]:
    """Values as if they were typed; exits with status 2 and a line that begins with `where` if one can't be used."""
    actions = {action.dest: action for action in parser._actions if action.dest not in {"help", "config"}}
    typed: list[str] = []
    for key, value in values.items():
        if key not in actions:
            parser.error(f"{where}: there is no option {key!r}{nearest(str(key), actions)}")
        typed += _typed(parser, actions[key], value, f"{where}: {key}")
    found = vars(parser.parse_args(typed))
    return {key: found[key] for key in values}


def _load(parser: Parser, path: Path) -> dict[str, object]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:  # yaml's constructors raise whatever a hostile text happens to trigger
        parser.error(f"--config {path}: {error or type(error).__name__}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected lines of the form 'option: value'")
    return values


def _typed(parser: Parser, action: argparse.Action, value: object, where: str) -> list[str]:
    """A value as it would be typed."""
    name = f"--{action.dest}"
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) for part in parts):
        parser.error(f"{where} must be a plain value or a list of those")
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            parser.error(f"{where} is either true or false, not {value!r}")
        return [name] * value
    if not isinstance(value, list):
        return [f"{name}={value}"]
    if action.dest == "gpu_ids":
        return [f"{name}={','.join(map(str, value)) or '-1'}"]
    if any(isinstance(part, str) and part.startswith("-") for part in value):
        parser.error(f"{where} has another option within: {value!r}")
    return [name, *map(str, value)]
