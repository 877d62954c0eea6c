"""At most one process at a time in a run's folder."""

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

from dereflect.util import disk
from dereflect.util.errors import UserError

_BEAT = 10.0  # seconds between two signs of life
_PATIENCE = 6  # beats without one until a process of another machine counts as gone
_LOOKS = 10  # at the file in one beat


class Lock:
    """The right to write into a folder, from `acquire` until the end of the context or of the process.

    The lock is a file `lock`, which names its owner and is held by flock. So it is free when the process ends, however
    that happens, and a process that is only suspended keeps it. Some network file systems have no flock, or one that
    other machines don't see. There, the owner named in the file counts. A process of this machine is looked up. A
    process of another machine must show a sign of life, a change of the file's time, every minute. The clocks of two
    machines are never compared.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._file: TextIO | None = None
        self._released = threading.Event()

    def acquire(self, log: Callable[[str], None]) -> None:
        """Take the lock; `log` gets a line when its last owner is gone without having released it.

        Raises:
            UserError: another process has the lock, or the file can't be written.
        """
        with disk.writing(self.path):
            self._file = self._take(log)
        threading.Thread(target=self._beat, daemon=True).start()

    def confirm(self) -> None:
        """Check the owner again, some time after `acquire`: of two machines without a common flock, the last one to
        write the file has the lock.

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
        with suppress(OSError):  # the disk may be read-only by now; the lock is free all the same when the process ends
            if self._owner() == self._me:
                self.path.unlink()
            self.path.parent.rmdir()  # fails unless the folder is empty
        self._file.close()

    def _take(self, log: Callable[[str], None]) -> TextIO:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            held = _hold(file)
            owner = self._owner()
            if held is False or (owner and self._is_alive(owner, held)):
                file.close()
                raise self._refusal(owner)
            if self._is_current(file):
                break
            file.close()  # the owner has released and removed it since it was opened
        if owner:
            log(f"{self.path}: taken over from {_name(owner)}, which is gone")
        file.truncate(0)
        file.write(json.dumps(self._me))
        file.flush()
        return file

    def _is_alive(self, owner: dict, held: bool | None) -> bool:
        """Whether the process that the file names is alive, although no flock of it is seen here."""
        if owner["host"] == self._me["host"] and (held or not _runs(owner["pid"])):
            return False
        before = disk.changed_at(self.path)
        # Counted are looks at the file, not seconds: this process may itself be suspended for a while.
        for _ in range(_PATIENCE * _LOOKS):
            time.sleep(_BEAT / _LOOKS)
            if (now := disk.changed_at(self.path)) != before:
                return now is not None  # without the file, the lock has just been released
        return False

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):  # the next checkpoint will report what is wrong with the disk
                os.utime(self._file.fileno())

    def _owner(self) -> dict:
        """The owner that the file names; empty if the file is new or unreadable."""
        try:
            owner = json.loads(self.path.read_bytes())
            return owner if owner.keys() >= self._me.keys() else {}
        except (FileNotFoundError, ValueError, AttributeError):
            return {}

    def _is_current(self, file: TextIO) -> bool:
        """Whether the path still leads to this open file."""
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())

    def _refusal(self, owner: dict) -> UserError:
        who = _name(owner) if owner else "another process"
        return UserError(f"{self.path.parent}: {who} is at work in it; wait for its end, or take another --name")


def _hold(file: TextIO) -> bool | None:
    """Try to take the flock; whether this process has it now, or None where the file system has no flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _runs(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _name(owner: dict) -> str:
    """The owner in words."""
    age = timedelta(seconds=max(0, round(time.time() - owner["since"])))
    return f"process {owner['pid']} on {owner['host']}, there for {age},"
