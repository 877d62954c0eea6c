"""Reads runs on the disk, finished or not, whole or damaged, for the leaderboard and the report; without torch."""

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import yaml

from dereflect.util import disk, tables
from dereflect.util.errors import UserError
from dereflect.util.published import AVERAGE
from dereflect.util.run.folder import EVENTS, RunFolder

METRICS = ("PSNR", "SSIM", "LMSE", "NCC")
SCORES = METRICS[:2]

_HEAD = re.compile(r"# .*, started (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d), torch ([^\s,]+), (.+)")


@dataclass
class Run:
    """What a run's folder says.

    Attributes:
        folder: of the run.
        options: of options.yaml; empty if that can't be read.
        starts: how each start was made, the oldest first: when (`started`), with which `torch`, on which `machine`, and
            the options that describe a start, such as its `comment`.
        lines: the whole lines of metrics.jsonl.
        problems: messages about what could not be read.
    """

    folder: Path
    options: dict[str, object] = field(default_factory=dict)
    starts: list[dict[str, object]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.options.get("inet", ""))

    @property
    def comment(self) -> str:
        """The text that the user gave to the run; that of the latest start that has one."""
        return next((str(start["comment"]) for start in reversed(self.starts) if start.get("comment")), "")

    def of_start(self, what: str) -> str:
        """A value of the latest start; empty if unknown."""
        return str(self.starts[-1].get(what) or "") if self.starts else ""

    @property
    def sets(self) -> list[str]:
        """The sets that were evaluated, in the order of their first line, `val` and averages included."""
        return list(dict.fromkeys(line["set"] for line in self.lines))

    @property
    def epochs(self) -> list[int]:
        """Epochs whose evaluation is complete: they have an average, or the run has no test set at all."""
        wanted = AVERAGE if AVERAGE in self.sets else "val"
        return sorted({line["epoch"] for line in self._of(wanted)})

    @property
    def epochs_done(self) -> int:
        """How many epochs are done; without held-out pairs and test sets none of them is evaluated."""
        count = self.starts[-1].get("epochs") if self.starts else None
        return max([count if is_count(count) else 0, *self.epochs[-1:]])

    @property
    def epochs_wanted(self) -> int | None:
        """The number of epochs that the run was started for."""
        wanted = self.options.get("nEpochs")
        return wanted if isinstance(wanted, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, the last one's evaluation included."""
        wanted = self.epochs_wanted
        return wanted is not None and (self.epochs_done >= wanted if wanted else bool(self.epochs))

    def line(self, name: str, epoch: int | None, estimate: str = "model") -> dict | None:
        """The line of a set and epoch; the untouched input has epoch 0."""
        return next((line for line in self._of(name, estimate) if line["epoch"] == epoch), None)

    def best_epoch(self, name: str) -> int | None:
        """The first of the complete epochs with the highest PSNR on a set; None if there is none."""
        lines = [line for line in self._of(name) if line["epoch"] in self.epochs and math.isfinite(line["PSNR"])]
        return max(lines, key=lambda line: (line["PSNR"], -line["epoch"]))["epoch"] if lines else None

    @property
    def picked(self) -> tuple[int | None, str]:
        """The epoch whose figures represent the run, and what picked it.

        `val`: the held-out pairs picked it. `last`: a run without held-out pairs is represented by its last epoch, so
        that no test set picks. An empty word: nothing has been evaluated.
        """
        best = self.best_epoch("val")
        if best is not None:
            return best, "val"
        return (self.epochs[-1], "last") if self.epochs else (None, "")

    @property
    def hours(self) -> float | None:
        """The time between the first and the last TensorBoard event of every start, summed; None without events."""
        spans = [span for path in self.events if (span := _span(path)) is not None]
        return sum(spans) / 3600 if spans else None

    @property
    def events(self) -> list[Path]:
        """TensorBoard's files; what has such a name, but is a pipe or a device, is left out."""
        return sorted(path for path in self.folder.glob(f"{EVENTS}*") if path.is_file())

    @property
    def disk(self) -> int:
        """Bytes of all files; a file with two names counts once."""
        sizes = {}
        for place, _, names in os.walk(self.folder):
            for name in names:
                try:
                    found = (Path(place) / name).lstat()
                except FileNotFoundError:  # the run is going on and has just renamed it
                    continue
                sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def _of(self, name: str, estimate: str = "model") -> Iterator[dict]:
        return (line for line in self.lines if line["set"] == name and line["estimate"] == estimate)


def is_run(folder: Path) -> bool:
    """Whether a folder holds any file that a run writes."""
    files = RunFolder(folder)
    marks = (files.options, files.metrics, files.last, files.best)
    return any(mark.is_file() for mark in marks) or next(folder.glob(f"{EVENTS}*"), None) is not None


def find_runs(folder: Path) -> list[Path]:
    """The folders of all runs below (or at) a folder, by name.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the one that holds the runs (--checkpoints_dir)")
    found = []

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error

    for place, folders, _ in os.walk(folder, onerror=refuse):
        if is_run(Path(place)):
            found.append(Path(place))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    if not found:
        raise UserError(f"{folder}: no run in it; train_sirs.py leaves one under --checkpoints_dir")
    return found


def read_run(folder: Path) -> Run:
    """Read a run's folder; what is damaged is listed in its `problems`."""
    run = Run(folder)
    try:
        run.starts = [line for line in _json_lines(RunFolder(folder).starts) if isinstance(line, dict)]
    except OSError as error:
        run.problems.append(f"starts.jsonl: {' '.join(str(error).split())}")
    _read_options(run)
    _read_lines(run)
    return run


def _read_options(run: Run) -> None:
    try:
        text = disk.read_regular(RunFolder(run.folder).options).decode()
        options = yaml.safe_load(text)
    except FileNotFoundError:
        run.problems.append("no options.yaml")
        return
    except Exception as error:  # yaml's constructors raise whatever a damaged text happens to trigger
        run.problems.append(f"options.yaml: {' '.join(str(error).split()) or type(error).__name__}")
        return
    if isinstance(options, dict):
        run.options = {str(key): value for key, value in options.items() if is_plain(value)}
    if not run.options:
        run.problems.append("options.yaml: no lines of the form 'option: value'")
        return
    if not run.starts and (head := _HEAD.match(text)):  # of an older version, which kept the latest start here
        run.starts = [dict(zip(("started", "torch", "machine"), head.groups(), strict=True))]
        run.starts[0]["comment"] = run.options.get("comment")


def _read_lines(run: Run) -> None:
    path = RunFolder(run.folder).metrics
    try:
        run.lines = read_metrics(run.folder)
        written = len(disk.read_regular(path).splitlines()) if path.exists() else 0
    except OSError as error:
        run.problems.append(f"metrics.jsonl: {' '.join(str(error).split())}")
        return
    if written > len(run.lines):
        run.problems.append(f"metrics.jsonl: {written - len(run.lines)} of {written} lines can't be read")
    if not run.lines and not run.epochs_done:
        run.problems.append("nothing has been evaluated")


def read_metrics(folder: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl: one cut short by a kill, or damaged, is left out."""
    return [line for line in _json_lines(RunFolder(folder).metrics) if _is_whole(line)]


def _json_lines(path: Path) -> list[object]:
    """The values of a file's lines, without the lines that can't be read; none where there is no file."""
    lines = []
    for text in disk.read_regular(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return lines


def _is_whole(line: object) -> bool:
    """Whether a line has all keys, each with a value of the right type."""
    return isinstance(line, dict) and all(check(line.get(key)) for key, check in _LINE_CHECKS.items())


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 that fits into 64 bits; a bool is none."""
    return type(value) is int and 0 <= value < 2**63


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


_LINE_CHECKS = dict.fromkeys(("epoch", "step", "count"), is_count) | dict.fromkeys(("set", "estimate"), _is_word)
_LINE_CHECKS |= dict.fromkeys(METRICS, _is_number)


def table(lines: list[dict]) -> str:
    """The last evaluation as a table: every set's untouched input, the weights that the training started from where
    there were some (epoch 0), the model, and its gain over what stands before it."""
    model = [line for line in lines if line["estimate"] == "model"]
    if not model:
        return "nothing has been evaluated"
    epoch = model[-1]["epoch"]
    epochs = sorted({line["epoch"] for line in model} & {0, epoch})
    found = {(line["set"], line["estimate"], line["epoch"]): line for line in lines}
    rows = [("PSNR, dB / SSIM", "images", "input", *(f"epoch {e}" for e in epochs), "gain")]
    for line in (line for line in model if line["epoch"] == epoch):
        name = line["set"]
        stages = [found.get((name, "input", 0), line), *(found.get((name, "model", e), line) for e in epochs)]
        before = stages[-2]
        rows.append(
            (
                name,
                str(line["count"]),
                *(f"{stage['PSNR']:.2f} / {stage['SSIM']:.3f}" for stage in stages),
                f"{line['PSNR'] - before['PSNR']:+.2f} / {line['SSIM'] - before['SSIM']:+.3f}",
            )
        )
    return tables.as_text(rows, left=1, width=tables.TERMINAL)


def best(run: Run) -> str:
    """Which epoch is best, and by what; empty where nothing picks one."""
    by = AVERAGE if run.options.get("best_by") == "test" else "val"
    epoch = run.best_epoch(by)
    if epoch is None:
        return ""
    name = "the test sets' average" if by == AVERAGE else "the held-out pairs (val)"
    return f"best: epoch {epoch}, with {run.line(by, epoch)['PSNR']:.2f} dB on {name}"


def is_plain(value: object) -> bool:
    """Whether a value is of a type that `options.as_text` writes."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, str | int | float) for part in parts)


def event_lengths(file: BinaryIO) -> Iterator[int]:
    """Go through the records of TensorBoard's file of events; the file is then at the event, of the length given.

    A record is its length (8 bytes), a checksum (4), the event and its checksum (4); an event begins with the tag 9
    and its time. What a kill has cut off at the end is left out.
    """
    size = file.seek(0, os.SEEK_END)
    start = 0
    while start + 16 <= size:
        file.seek(start)
        (length,) = struct.unpack("<Q", file.read(8))
        start += 16 + length
        if start <= size:
            file.seek(start - 4 - length)
            yield length


def _span(path: Path) -> float | None:
    """Seconds between the first and the last record of an events file.

    Only the heads of the records are read. If the clock was set back, no more is lost than the time to the next record.
    """
    times = []
    try:
        with path.open("rb") as file:
            for length in event_lengths(file):
                tag, when = struct.unpack("<Bd", file.read(9)) if length >= 9 else (0, 0.0)
                if tag != 9 or not math.isfinite(when):
                    break
                times.append(when)
    except OSError:
        return None
    return sum(max(0.0, later - earlier) for earlier, later in pairwise(times)) if times else None
