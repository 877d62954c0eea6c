"""What has changed since a run began, and whether it can be continued all the same."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from options.arguments import roles
from options.parser import START, WHAT
from util.errors import UserError

TEST = "test set "
"""How the names of sets begin that are only measured."""

_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("*.py", "data/*.py", "models/**/*.py", "options/*.py", "util/**/*.py")


def fingerprint(files: Mapping[str, Sequence[Path]], base: Path) -> dict[str, dict]:
    """The files of each set in a few bytes: how many they are, and a hash of their names below `base` and sizes."""
    found = {}
    for name, paths in files.items():
        digest = hashlib.blake2b(digest_size=16)
        for path in paths:
            size = path.stat().st_size if path.exists() else -1  # it may have vanished since it was found
            digest.update(os.fsencode(path.relative_to(base)) + b"\0%d\0" % size)
        found[name] = {"files": len(paths), "hash": digest.hexdigest()}
    return found


def code() -> dict[str, str]:
    """The program: torch's version, and a hash of every source file that training uses."""
    found = {"torch": str(torch.__version__)}
    for path in sorted(path for pattern in _CODE for path in _ROOT.glob(pattern)):
        found[path.relative_to(_ROOT).as_posix()] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


def changes(before: dict, now: dict) -> tuple[list[str], list[str]]:
    """What differs between two of `Engine.identity`, a line each: what is harmless, and what isn't."""
    harmless: list[str] = []
    serious: list[str] = []
    for name, (was, is_now) in _differing(before["options"], now["options"]).items():
        known = name in before["options"] and name in now["options"]
        if known and roles().get(name) is not START:
            (harmless if _is_harmless(name, before, now) else serious).append(f"--{name} was {was}, now it is {is_now}")
    for name, (was, is_now) in _differing(before.get("data", now["data"]), now["data"]).items():
        if not name.startswith(TEST) and not now["options"]["nEpochs"]:
            continue  # what isn't trained on isn't looked for
        counts = [found["files"] if found else "no" for found in (was, is_now)]
        told = f"{name}: {counts[0]} files, as before, but with other names or sizes"
        if counts[0] != counts[1]:
            told = f"{name}: there were {counts[0]} files, now there are {counts[1]}"
        picks = not name.startswith(TEST) or now["options"]["best_by"] == "test"
        (serious if picks else harmless).append(told)
    if changed := _differing(before.get("code", now["code"]), now["code"]):
        harmless.append(f"the program isn't the same: {', '.join(changed)}")
    was, is_now = before.get("samples_per_step"), now["samples_per_step"]
    if was != is_now and not any(line.startswith(("--batchSize", "--accumulate")) for line in serious):
        harmless.append(f"a step had {was} samples, now it has {is_now}, as the processes are others")
    return harmless, serious


def check(before: dict, now: dict) -> list[str]:
    """Lines about what has changed, when a run with one of `Engine.identity` goes on with another.

    Raises:
        UserError: it would become another run, and neither --resume force insists on that nor is it only evaluated.
    """
    harmless, serious = changes(before, now)
    if serious and now["options"]["resume"] != "force" and now["options"]["nEpochs"]:
        listed = "\n  ".join(serious)
        raise UserError(f"--resume: the run would not be the one that it was:\n  {listed}\nPut that back, give the run "
                        "another --name, or insist with --resume force")  # fmt: skip
    return [f"changed since the run was saved: {line}" for line in serious + harmless]


def _is_harmless(name: str, before: dict, now: dict) -> bool:
    if name in {"batchSize", "accumulate"}:  # one may become smaller as the other grows
        was, is_now = (state["options"]["batchSize"] * state["options"]["accumulate"] for state in (before, now))
        return was == is_now
    if name == "nEpochs":
        return now["options"]["scheduler"] != "cosine"  # which falls over all epochs
    return roles().get(name) is not WHAT


def _differing(before: Mapping, now: Mapping) -> dict[str, tuple]:
    """The keys whose values aren't the same, with both values; None where there is none."""
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
