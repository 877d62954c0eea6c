"""Checkpoints on disk: written so that a kill at any moment leaves the one before whole, and checked when read."""

import json
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from util import disk
from util.errors import UserError

FORMAT = 1
"""Of our checkpoints; a later one is refused."""

_FOLDER = 0x10  # among a zip archive's attributes of a part


def save(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write a state dict to a temporary file beside `path`, flush it to the disk, then rename it.

    Args:
        state: plain values and tensors.
        path: the file.
        previous: the name that the file before keeps.

    Raises:
        UserError: it can't be written; the files before are as they were.
    """
    with disk.replacing(path) as temporary:
        _write(state, temporary)
        if previous and path.exists() and not _give_name(path, previous):
            path.replace(previous)  # for a moment there is no `path`
    _flush(path.parent)


def save_weights(state: dict[str, torch.Tensor], about: dict, path: Path) -> None:
    """Write tensors, and plain values about them, as a .safetensors file; `load` returns {**about, "network": state}.

    Raises:
        UserError: it can't be written.
    """
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in state.items()}, {"about": json.dumps(about)})
    with disk.replacing(path) as temporary:
        temporary.write_bytes(data)


def link(path: Path, other: Path) -> None:
    """`other` becomes a second name of what `path` names now, or a copy where the file system has no such names."""
    if not _give_name(path, other):
        with disk.replacing(other) as temporary:
            shutil.copyfile(path, temporary)
    _flush(other.parent)


def _write(state: dict, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # in which torch wraps, or with which it follows, what the disk says
            while error and not isinstance(error, OSError):
                error = error.__cause__ or error.__context__
            if error is None:
                raise
            raise error from None
        file.flush()
        os.fsync(file.fileno())


def _give_name(path: Path, other: Path) -> bool:
    """Make `other` a second name of a file; whether this file system has such a thing."""
    with suppress(UserError), disk.replacing(other) as temporary:
        os.link(path, temporary)
        return True
    return False


def _flush(folder: Path) -> None:
    """Have the renames in a folder reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load(path: str | Path) -> dict:
    """What a checkpoint file holds, on the CPU; nothing in it is executed.

    Raises:
        UserError: the file is cut short or damaged, of a later version of this program, or holds anything but tensors
            and plain values.
    """
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


def _load_weights(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        return about | {"network": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def _check(path: Path) -> None:
    """Compare every part of a file with the checksum that torch.save has written, and torch.load doesn't look at.

    Only the format that torch has had since version 1.6, a zip archive, has checksums; unless they were switched off,
    and all are zero.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                damage = "" if file.tell() else "it is empty"
            else:
                with zipfile.ZipFile(file) as archive:
                    parts = archive.infolist()
                    damage = archive.testzip() if any(part.CRC for part in parts) else ""
                if any(
                    part.external_attr & _FOLDER for part in parts
                ):  # torch.load would take what is in memory for it
                    damage = "a part of it has become a folder"
                if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
                    damage = "it would unpack to more than it is"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises whatever the damage happens to trigger, too
        damage = str(error) or type(error).__name__
    if damage:
        raise UserError(f"{path}: cut short or damaged ({damage})")
