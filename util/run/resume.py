"""Whether a run can be continued: is its checkpoint usable, and what has changed since the run began."""

import hashlib
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dereflect.options import as_text
from dereflect.options.arguments import roles
from dereflect.options.parser import START, WHAT
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from dereflect.util.run.reader import is_count
from dereflect.util.stability import Guard

TEST = "test set "
"""The prefix of the names of sets that are only evaluated."""

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("*.py", "data/*.py", "models/**/*.py", "options/*.py", "util/**/*.py")

_STATE_TYPES = {"inet": str, "options": dict, "epoch": int, "step": int, "global_step": int, "best": float | None}
_STATE_TYPES |= {"network": dict, "ema": dict | None, "ema_updates": int, "optimizer": dict, "random": Tensor}
"""What a checkpoint must hold so that a run can be continued from it."""


def identity(options: Namespace, data: dict[str, dict], samples_per_step: int) -> dict:
    """What a run is, part of each of its checkpoints.

    Args:
        options: of `options.parse_train`.
        data: of `fingerprint`.
        samples_per_step: of all processes.
    """
    return {
        "inet": options.inet,
        "options": as_text(options),
        "samples_per_step": samples_per_step,
        "data": data,
        "code": source_hashes(),
    }


def fingerprint(files: Mapping[str, Sequence[Path]], base: Path) -> dict[str, dict]:
    """The files of each set in a few bytes: their number, and a hash of their names below `base` and their sizes."""
    found = {}
    for name, paths in files.items():
        digest = hashlib.blake2b(digest_size=16)
        for path in paths:
            size = path.stat().st_size if path.exists() else -1  # it may have vanished since it was found
            digest.update(os.fsencode(path.relative_to(base)) + b"\0%d\0" % size)
        found[name] = {"files": len(paths), "hash": digest.hexdigest()}
    return found


def source_hashes() -> dict[str, str]:
    """The program: torch's version, and a hash of every source file that training uses."""
    found = {"torch": str(torch.__version__)}
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        found[path.relative_to(_ROOT).as_posix()] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


def check_usable(
    state: dict, where: Path, options: Namespace, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Check that a checkpoint is complete, of this model, and of values that a training can go on with.

    Args:
        state: the content of the checkpoint.
        where: its file.
        options: inet and ema are used.
        weights: the network's state dict.
        optimizer: of the network.

    Raises:
        UserError: it isn't.
    """
    wrong = [name for name, kind in _STATE_TYPES.items() if not isinstance(state.get(name, ...), kind)]
    wrong = wrong or [name for name, check in _STATE_CHECKS.items() if not check(state.get(name))]
    if wrong:
        raise UserError(f"{where}: not what a run can be continued from: no usable {', '.join(wrong)} in it")
    if state["inet"] != options.inet:
        raise UserError(f"{where}: a checkpoint of {state['inet']}, but --inet is {options.inet}")
    if bool(state["ema"]) != bool(options.ema):
        raise UserError(f"{where}: written {'with' if state['ema'] else 'without'} --ema; resume likewise")
    for part in ("network", "ema"):
        if state[part]:
            checkpoint.check_fit(weights, state[part], str(where))
            checkpoint.check_finite(state[part], f"{where}, {part}")
    if trouble := _trouble_of_optimizer(state["optimizer"], optimizer):
        raise UserError(f"{where}: not what a run can be continued from: the optimizer's {trouble}")


def _trouble_of_optimizer(state: dict, optimizer: torch.optim.Optimizer) -> str:
    """What is wrong with a saved state of an optimiser; empty if nothing is."""
    layout = [len(group["params"]) for group in optimizer.param_groups]
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return "param_groups are not there"
    ids = [group.get("params") for group in groups]
    if not all(isinstance(part, list) for part in ids) or [len(part) for part in ids] != layout:
        return "param_groups are of another network"
    if [key for part in ids for key in part] != list(range(sum(layout))) or not all(
        _is_finite(group.get("lr")) for group in groups
    ):
        return "param_groups are damaged"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(moments, dict) or not all(type(key) is int and 0 <= key < len(parameters) for key in moments):
        return "state is of another network"
    for key, values in moments.items():
        if not isinstance(values, dict) or set(values) != {"step", "exp_avg", "exp_avg_sq"}:
            return f"state of parameter {key} is not that of Adam"
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameters[key].shape
            if not checkpoint.is_plain(value) or not value.is_floating_point() or value.shape != shape:
                return f"{name} of parameter {key} is not what it should be"
            if not value.isfinite().all() or (name != "exp_avg" and (value < 0).any()):
                return f"{name} of parameter {key} has values that are NaN, infinite or negative"
    return ""


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_random(value: Tensor | None) -> bool:
    """Whether these are a state of torch's random numbers."""
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _are_options(value: dict) -> bool:
    """Whether these are of the kind that `as_text` gives."""

    def plain(part: object) -> bool:
        return part is None or isinstance(part, str | int | float)

    known = all(isinstance(key, str) for key in value)
    counts = (value.get(name, 1) for name in ("batchSize", "accumulate"))
    values = (all(map(plain, part)) if isinstance(part, list) else plain(part) for part in value.values())
    return known and all(values) and all(is_count(count) for count in counts)


def _are_files(value: object) -> bool:
    """Whether these are of `fingerprint`."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(name, str) and isinstance(found, dict) for name, found in value.items())
        and all(is_count(found.get("files")) and isinstance(found.get("hash"), str) for found in value.values())
    )


def _are_hashes(value: object) -> bool:
    """Whether these are of `source_hashes`."""
    return value is None or (
        isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
    )


def _is_guard(value: object) -> bool:
    """Whether this is of `util.stability.Guard.state`."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != set(Guard().state()):
        return False
    counts = [value["seen"], value["returns"]]
    if not isinstance(value["skipped"], list) or not all(map(is_count, [*counts, *value["skipped"]])):
        return False
    numbers = all(_is_finite(value[name]) for name in ("mean", "square", "rate"))
    return numbers and value["square"] >= 0 and 0 < value["rate"] <= 1


_STATE_CHECKS = dict.fromkeys(("epoch", "step", "global_step", "ema_updates"), is_count)
_STATE_CHECKS |= {"best": lambda best: best is None or not math.isnan(best), "random": _are_random}
_STATE_CHECKS |= {
    "random_cuda": lambda state: state is None or (isinstance(state, Tensor) and state.dtype == torch.uint8)
}
_STATE_CHECKS |= {"options": _are_options, "data": _are_files, "code": _are_hashes, "guard": _is_guard}
_STATE_CHECKS |= {"samples_per_step": lambda count: count is None or (is_count(count) and count > 0)}


def check_continuable(before: dict, now: dict) -> list[str]:
    """Compare two of `identity`: that of a run's checkpoint, and that of the run as it would go on.

    Returns:
        Lines about what has changed.

    Raises:
        UserError: it would become another run, --resume force is not given, and more than an evaluation is wanted.
    """
    harmless, serious = differences(before, now)
    if serious and now["options"]["resume"] != "force" and now["options"]["nEpochs"]:
        listed = "\n  ".join(serious)
        raise UserError(f"--resume: the run would not be the one that it was:\n  {listed}\nPut that back, give the run "
                        "another --name, or insist with --resume force")  # fmt: skip
    return [f"changed since the run was saved: {line}" for line in serious + harmless]


def differences(before: dict, now: dict) -> tuple[list[str], list[str]]:
    """The differences between two of `identity`, a line each: the harmless ones, and those that make another run."""
    harmless: list[str] = []
    serious: list[str] = []
    for name, (was, is_now) in _differing(before["options"], now["options"]).items():
        known = name in before["options"] and name in now["options"]
        if known and roles().get(name) is not START:
            (harmless if _is_harmless(name, before, now) else serious).append(f"--{name} was {was}, now it is {is_now}")
    for name, (was, is_now) in _differing(before.get("data", now["data"]), now["data"]).items():
        if not name.startswith(TEST) and not now["options"]["nEpochs"]:
            continue  # an evaluation doesn't look for training data
        counts = [found["files"] if found else "no" for found in (was, is_now)]
        line = f"{name}: {counts[0]} files, as before, but with other names or sizes"
        if counts[0] != counts[1]:
            line = f"{name}: there were {counts[0]} files, now there are {counts[1]}"
        picks = not name.startswith(TEST) or now["options"]["best_by"] == "test"
        (serious if picks else harmless).append(line)
    if changed := _differing(before.get("code", now["code"]), now["code"]):
        harmless.append(f"the program isn't the same: {', '.join(changed)}")
    was, is_now = before.get("samples_per_step"), now["samples_per_step"]
    if was != is_now and not any(line.startswith(("--batchSize", "--accumulate")) for line in serious):
        harmless.append(f"a step had {was} samples, now it has {is_now}, as the processes are others")
    return harmless, serious


def _is_harmless(name: str, before: dict, now: dict) -> bool:
    if name in {"batchSize", "accumulate"}:  # one may become smaller as the other grows
        was, is_now = (state["options"]["batchSize"] * state["options"]["accumulate"] for state in (before, now))
        return was == is_now
    if name == "nEpochs":
        return now["options"]["scheduler"] != "cosine"  # which falls over all epochs
    return roles().get(name) is not WHAT


def _differing(before: Mapping, now: Mapping) -> dict[str, tuple]:
    """The keys whose values differ, with both values; a missing key counts as None."""
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
