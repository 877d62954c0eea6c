"""What a checkpoint file is, found out before it is read, and bounds on what is read from it."""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dereflect.util.errors import UserError

_FOLDER = 0x10  # attribute of a part of a zip archive that is a folder
_LEGACY_PICKLES = 5  # that torch before 1.6 wrote in front of the tensors' bytes
_MOST_ENTRIES = 2_000_000  # values in a checkpoint, each counted as often as it is reached
_MOST_DEPTH = 100  # of values within values
_MOST_PICKLE = 1 << 26  # bytes of a checkpoint that are not tensors
_MOST_TIMES = 8  # the bytes of all tensors, over the bytes of the file: views of the same bytes count each
_SPARE = 1 << 26  # bytes of tensors that are always allowed

_MARKS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"<", "a web page, not a checkpoint: download it again"),
    (b"\x89HDF", "an HDF5 file, not a checkpoint of PyTorch"),
    (b"\x1f\x8b", "a gzip archive, not a checkpoint: unpack it first"),
    (b"\xfd7zXZ", "an xz archive, not a checkpoint: unpack it first"),
    (b"\x93NUMPY", "a NumPy array, not a checkpoint of PyTorch"),
)
_HARMLESS = re.compile(r"(collections|_codecs|torch\._utils)\.|torch\.(\w+Storage|Size|device|\w+\d+)$")


class Unfit(Exception):
    """A file that must not be read; the message says why."""


def check_file(path: Path) -> bool:
    """Check that a file may be a checkpoint, as far as its first bytes tell.

    Returns:
        Whether it is a file of the format safetensors.

    Raises:
        UserError: it can't be read, is no regular file, or is known to be something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    for mark, what in _MARKS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(mark):
            raise UserError(f"{path}: {what}")
    is_zip = head.startswith(b"PK\3\4")
    return (path.suffix == ".safetensors" and not is_zip) or head[8:10] == b'{"'


def check_parts(path: Path) -> None:
    """Compare every part of a file with its checksum, which torch.save writes and torch.load ignores; bound its table.

    Only torch's format since version 1.6, a zip archive, has checksums. They may be switched off; then all are zero.

    Raises:
        UserError: the file is damaged, not a checkpoint, or made to take up time or memory.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\3\4":
                with zipfile.ZipFile(file) as archive:
                    _check_zip(archive, file.seek(0, os.SEEK_END))
            elif file.tell():
                file.seek(0)
                _check_pickles(file, path.stat().st_size)
            else:
                raise _Damage("it is empty")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Unfit as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, too, raises whatever the damage happens to trigger
        raise UserError(f"{path}: cut short or damaged ({str(error) or type(error).__name__})") from error


class _Damage(Exception):
    pass


def _check_zip(archive: zipfile.ZipFile, size: int) -> None:
    parts = archive.infolist()
    if any(part.filename.endswith(".npy") for part in parts):
        raise Unfit("NumPy's arrays, not a checkpoint of PyTorch")
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise Unfit("TorchScript, which is a program, not a checkpoint: save the state_dict() of the network instead")
    if not any(part.filename.endswith("data.pkl") for part in parts):
        raise Unfit("a zip archive, not a checkpoint: unpack it first")
    if any(part.external_attr & _FOLDER for part in parts):
        raise _Damage("a part of it has become a folder")  # torch.load would read uninitialised memory instead
    if sum(part.file_size for part in parts) > size:
        raise _Damage("it would unpack to more than it is")
    if not any(part.CRC for part in parts):
        for part in parts:
            part.CRC = None  # zipfile then compares nothing
    elif bad := archive.testzip():
        raise _Damage(bad)
    for part in parts:
        if part.filename.endswith("data.pkl"):
            if part.file_size > _MOST_PICKLE:
                raise Unfit(f"its table of contents has {part.file_size:,} bytes, which none needs")
            _check_pickle(io.BytesIO(archive.read(part)))


def _check_pickles(file: BinaryIO, size: int) -> None:
    """Those of a file that torch before 1.6 has written."""
    try:
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)
            if file.tell() >= size:
                return
            if file.tell() > _MOST_PICKLE:
                raise Unfit(f"its table of contents has more than {_MOST_PICKLE:,} bytes, which none needs")
    except Unfit:
        raise
    except Exception as error:  # pickletools raises ValueError for all that is no pickle, and others for hostile ones
        raise Unfit("not a readable checkpoint of tensors and plain values (neither zip nor pickle)") from error


def _check_pickle(file: BinaryIO) -> None:
    """Run through a pickle, executing nothing, and bound its tuples: hashing a key visits all that is within it.

    A tuple can be many times its pickle's length, as parts that occur twice are pickled once: 60 bytes describe a
    tuple whose hash takes years.

    Raises:
        Unfit: they are too large or too deep.
    """
    stack: list[tuple[int, int]] = []  # of each value: how many values are within, how deep
    marks: list[int] = []
    memo: dict[int, tuple[int, int]] = {}
    hashed = 0
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken, values = _taken(opcode, stack, marks)
            if name.startswith("SETITEM"):
                hashed += sum(count for count, _ in values[::2])
            for _ in opcode.stack_after:
                whole = name.startswith("TUPLE") or name in ("REDUCE", "NEWOBJ", "FROZENSET")
                made = taken if whole else []
                stack.append((1 + sum(count for count, _ in made), 1 + max((depth for _, depth in made), default=0)))
                if stack[-1][1] > _MOST_DEPTH or stack[-1][0] > _MOST_ENTRIES:
                    raise Unfit("not a readable checkpoint: its values are nested too deeply")
        if hashed > _MOST_ENTRIES:
            raise Unfit("not a readable checkpoint: its keys are nested too deeply")


def _taken(opcode: pickletools.OpcodeInfo, stack: list, marks: list[int]) -> tuple[list, list]:
    """Take from the stack what an opcode takes: all of it, and what is above the mark (or above the first value)."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        start = marks.pop()
        below = before.index(pickletools.markobject)
        values = stack[start:]
        taken = stack[start - below :] if below else values
        del stack[start - below :]
        return taken, values
    taken = stack[len(stack) - len(before) :]
    if len(taken) < len(before):
        raise ValueError("more is taken from the stack than is there")
    del stack[len(stack) - len(before) :]
    return taken, taken[1:]


def check_bounds(content: object, size: int) -> None:
    """Bound what is in a checkpoint, so that going through it, comparing it or printing it can't take for ever.

    Args:
        content: the checkpoint.
        size: of its file, in bytes.

    Raises:
        Unfit: it has too many values, too deep ones, one within itself, or tensors that are mostly repetition.
    """
    known: dict[int, tuple[int, int, int]] = {}  # of each value by id: values, bytes of tensors, depth; all within it
    open_: set[int] = set()
    todo: list[tuple[object, bool]] = [(content, False)]
    while todo:
        value, done = todo.pop()
        if id(value) in known:
            continue
        parts = list(_parts(value))
        if done or not parts:
            open_.discard(id(value))
            within = [known[id(part)] for part in parts]
            known[id(value)] = (
                1 + sum(count for count, _, _ in within),
                _bytes(value) + sum(number for _, number, _ in within),
                1 + max((depth for _, _, depth in within), default=0),
            )
            if known[id(value)][0] > _MOST_ENTRIES or known[id(value)][2] > _MOST_DEPTH:
                raise Unfit("its values are nested too deeply")
            continue
        if id(value) in open_:
            raise Unfit("one of its values is within itself")
        open_.add(id(value))
        todo.append((value, True))
        for part in parts:
            if id(part) in open_:
                raise Unfit("one of its values is within itself")
            todo.append((part, False))
    if known[id(content)][1] > _MOST_TIMES * size + _SPARE:
        raise Unfit(f"its tensors repeat {size:,} bytes as {known[id(content)][1]:,}")


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value


def _bytes(value: object) -> int:
    from torch import Tensor

    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def describe(error: Exception, path: Path) -> str:
    """Why torch has not read a checkpoint, in a line; torch's own text advises to execute what is in it."""
    text = str(error).strip()
    found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:global|class|function)\W+([\w]+(?:\.\w+)+)", text)
    if found and not _HARMLESS.match(found[1]):
        if found[1] == _first_global(path):
            return f"a whole pickled module or object, {found[1]}: save its state_dict() instead, as no code is run"
        return f"it holds {found[1]}, which is code, and no code is run"
    if not text or "weights_only" in text:
        return type(error).__name__
    return text.splitlines()[0][:200]


def _first_global(path: Path) -> str:
    """The class that a pickle begins with, which is what the whole file is."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                return _first_of(io.BytesIO(archive.read(name)))
        file.seek(0)
        return _first_of(file)


def _first_of(file: BinaryIO) -> str:
    words: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            return str(argument).replace(" ", ".")
        if opcode.name == "STACK_GLOBAL":
            return ".".join(words[-2:])
        if isinstance(argument, str):
            words.append(argument)
        elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE"):
            return ""  # it begins with plain values
    return ""
