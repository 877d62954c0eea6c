"""The one record of a run, written by its training: its options, its starts, its measurements, its pictures.

In the run's folder: options.yaml, starts.jsonl (a line per start), metrics.jsonl (a line per epoch and set),
per_image/epoch_NNN.csv, panels/ (the newest picture of each set), images/ (with --save_images) and TensorBoard's
events. Everything that shows or compares runs reads these; see util/run/reader.py.
"""

import argparse
import csv
import json
import platform
import resource
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from dereflect.options import as_text
from dereflect.options.config import RECORDED
from dereflect.options.parser import START
from dereflect.util import disk
from dereflect.util.distributed import World
from dereflect.util.evaluation import Mean, Separated, mean_over_images, mean_over_sets
from dereflect.util.images import write_image
from dereflect.util.published import AVERAGE, AVERAGE_PUBLISHED, averaged_sets
from dereflect.util.run.folder import EVENTS, RunFolder
from dereflect.util.run.reader import METRICS, Run, event_lengths, read_metrics, read_run

_COLUMNS = ("set", "name", *METRICS, *(f"input_{metric}" for metric in METRICS))
_AVERAGES = (AVERAGE, AVERAGE_PUBLISHED)


class Record:
    """Writes the record of one run; in processes other than the main one, nothing.

    Args:
        folder: of the run; made if missing.
        options: those that describe the run go to options.yaml, those of this start to starts.jsonl.
        epochs_done: how many epochs the record keeps; lines of later epochs, which a resumed run repeats, are deleted.
        step: steps of the optimiser that are done; TensorBoard's points of later steps, which are repeated, are
            deleted, too.
        active: whether this process writes.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, epochs_done: int, step: int, active: bool = True):
        self.folder, self.active = RunFolder(folder), active
        self.lines: list[dict] = []
        if not active:
            return
        for part in (self.folder.per_image, self.folder.panels):
            with disk.writing(part):
                part.mkdir(parents=True, exist_ok=True)
        start = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "torch": str(torch.__version__)}
        start |= {"machine": platform.platform()} | {
            key: value for key, value in as_text(options, [START]).items() if value
        }
        self._starts = [*read_run(folder).starts, start]
        self.epochs_done(epochs_done)
        text = yaml.safe_dump(as_text(options, RECORDED), sort_keys=True, allow_unicode=True)
        with disk.replacing(self.folder.options) as path:
            path.write_text(text, encoding="utf-8")
        lines = [line for line in read_metrics(folder) if line["epoch"] <= epochs_done]
        measured = {line["set"] for line in lines if line["estimate"] == "model"}  # its input is measured just before
        self.lines = [line for line in lines if line["set"] in measured]
        _write_lines(self.folder.metrics, self.lines)
        self._events = _Events(folder, step)
        self._events.add(summary.text("options", f"{options.comment}\n\n```yaml\n{text}```"), step)

    def has_input(self, name: str) -> bool:
        """Whether the untouched input of a set has been measured."""
        return any(line["set"] == name and line["estimate"] == "input" for line in self.lines)

    def evaluation(self, epoch: int, step: int, name: str, rows: list[dict], seconds: float) -> None:
        """Add the lines of one set.

        Args:
            rows: a row per image, as of `util.evaluation.measure_images`.
            seconds: that the evaluation took.
        """
        if not self.active:
            return
        if not self.has_input(name):
            self._line(0, 0, name, "input", mean_over_images([row["input"] for row in rows]), 0.0)
        self._line(epoch, step, name, "model", mean_over_images([row["model"] for row in rows]), seconds)
        path = self._table(epoch)
        with disk.writing(path), path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if not file.tell():
                table.writerow(_COLUMNS)
            for row in rows:
                values = [*(row["model"][m] for m in METRICS), *(row["input"][m] for m in METRICS)]
                table.writerow([name, row["name"], *(f"{value:.6f}" for value in values)])

    def epochs_done(self, count: int) -> None:
        """Note with this start how many epochs are done; of an epoch without evaluation, nothing else is recorded."""
        if self.active:
            self._starts[-1]["epochs"] = count
            _write_lines(self.folder.starts, self._starts)

    def start_evaluation(self, epoch: int, step: int, names: Collection[str]) -> None:
        """Delete what an earlier evaluation of these sets in this epoch, whole or cut off, has left."""
        if not self.active:
            return
        curves = {f"{name}/{metric}" for name in (*names, *_AVERAGES) for metric in METRICS}
        self._events.forget(step, curves | {f"panels/{name}" for name in names})

        def stays(line: dict) -> bool:
            other = line["set"] not in names and line["set"] not in _AVERAGES
            return other or line["epoch"] != epoch or line["estimate"] == "input"

        self.lines = [line for line in self.lines if stays(line)]
        _write_lines(self.folder.metrics, self.lines)
        path = self._table(epoch)
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0] not in {"set", *names}]
            with disk.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([_COLUMNS, *rows])

    def averages(self, epoch: int, step: int) -> None:
        """Add the means over all test sets and, if all published sets are there, over these."""
        if not self.active:
            return
        lines = {(estimate, at): self._of_sets(estimate, at) for estimate, at in (("input", 0), ("model", epoch))}
        for title, names in averaged_sets(lines["model", epoch]).items():
            for (estimate, at), of_sets in lines.items():
                if not (estimate == "input" and self.has_input(title)):
                    chosen = [of_sets[name] for name in names]
                    mean = mean_over_sets([Mean(line["count"], {m: line[m] for m in METRICS}) for line in chosen])
                    self._line(at, step if at else 0, title, estimate, mean, sum(line["seconds"] for line in chosen))

    def scores(self, epoch: int) -> str:
        """PSNR and SSIM of the model on every set, in a line."""
        lines = [line for line in self.lines if line["epoch"] == epoch and line["estimate"] == "model"]
        return "  ".join(f"{line['set']} {line['PSNR']:.2f}/{line['SSIM']:.3f}" for line in lines)

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

    def panel(self, step: int, name: str, images: Sequence[Separated]) -> None:
        """A set's picture, a row per image: to TensorBoard and, the newest only, to panels/."""
        if self.active and images:
            rows = [_row(one) for one in images]
            width = max(row.shape[1] for row in rows)
            padded = [np.pad(row, ((0, 8), (0, width - row.shape[1]), (0, 0)), constant_values=1.0) for row in rows]
            picture = np.concatenate(padded)
            self._events.add(summary.image(f"panels/{name}", picture, dataformats="HWC"), step)
            write_image(self.folder.panel(name), picture)

    def close(self) -> None:
        """Close what is open."""
        if self.active:
            self._events.close()

    def _line(self, epoch: int, step: int, name: str, estimate: str, mean: Mean, seconds: float) -> None:
        line = {"epoch": epoch, "step": step, "set": name, "estimate": estimate, "count": mean.count}
        line |= {metric: mean.values[metric] for metric in METRICS} | {"seconds": round(seconds, 3)}
        self.lines.append(line)
        with disk.writing(self.folder.metrics), self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if estimate == "model":
            self.scalars(step, {f"{name}/{metric}": mean.values[metric] for metric in METRICS})

    def _of_sets(self, estimate: str, epoch: int) -> dict[str, dict]:
        """The lines of an epoch by test set, in their order."""
        return {
            line["set"]: line
            for line in self.lines
            if line["epoch"] == epoch and line["estimate"] == estimate and line["set"] not in {"val", *_AVERAGES}
        }

    def _table(self, epoch: int) -> Path:
        return self.folder.per_image / f"epoch_{epoch:03}.csv"


class TrainingMeans:
    """Means over the steps between two points of TensorBoard's curves.

    Attributes:
        waited: seconds that the training has waited for data.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = self.images = 0
        self.sums: dict[str, Tensor] = defaultdict(float)

    def add(self, terms: dict[str, Tensor], norm: Tensor, images: int) -> None:
        """Add a step: the terms of its loss, the norm of its gradient, its number of images in all processes."""
        self.steps += 1
        self.images += images
        for key, value in {**terms, "total": sum(terms.values())}.items():
            self.sums[f"train/loss_{key}"] = self.sums[f"train/loss_{key}"] + value
        self.sums["train/gradient_norm"] = self.sums["train/gradient_norm"] + norm

    def values(self, world: World, faults: dict[str, int]) -> dict[str, float]:
        """The points of the curves; called in all processes.

        Args:
            world: this process among all.
            faults: how often this process's loader has had to replace data in this epoch, by kind.
        """
        means = []
        if self.steps:
            means = world.mean(torch.stack([value.detach() for value in self.sums.values()]) / self.steps).tolist()
        counts = world.mean(torch.tensor([*faults.values()], dtype=torch.float32, device=self.device))
        seconds = time.perf_counter() - self.began
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:  # the process's peak, in KiB on Linux and in bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return dict(zip(self.sums, means, strict=True)) | {
            "speed/images_per_second": self.images / seconds,
            "speed/seconds_waited_for_data": self.waited,
            "speed/share_waiting_for_data": self.waited / seconds,
            "speed/peak_memory_GiB": memory / 2**30,
            **{f"data/{kind}": count * world.size for kind, count in zip(faults, counts.tolist(), strict=True)},
        }


class _Events:
    """TensorBoard's file of events, written at once and in this thread.

    torch's SummaryWriter writes in a thread of its own, which reports a full disk minutes later or, at the end, never.

    Args:
        folder: of the run.
        step: steps of the optimiser that are done; TensorBoard ignores points of later steps in earlier files.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        # TensorBoard reads the files by name; the clock may have been set back since the last one.
        numbers = [int(part) for path in folder.glob(f"{EVENTS}*") if (part := path.name.split(".")[3]).isdigit()]
        number = max([int(time.time()), *(number + 1 for number in numbers)])
        self.path = folder / f"{EVENTS}{number:010}.{socket.gethostname()}"
        with disk.writing(self.path):
            self._file = self.path.open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, content: Summary, step: int) -> None:
        self._write(Event(step=step, summary=content))

    def forget(self, step: int, tags: Collection[str]) -> None:
        """Have TensorBoard ignore the points of a step with these tags that an earlier start has left.

        It can only be told to ignore all points from a step on; so the other points of the step are written once more.
        Points of steps after the one of this start are ignored already.
        """
        points = _points(self._folder, step) if step == self._step else {}
        if not points.keys().isdisjoint(tags):
            self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            self.add(Summary(value=[point for tag, point in points.items() if tag not in tags]), step)

    def close(self) -> None:
        with disk.writing(self.path):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with disk.writing(self.path):
            self._writer.write(event.SerializeToString())
            self._file.flush()


def _points(folder: Path, step: int) -> dict[str, Summary.Value]:
    """The points of a step in a run's files of events by their tags, the latest of each."""
    points = {}
    for path in Run(folder).events:
        with path.open("rb") as file, suppress(DecodeError):  # TensorBoard, too, reads a damaged file up to there
            for length in event_lengths(file):
                event = Event.FromString(file.read(length))
                if event.step == step:
                    points |= {value.tag: value for value in event.summary.value}
    return points


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    with disk.replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _row(one: Separated) -> np.ndarray:
    """A row of a panel: mixture, transmission and its target, reflection and its target, residue."""
    tiles = (one.mixture, one.transmission, one.target_t, one.reflection, one.target_r, one.residue / 2 + 0.5)
    return np.concatenate([_with_margin(tile) for tile in tiles], axis=1)


def _with_margin(image: Tensor) -> np.ndarray:
    """(3, H, W) to (H, W + 8, 3) in 0..1, with a white margin."""
    return np.pad(image.clamp(0, 1).permute(1, 2, 0).numpy(), ((0, 0), (0, 8), (0, 0)), constant_values=1.0)
