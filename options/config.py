"""Options as YAML, in and out, and the recipes of options/presets/."""

import argparse
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from dereflect.options import arguments, presets
from dereflect.options.parser import START, Parser, Role, nearest

PRETRAINED = arguments.ROOT / "models/pretrained/madsrnet_xs.safetensors"
"""The bundled weights, which programs use where no others are named."""

RECORDED = tuple(role for role in Role if role is not START)
"""The roles of the options that describe a run, however it was started."""

_SCRATCH = Path("none")  # the --weight_path of a training that starts from no weights
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
    """The values of a YAML file, checked as if they were typed, and whether it is one for the demo set, as `demo`.

    A plain name, such as iccv, is a file of options/presets/, whose paths start in the project's folder. The
    options.yaml of a run is such a file, too. Those of older versions say how the run was started; that is left out, so
    that the file starts a new run like that one.
    """
    preset = presets.find(path)
    if not (preset or path.suffix or arguments.is_file(path)):
        parser.error(f"--config {path}: there is no such file{nearest(str(path), presets.names())}")
    values = _load(parser, preset or path, f"--config {path}")
    if _OLD_RECORD in values:
        role = arguments.roles()
        values = {key: value for key, value in values.items() if role.get(key) is not START}
    demo = values.pop("demo", None)
    if values.get("weight_path", ...) is None:
        values["weight_path"] = str(_SCRATCH)  # from scratch, where the demo would start from the bundled weights
    values = {key: value for key, value in values.items() if value is not None}
    found = parsed(parser, values, f"--config {path}")
    if preset and found.get("weight_path", _SCRATCH) != _SCRATCH:
        found["weight_path"] = arguments.ROOT / found["weight_path"]
    return found | {"demo": demo is True}


@functools.cache
def demo_defaults(pretrained: bool = False) -> dict[str, object]:
    """What stands in for the defaults of training options in a demo, from scratch or from the bundled weights."""
    values = read_config(arguments.train_parser(), Path("demo-bundled" if pretrained else "demo"))
    return {key: None if value == _SCRATCH else value for key, value in values.items() if key != "demo"}


def changed(recorded: Mapping[str, object], chosen: Iterable[Role] = RECORDED) -> dict[str, object]:
    """The options of a run's options.yaml that differ from the defaults; of a demo run, from the demo's recipe.

    Args:
        recorded: the options as plain values; those that training has no longer are left out.
        chosen: only the options of these roles.
    """
    standard = {action.dest: action.default for action in arguments.train_parser()._actions}
    if recorded.get("demo"):
        standard |= demo_defaults(Path(str(recorded.get("weight_path"))).name == PRETRAINED.name)
    plain = as_text(argparse.Namespace(**standard), chosen)
    return {key: recorded[key] for key, default in plain.items() if recorded.get(key, default) != default}


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


def _load(parser: Parser, path: Path, where: str) -> dict[str, object]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:  # yaml's constructors raise whatever a hostile text happens to trigger
        parser.error(f"{where}: {error or type(error).__name__}")
    if not isinstance(values, dict):
        parser.error(f"{where}: expected lines of the form 'option: value'")
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
