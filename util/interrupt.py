"""Signals that ask a program to end, met at the next good moment."""

import signal
import time
from types import FrameType, TracebackType

# Ctrl-C; kill, Slurm's scancel and the end of its time limit; a closed terminal; what --signal sends before either.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


_SAME = 1.0  # seconds within which signals are one: torchrun hands on what its processes have got themselves, too


class Interrupted(BaseException):
    """A signal has asked the program to end.

    No `Exception`, so that no library's handler of those takes it for a failure of its own.
    """

    def __init__(self, number: int):
        self.number, self.signal = number, signal.Signals(number).name
        super().__init__(f"stopped by {self.signal}")


class Interrupt:
    """Within its context the first signal sets `signal`; another one, a second later or more, ends the program at once.

    SIGHUP stays ignored where it is when the context begins, as it is under nohup. SIGINT doesn't: shells have their
    background jobs ignore it, which is no reason to ignore who asks for an end with it.

    Args:
        at_once: the first signal also raises `Interrupted`, wherever the program is.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = at_once
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for name in _NAMES:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
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
