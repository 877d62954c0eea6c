"""Writing to a disk that may be full, read-only or gone: whole files or none, and errors that say where."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from util.errors import UserError

_TEMPORARY = ".tmp-"  # hidden, and before the name, so that the suffix still tells the kind of file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the disk within becomes a UserError with the file's path and the space that is left."""
    try:
        yield
    except OSError as error:
        left = ""
        with suppress(OSError):
            left = f" ({size(free(path))} are free there now)"
        raise UserError(f"{path}: cannot be written: {error.strerror or error}{left}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end; until then, and after an error, that is as it was.

    Raises:
        UserError: it can't be written; nothing of it is left.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    with writing(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process has left half written in a folder and below it."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        with writing(path):
            path.unlink()


def require(folder: Path, needed: int) -> None:
    """See whether so many bytes of checkpoints fit into a folder.

    Raises:
        UserError: they don't.
    """
    if needed > (left := free(folder)):
        raise UserError(
            f"{folder}: the run's checkpoints need {size(needed)} more, but only {size(left)} are free; make room, "
            "name another --checkpoints_dir, or have fewer (--save_every, --keep)"
        )


def free(path: Path) -> int:
    """Bytes that can still be written where a file or folder is, or is to be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
