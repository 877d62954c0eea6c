"""A program's own temporary folder, which goes when the program does, however it ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_UNLOCKED = 60  # seconds after which a folder without a lock is not one that is just being made


@contextlib.contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """A new folder that only this user can open, for this block. What killed programs have left goes first."""
    delete_orphans(Path(tempfile.gettempdir()), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder, claimed(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Mark the folder as in use, for this block and at most for the life of this process."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def delete_orphans(parent: Path, prefix: str) -> None:
    """Delete this user's folders of that prefix whose programs were killed (`kill -9`)."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # in use, or gone
            about = folder.lstat()
            if about.st_uid != os.getuid():  # a lock of another user isn't even opened
                continue
            if (folder / ".lock").exists() or time.time() - about.st_mtime > _UNLOCKED:
                with claimed(folder):
                    shutil.rmtree(folder, ignore_errors=True)
