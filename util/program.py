"""How every program starts and ends: its streams, the signals, one line for an error, the exit status."""

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

from dereflect.util.errors import UserError, printable

_ROOT = Path(__file__).resolve().parents[1]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What ends a program: Ctrl-C; kill, Slurm's scancel and the end of its time limit; a closed terminal; what --signal
sends before either."""
# What is wrong with a path that was named, wherever it is looked at first: a name that is too long, links in a circle,
# a folder that may not be searched.
_OF_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
_SAME = 1.0  # signals within this many seconds count as one: torchrun passes on what its processes have received, too


atexit.register(gc.freeze)  # an ending process would look for garbage among all objects, for a third of a second


def run(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    requirements: str = "requirements.txt",
) -> int:
    """Call a program's `main(argv)` and return its exit status.

    The status is what `main` returns (None means 0), 2 after a UserError, a missing package or a path that can't be
    followed or no file can have, which are printed as one message to stderr, and 128 + the signal's number (130 for
    Ctrl-C) after a signal.
    Nothing of this shows a traceback; a defect of the program does.

    Args:
        main: takes the arguments (None: those of the command line); should import what is slow to import, or not in
            Python's standard library, only inside, so that `--help` is fast and a missing package is reported.
        argv: the arguments.
        requirements: the file that lists the packages the program needs.
    """
    _keep_streams_open()
    _wait_patiently()
    try:
        with Interrupt(at_once=True):
            return main(argv) or 0
    except UserError as error:
        return _fail(str(error))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (_ROOT / package).exists() or (_ROOT / f"{package}.py").exists():
            raise  # a defect of this project, not of the installation
        return _fail(_advice(error, requirements))
    except BrokenPipeError:  # the reader of the output has left; prints don't fail, but a library's writes may
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        return _fail(f"{printable(os.fsdecode(error.filename))}: {error.strerror}")
    except ValueError as error:
        if not str(error).startswith("embedded null "):
            raise
        return _fail("a name with a NUL in it, which no file can have")
    except (Interrupted, KeyboardInterrupt) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first one tells
            print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number


def _wait_patiently() -> None:
    """Have threads that wait for each other spin a thirtieth as long as is usual before they sleep.

    Where other programs want the processors, too, the thread that is waited for may not be running; spinning then takes
    the time that it needs. GNU's OpenMP, torch's on Linux, reads this when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Nothing is taken for garbage within: a program's imports make half a million objects, which all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _advice(error: ImportError, requirements: str) -> str:
    """What to do about a package that can't be imported."""
    cause = f"{sys.executable} cannot import {error.name} ({error})"
    if isinstance(error, ModuleNotFoundError):
        cause = f"{sys.executable} has no package {error.name}"
    made = _ROOT / ".venv/bin/python"
    if made.exists() and Path(sys.prefix).resolve() != made.parents[1].resolve():
        return f"{cause}; use the Python that ./runner.sh has set up: {os.path.relpath(made)}"
    if not (_ROOT / requirements).exists():  # an installed package, which has no files beside it
        return f"{cause}; do: {sys.executable} -m pip install {error.name}"
    file = os.path.relpath(_ROOT / requirements)
    return f"{cause}; do: {sys.executable} -m pip install -r {file} (or start ./runner.sh, which makes a .venv)"


class _Patient:
    """A text stream whose writes never fail; what can't be written is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _keep_streams_open() -> None:
    """Keep the program running when stdout or stderr is closed, full or broken; its files are what counts.

    A pipe may break (`train_sirs.py ... | head -1`), a terminal close, the disk under a log fill up; stdout may be
    closed from the start; the terminal's encoding may lack a letter, and a file's name may not be valid text.
    """
    for number in range(3):  # else the next files to be opened get these numbers, and whatever libraries print
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Patient):
            continue
        if stream is None:
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the program runs
        with contextlib.suppress(AttributeError, ValueError):  # a test's stream may lack `reconfigure`
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Patient(stream))


class Interrupted(BaseException):
    """A signal has asked the program to end.

    Not an `Exception`, so that no library catches it as a failure of its own.
    """

    def __init__(self, number: int):
        self.number, self.signal = number, signal.Signals(number).name
        super().__init__(f"stopped by {self.signal}")


class Interrupt:
    """In this context the first signal sets `signal`; another one, a second later or more, ends the program at once.

    SIGHUP stays ignored where it is ignored when the context begins, as under nohup. SIGINT does not: shells make their
    background jobs ignore it, which is no reason to ignore someone who sends it on purpose.

    Args:
        at_once: the first signal also raises `Interrupted`, wherever the program is.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = at_once
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._when = signal.Signals(number), time.monotonic()
            if self._at_once:
                raise Interrupted(number)
        elif time.monotonic() - self._when >= _SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
