"""Progress of long work: a bar on a terminal, a line every half minute in a log."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from dereflect.util.errors import printable

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts the steps of a piece of work, and shows them.

    Args:
        title: the name of the work.
        total: the number of all steps.
        start: the number of steps that are already done.
        quiet: show nothing, as in all processes but the main one.
    """

    def __init__(self, title: str, total: int, start: int = 0, quiet: bool = False):
        self.title, self.total, self.done, self.start = printable(title), total, start, start
        self.began = self.last_line = time.monotonic()
        self.quiet = quiet
        self.bar = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=self.title, dynamic_ncols=True, leave=False)

    def step(self, message: str = "") -> None:
        """Count a step; the message is shown after the count."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(message, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if not self.quiet and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - self.began) / (self.done - self.start) * (self.total - self.done)
            print(f"{self.title}: {self.done}/{self.total}, {_minutes(left)} left  {message}", flush=True)

    def log(self, text: str, wrong: bool = False) -> None:
        """Print a line of its own; what is wrong goes to stderr."""
        if not self.quiet:
            file = sys.stderr if wrong else sys.stdout
            tqdm.write(text, file=file)
            file.flush()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def track(items: Iterable, title: str, total: int, quiet: bool = False) -> Iterator:
    """Yield the items, and show the progress."""
    progress = Progress(title, total, quiet=quiet)
    try:
        for item in items:
            yield item
            progress.step()
    finally:
        progress.close()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
