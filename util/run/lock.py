"""One process at a time in a run's folder."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TextIO

from util import disk
from util.errors import UserError

_BEAT = 10.0  # seconds between two signs of life
_PATIENCE = 60.0  # seconds without one, after which a process of another machine counts as gone


class Lock:
    """The right to write into a folder, from `acquire` until the end of the context or of the process.

    It is a file `lock` that says whose it is, and that is held by flock. So it is free when the process ends, however
    that happens. Some network file systems have no flock, or one that other machines don't see. There, what the file
    says counts: a process of this machine is looked up, and one of another machine must show a sign of life within a
    minute, a change of the file's time. Clocks of two machines are never compared.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._file: TextIO | None = None
        self._released = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take it; `say` is told when it is taken over from a process that is gone.

        Raises:
            UserError: another process has it, or the file can't be written.
        """
        with disk.writing(self.path):
            self._file = self._take(say)
        threading.Thread(target=self._beat, daemon=True).start()

    def confirm(self) -> None:
        """Look again, some time after `acquire`: of two machines without a common flock, the last one has it.

        Raises:
            UserError: another process has it.
        """
        if (owner := self._owner()) != self._me:
            raise self._refusal(owner)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._released.set()
        with suppress(OSError):  # the disk may be read-only by now; the process's end leaves it to others, too
            if self._owner() == self._me:
                self.path.unlink()
            self.path.parent.rmdir()  # only if nothing has come to be in it
        self._file.close()

    def _take(self, say: Callable[[str], None]) -> TextIO:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            held = _hold(file)
            owner = self._owner()
            if held is False or (owner and self._is_alive(owner, held)):
                file.close()
                raise self._refusal(owner)
            if self._is_current(file):
                break
            file.close()  # it was released, and with that removed, after it was opened
        if owner:
            say(f"{self.path}: taken over from {_name(owner)}, which is gone")
        file.truncate(0)
        file.write(json.dumps(self._me))
        file.flush()
        return file

    def _is_alive(self, owner: dict, held: bool | None) -> bool:
        """Whether there is the process that the file names, which doesn't hold it by a flock that is seen here."""
        if owner["host"] == self._me["host"] and (held or not _runs(owner["pid"])):
            return False
        with suppress(FileNotFoundError):  # it has been released meanwhile
            before, deadline = self._touched(), time.monotonic() + _PATIENCE
            while time.monotonic() < deadline:
                time.sleep(_BEAT / 10)
                if self._touched() != before:
                    return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):  # what is wrong with the disk, the next checkpoint will tell
                os.utime(self._file.fileno())

    def _owner(self) -> dict:
        """What the file says; nothing where it has just been made."""
        try:
            owner = json.loads(self.path.read_bytes())
            return owner if owner.keys() >= self._me.keys() else {}
        except (FileNotFoundError, ValueError, AttributeError):
            return {}

    def _touched(self) -> int:
        """The file's time; opened, as network file systems remember that of a closed one for a while."""
        with self.path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _is_current(self, file: TextIO) -> bool:
        """Whether an open file still is what its name stands for."""
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())

    def _refusal(self, owner: dict) -> UserError:
        who = _name(owner) if owner else "another process"
        return UserError(f"{self.path.parent}: {who} is at work in it; wait for its end, or take another --name")


def _hold(file: TextIO) -> bool | None:
    """Whether this process now holds a file that others can't; None where the file system has no such thing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _name(owner: dict) -> str:
    age = timedelta(seconds=max(0, round(time.time() - owner["since"])))
    return f"process {owner['pid']} on {owner['host']}, there for {age},"
