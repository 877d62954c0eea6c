"""Checkpoints on disk: written so that a kill at any moment leaves the one before whole."""

import os
import shutil
from pathlib import Path

import torch

from util.errors import UserError


def save(state: dict, path: Path) -> None:
    """Write a state dict to a temporary file beside `path`, flush it to the disk, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def link(path: Path, other: Path) -> None:
    """`other` becomes a second name of what `path` names now, or a copy where the file system has no such names."""
    temporary = other.with_name(other.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    _rename(temporary, other)


def _rename(path: Path, name: Path) -> None:
    path.replace(name)
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def load(path: str | Path) -> dict:
    """What a checkpoint file holds, on the CPU; nothing in it is executed.

    Raises:
        UserError: the file can't be read or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to trigger
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content
