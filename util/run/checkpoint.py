"""Checkpoint files: written so that a kill at any moment leaves the file before whole, and checked when read.

torch is imported only where tensors are written or read: programs that need no more than the names of a run's files
start without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.run import contents

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of our checkpoints; a later one is refused."""

_DTYPES = {"float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"}
_PATHS = [PurePath, PurePosixPath, PureWindowsPath, PosixPath]  # others' checkpoints hold some; to make one is harmless


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

    The format has no checksum. A digest of all this is part of the file, and is compared when it is loaded.

    Raises:
        UserError: the file can't be written.
    """
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in state.items()}
    text = json.dumps(about)
    data = save(state, {"about": text, "digest": _digest(text, state)})
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
    is_safetensors = contents.check_file(path)
    if not is_safetensors:
        contents.check_parts(path)
    try:
        if is_safetensors:
            content = _load_weights(path)
        else:
            with torch.serialization.safe_globals(_PATHS), path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)  # by content, not by the suffix
        contents.check_bounds(content, path.stat().st_size)
    except UserError:
        raise
    except Exception as error:  # both raise whatever the damage happens to trigger
        reason = contents.describe(error, path)
        raise UserError(f"{path}: not a readable checkpoint of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{path}: written by a later version of this program; update it")
    return content


def check_fit(expected: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Compare the names and shapes of two state dicts, and whether their values are numbers of the same kind.

    Raises:
        UserError: they differ; the message names the differences.
    """
    odd = [str(name) for name, value in given.items() if not isinstance(name, str) or not is_plain(value)]
    if odd:
        raise UserError(f"{where}: {len(odd)} values are not ordinary tensors: {_first_of(odd)}")
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    wrong = [
        f"{name} {_layout(given[name])} instead of {_layout(expected[name])}"
        for name in sorted(set(expected) & set(given))
        if given[name].shape != expected[name].shape
        or given[name].is_floating_point() != expected[name].is_floating_point()
    ]
    if not (missing or extra or wrong):
        return
    parts = [("missing", missing), ("left over", extra), ("of another shape", wrong)]
    listed = "; ".join(f"{len(names)} {what}: {_first_of(names)}" for what, names in parts if names)
    raise UserError(
        f"{where}: the weights are not this network's (is --inet the model they were trained for?); {listed}"
    )


def is_plain(value: object) -> bool:
    """Whether the value is a tensor that a network may have: not sparse, with values, of a common type."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return str(value.dtype).removeprefix("torch.") in _DTYPES


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
        metadata = file.metadata() or {}
        network = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = metadata.get("about", "{}")
    if "digest" in metadata and metadata["digest"] != _digest(text, network):
        raise UserError(f"{path}: damaged (its content is not what its digest says)")
    return json.loads(text) | {"network": network}


def _digest(about: str, state: dict[str, Tensor]) -> str:
    """A hash of the tensors, their names, types and shapes, and of the text about them."""
    import torch

    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layout(value: Tensor) -> str:
    return str(tuple(value.shape)) + ("" if value.is_floating_point() else f" of {value.dtype}".replace("torch.", ""))


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
