"""Writes to a disk that may be full, read-only or gone: a file is written whole or not at all, and errors name it."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dereflect.util.errors import UserError

_LONGEST_NAME = 255  # bytes
_TEMPORARY = ".tmp-"  # hidden, and before the name, so that the suffix still tells the kind of file


@contextmanager
def writing(path: Path, option: str = "") -> Iterator[None]:
    """Turn an error of the disk in this block into a UserError with the file's path and the space that is left.

    Args:
        path: what is written.
        option: the option that named it, if any; the message begins with it.
    """
    try:
        yield
    except OSError as error:
        left = ""
        if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            with suppress(OSError):
                left = f" ({size(free(path))} are free there now)"
        raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}{left}".lstrip()) from error


@contextmanager
def replacing(path: Path, option: str = "") -> Iterator[Path]:
    """Give a temporary path to write, which replaces `path` at the end; after an error, `path` is as it was before.

    A `path` that is no regular file, such as a pipe or /dev/null, is written directly.

    Raises:
        UserError: the file can't be written; nothing of it is left.
    """
    with writing(path, option):
        if path.is_symlink():
            path = Path(os.path.realpath(path))  # `Path.resolve` would raise what is no OSError at links in a circle
            if path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if path.exists() and not path.is_file():
            yield path
            return
        temporary = path.with_name(_temporary_name(path))
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def fitting(name: str, end: str = "") -> str:
    """A file's name and its end, such as a suffix; a hash stands for the name if that would be too long for a disk."""
    if len(os.fsencode(name + end)) <= _LONGEST_NAME:
        return name + end
    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest() + end


def _temporary_name(path: Path) -> str:
    """A name beside that of `path` and not longer than file systems allow, if that of `path` isn't."""
    begin = f"{_TEMPORARY}{os.getpid()}-"
    if len(os.fsencode(begin + path.name)) <= _LONGEST_NAME:
        return begin + path.name
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()
    return f"{begin}{digest}{path.suffix[-16:]}"


def check_folder(folder: Path, option: str = "") -> None:
    """See whether files can be written into a folder, which need not exist yet, before the work for them is done.

    Args:
        folder: the folder.
        option: the option that named it, if any; the message begins with it.

    Raises:
        UserError: they can't.
    """
    with writing(folder, option):
        there = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
        wrong = None if there.is_dir() else errno.ENOTDIR
        if wrong is None and not os.access(there, os.W_OK | os.X_OK):
            wrong = errno.EACCES
        if wrong:
            raise OSError(wrong, os.strerror(wrong))


def read_regular(path: Path, most: int = 1 << 28) -> bytes:
    """The content of a regular file: a pipe would be waited for, and a device has no end.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it can't be read, is not a regular file, or has more than `most` bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {size(most)}", str(path))
    return path.read_bytes()


def check_regular(folder: Path) -> None:
    """Check that a folder has nothing but files and folders in it, which may be links.

    Raises:
        UserError: it has something else, such as a pipe or a device, which must not be written.
    """
    odd = [path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]
    if odd:
        raise UserError(f"{odd[0]}: neither a file nor a folder; move it away")


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder and the folders below it."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        with writing(path):
            path.unlink()


def require(folder: Path, needed: int) -> None:
    """Check that a number of bytes fit into a folder.

    Args:
        folder: of the run.
        needed: the bytes of all checkpoints that are still to be written.

    Raises:
        UserError: they don't fit.
    """
    if needed > (left := free(folder)):
        raise UserError(
            f"{folder}: the run's checkpoints need {size(needed)} more, but only {size(left)} are free; make room, "
            "name another --checkpoints_dir, or have fewer (--save_every, --keep)"
        )


def free(path: Path) -> int:
    """Free bytes on the disk of a file or folder, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def changed_at(path: Path) -> int | None:
    """When a file was last changed, in nanoseconds; None where there is no such file.

    The file is opened for that: network file systems remember the time of a closed file for a while.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def size(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
