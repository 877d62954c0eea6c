"""Checkpoint files: written so that a kill at any moment leaves the file before whole, and checked when read.

torch is imported only where tensors are written or read: programs that need no more than the names of a run's files
start without it.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from util import disk
from util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of our checkpoints; a later one is refused."""

_FOLDER = 0x10  # attribute of a part of a zip archive that is a folder


def save(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write a state to a temporary file beside `path`, flush it to the disk, then rename it.

    Args:
        state: plain values and tensors.
        path: the file.
        previous: the name under which the file that was at `path` is kept.

    Raises:
        UserError: the file can't be written; the earlier files are as they were.
    """
    with disk.replacing(path) as temporary:
        _write(state, temporary)
        if previous and path.exists() and not _add_name(path, previous):
            path.replace(previous)  # for a moment there is no `path`
    _flush(path.parent)


def save_weights(state: dict[str, Tensor], about: dict, path: Path) -> None:
    """Write tensors, and plain values about them, as a .safetensors file; `load` returns {**about, "network": state}.

    Raises:
        UserError: the file can't be written.
    """
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in state.items()}, {"about": json.dumps(about)})
    with disk.replacing(path) as temporary:
        temporary.write_bytes(data)


def link(path: Path, other: Path) -> None:
    """Make `other` a second name of the file at `path`, or a copy of it where the file system has no hard links."""
    if not _add_name(path, other):
        with disk.replacing(other) as temporary:
            shutil.copyfile(path, temporary)
    _flush(other.parent)


def load(path: str | Path) -> dict:
    """The content of a checkpoint file, on the CPU; nothing in it is executed.

    Raises:
        UserError: the file is cut short or damaged, was written by a later version of this program, or holds anything
            but tensors and plain values.
    """
    import torch

    path = Path(path)
    weights_only = path.suffix == ".safetensors"
    if not weights_only:
        _check(path)
    try:
        content = _load_weights(path) if weights_only else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise whatever the damage happens to trigger
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{path}: written by a later version of this program; update it")
    return content


def check_fit(expected: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Compare the names and shapes of two state dicts.

    Raises:
        UserError: they differ; the message names the differences.
    """
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    wrong = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(given))
        if given[name].shape != expected[name].shape
    ]
    if not (missing or extra or wrong):
        return
    parts = [("missing", missing), ("left over", extra), ("of another shape", wrong)]
    listed = "; ".join(f"{len(names)} {what}: {_first_of(names)}" for what, names in parts if names)
    raise UserError(
        f"{where}: the weights are not this network's (is --inet the model they were trained for?); {listed}"
    )


def check_finite(state: dict[str, Tensor], where: str) -> None:
    """Check that all weights are finite numbers.

    Raises:
        UserError: some are NaN or infinite; the message names them.
    """
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} parameters are NaN or infinite: {_first_of(bad)}; take an earlier checkpoint"
        )


def _write(state: dict, path: Path) -> None:
    import torch

    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps the disk's error in it, or raises it afterwards
            while error and not isinstance(error, OSError):
                error = error.__cause__ or error.__context__
            if error is None:
                raise
            raise error from None
        file.flush()
        os.fsync(file.fileno())


def _add_name(path: Path, other: Path) -> bool:
    """Make `other` a second name of a file; False where the file system has no hard links."""
    with suppress(UserError), disk.replacing(other) as temporary:
        os.link(path, temporary)
        return True
    return False


def _flush(folder: Path) -> None:
    """Make the renames in a folder reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _load_weights(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        return about | {"network": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _check(path: Path) -> None:
    """Compare every part of a file with its checksum, which torch.save writes and torch.load ignores.

    Only torch's format since version 1.6, a zip archive, has checksums. They may be switched off; then all are zero.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                damage = "" if file.tell() else "it is empty"
            else:
                with zipfile.ZipFile(file) as archive:
                    parts = archive.infolist()
                    damage = archive.testzip() if any(part.CRC for part in parts) else ""
                if any(part.external_attr & _FOLDER for part in parts):
                    damage = "a part of it has become a folder"  # torch.load would read uninitialised memory instead
                if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
                    damage = "it would unpack to more than it is"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, too, raises whatever the damage happens to trigger
        damage = str(error) or type(error).__name__
    if damage:
        raise UserError(f"{path}: cut short or damaged ({damage})")


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
