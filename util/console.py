"""What is told on the terminal, or into whatever stands in for one."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO


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


def never_fail() -> None:
    """Have a program go on when nobody listens any more; its files are what counts.

    A pipe may be broken (`train_sirs.py ... | head -1`), a terminal gone, the disk under a log full, standard output
    closed from the start; a letter may be none of the terminal's encoding, or a file's name no text at all.
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
        with contextlib.suppress(AttributeError, ValueError):  # what stands in for a stream may be plainer
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Patient(stream))
