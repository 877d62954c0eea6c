"""The one record of a run: its options, its starts, what it measured, what it made.

In the run's folder: options.yaml, starts.jsonl (a line per start), metrics.jsonl (a line per epoch and set),
per_image/epoch_NNN.csv, panels/ (the newest picture of each set) and TensorBoard's events. Everything that shows or
compares runs reads these.
"""

import argparse
import csv
import json
import platform
import socket
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from options import as_text
from options.config import RECORDED
from options.parser import START
from util import disk
from util.images import write_image
from util.published import AVERAGED_SETS
from util.run.reader import METRICS, STARTS, read_metrics, read_run

_COLUMNS = ("set", "name", *METRICS, *(f"input_{metric}" for metric in METRICS))
_EVENTS = "events.out.tfevents."


class Record:
    """Writes the record of one run; in processes other than the main one, nothing.

    Args:
        folder: of the run; made if missing.
        options: those that describe the run go to options.yaml, those of this start to starts.jsonl.
        epochs_done: how many epochs the record may hold; lines of later ones, which a resumed run repeats, go.
        step: steps of the optimiser that are done; TensorBoard's points of later ones, which are repeated, too, go.
        active: whether this process writes.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, epochs_done: int, step: int, active: bool = True):
        self.folder, self.active = folder, active
        self.lines: list[dict] = []
        if not active:
            return
        for part in ("per_image", "panels"):
            with disk.writing(folder / part):
                (folder / part).mkdir(parents=True, exist_ok=True)
        start = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "torch": str(torch.__version__)}
        start |= {"machine": platform.platform()} | as_text(options, [START])
        starts = [*read_run(folder).starts, start]
        with disk.replacing(folder / STARTS) as path:
            path.write_text("".join(json.dumps(each) + "\n" for each in starts), encoding="utf-8")
        text = yaml.safe_dump(as_text(options, RECORDED), sort_keys=True, allow_unicode=True)
        with disk.replacing(folder / "options.yaml") as path:
            path.write_text(text, encoding="utf-8")
        self.metrics_path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(folder) if line["epoch"] <= epochs_done]
        measured = {line["set"] for line in lines if line["estimate"] == "model"}  # its input is measured just before
        self.lines = [line for line in lines if line["set"] in measured]
        self._rewrite()
        self._events = _Events(folder, step)
        self._events.add(summary.text("options", f"{options.comment}\n\n```yaml\n{text}```"), step)

    def has_input(self, name: str) -> bool:
        """Whether the untouched input of a set has been measured."""
        return any(line["set"] == name and line["estimate"] == "input" for line in self.lines)

    def evaluation(self, epoch: int, step: int, name: str, rows: list[dict], seconds: float) -> None:
        """The images of one set, each with its metrics and those of its untouched input, become its lines.

        Args:
            rows: per image {"name": ..., "model": {metric: value}, "input": {metric: value}}.
        """
        if not self.active:
            return
        if not self.has_input(name):
            self._line(0, 0, name, "input", len(rows), _mean([row["input"] for row in rows]), 0.0)
        self._line(epoch, step, name, "model", len(rows), _mean([row["model"] for row in rows]), seconds)
        path = self._table(epoch)
        with disk.writing(path), path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if not file.tell():
                table.writerow(_COLUMNS)
            for row in rows:
                values = [*(row["model"][m] for m in METRICS), *(row["input"][m] for m in METRICS)]
                table.writerow([name, row["name"], *(f"{value:.6f}" for value in values)])

    def start_evaluation(self, epoch: int, names: Collection[str]) -> None:
        """Forget what an earlier evaluation of these sets in this epoch, whole or cut off, has left."""
        if not self.active:
            return

        def stays(line: dict) -> bool:
            other = line["set"] not in names and not line["set"].startswith("average")
            return other or line["epoch"] != epoch or line["estimate"] == "input"

        self.lines = [line for line in self.lines if stays(line)]
        self._rewrite()
        path = self._table(epoch)
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0] not in {"set", *names}]
            with disk.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([_COLUMNS, *rows])

    def averages(self, epoch: int, step: int) -> None:
        """Count-weighted averages over all test sets, and over the published ones where all are there."""
        if not self.active:
            return
        for title, wanted in (("average", None), ("average_published", AVERAGED_SETS)):
            for estimate, at in (("input", 0), ("model", epoch)):
                lines = [
                    line
                    for line in self.lines
                    if line["epoch"] == at
                    and line["estimate"] == estimate
                    and line["set"] != "val"
                    and not line["set"].startswith("average")
                    and (wanted is None or line["set"] in wanted)
                ]
                enough = len(lines) == len(wanted) if wanted else bool(lines)
                if enough and not (estimate == "input" and self.has_input(title)):
                    counts = [line["count"] for line in lines]
                    values = {m: float(np.average([line[m] for line in lines], weights=counts)) for m in METRICS}
                    seconds = sum(line["seconds"] for line in lines)
                    self._line(at, step if at else 0, title, estimate, sum(counts), values, seconds)

    def latest(self, name: str, metric: str = "PSNR") -> float | None:
        """The newest value of the model on a set."""
        for line in reversed(self.lines):
            if line["set"] == name and line["estimate"] == "model":
                return line[metric]
        return None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Points of TensorBoard's curves."""
        if self.active:
            for tag, value in values.items():
                self._events.add(summary.scalar(tag, value), step)

    def panel(self, step: int, name: str, images: list[np.ndarray]) -> None:
        """A set's picture: rows of (H, W, 3) images in 0..1, to TensorBoard and, the newest only, to panels/."""
        if self.active and images:
            width = max(image.shape[1] for image in images)
            padded = [np.pad(i, ((0, 8), (0, width - i.shape[1]), (0, 0)), constant_values=1.0) for i in images]
            picture = np.concatenate(padded)
            self._events.add(summary.image(f"panels/{name}", picture, dataformats="HWC"), step)
            write_image(self.folder / "panels" / f"{name}.png", picture)

    def close(self) -> None:
        """Close what is open."""
        if self.active:
            self._events.close()

    def _line(self, epoch: int, step: int, name: str, estimate: str, count: int, values: dict, seconds: float) -> None:
        line = {"epoch": epoch, "step": step, "set": name, "estimate": estimate, "count": count}
        line |= {metric: values[metric] for metric in METRICS} | {"seconds": round(seconds, 3)}
        self.lines.append(line)
        with disk.writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if estimate == "model":
            self.scalars(step, {f"{name}/{metric}": values[metric] for metric in METRICS})

    def _table(self, epoch: int) -> Path:
        return self.folder / "per_image" / f"epoch_{epoch:03}.csv"

    def _rewrite(self) -> None:
        with disk.replacing(self.metrics_path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")


class _Events:
    """TensorBoard's file of events, written at once and in this thread.

    A SummaryWriter's thread tells of a full disk minutes later or, at the end, not at all.

    Args:
        folder: of the run.
        step: steps of the optimiser that are done; points of later ones that earlier files have are void.
    """

    def __init__(self, folder: Path, step: int):
        # TensorBoard reads the files by name; the clock may have been set back since the last one.
        numbers = [int(part) for path in folder.glob(f"{_EVENTS}*") if (part := path.name.split(".")[3]).isdigit()]
        number = max([int(time.time()), *(number + 1 for number in numbers)])
        self.path = folder / f"{_EVENTS}{number:010}.{socket.gethostname()}"
        with disk.writing(self.path):
            self._file = self.path.open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, content: Summary, step: int) -> None:
        self._write(Event(step=step, summary=content))

    def close(self) -> None:
        with disk.writing(self.path):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with disk.writing(self.path):
            self._writer.write(event.SerializeToString())
            self._file.flush()


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
