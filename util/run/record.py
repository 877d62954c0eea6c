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
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import summary

from dereflect.options import as_text
from dereflect.options.config import RECORDED
from dereflect.options.parser import FROM, START, WHAT
from dereflect.util import disk
from dereflect.util.distributed import World
from dereflect.util.evaluation import Mean, Separated, mean_over_images, mean_over_sets
from dereflect.util.images import write_image
from dereflect.util.published import AVERAGE, AVERAGE_PUBLISHED, averaged_sets
from dereflect.util.run.events import Events
from dereflect.util.run.folder import RunFolder
from dereflect.util.run.panels import draw
from dereflect.util.run.reader import METRICS, read_metrics, read_run
from dereflect.util.run.tracker import Tracker

_COLUMNS = ("set", "name", *METRICS, *(f"input_{metric}" for metric in METRICS))
_AVERAGES = (AVERAGE, AVERAGE_PUBLISHED)
_CHARTS = {
    title: {f"{metric}{', dB' * (metric == 'PSNR')}": ["Multiline", [f"^{metric}/{sets}"]] for metric in METRICS}
    for title, sets in {
        "average, and its untouched input": f"{AVERAGE}(/input)?$",
        "held-out pairs, and their untouched input": "val(/input)?$",
        "all sets, and their untouched inputs": "",
    }.items()
}
"""TensorBoard's charts of several curves, which it draws in one colour: first those of two that are easy to tell."""

_FINAL = [f"{metric}/{name}" for metric in ("PSNR", "SSIM") for name in (AVERAGE, "val")]
"""The curves whose last points TensorBoard shows beside the hyperparameters."""


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
        self._tracker = Tracker(options)
        self._events = Events(folder, step)
        self._events.add(summary.text("options", f"{options.comment}\n\n```yaml\n{text}```"), step)
        self._events.add(summary.custom_scalars(_CHARTS), step)
        *start, self._end = summary.hparams(_hyperparameters(options), dict.fromkeys(_FINAL, 0.0))
        for part in start:
            self._events.add(part, step)

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
        curves = {f"{metric}/{name}" for name in (*names, *_AVERAGES) for metric in METRICS}
        curves |= {f"{curve}/input" for curve in curves}
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
            self._tracker.log(values, step)

    def panel(self, step: int, name: str, images: Sequence[Separated]) -> None:
        """A set's picture, a row per image: to TensorBoard and, the newest only, to panels/."""
        if self.active and images:
            picture = draw(images)
            self._events.add(summary.image(f"panels/{name}", picture, dataformats="HWC"), step)
            write_image(self.folder.panel(name), picture)

    def close(self) -> None:
        """Close what is open."""
        if self.active:
            self._events.add(self._end, self.lines[-1]["step"] if self.lines else 0)
            self._events.close()
            self._tracker.finish()

    def _line(self, epoch: int, step: int, name: str, estimate: str, mean: Mean, seconds: float) -> None:
        line = {"epoch": epoch, "step": step, "set": name, "estimate": estimate, "count": mean.count}
        line |= {metric: mean.values[metric] for metric in METRICS} | {"seconds": round(seconds, 3)}
        self.lines.append(line)
        with disk.writing(self.folder.metrics), self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if estimate == "model":
            untouched = next(line for line in self.lines if line["set"] == name and line["estimate"] == "input")
            points = {f"{metric}/{name}": mean.values[metric] for metric in METRICS}
            self.scalars(step, points | {f"{metric}/{name}/input": untouched[metric] for metric in METRICS})

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


def _hyperparameters(options: argparse.Namespace) -> dict[str, object]:
    """The options that decide what is trained."""
    values = as_text(options, [WHAT, FROM])
    values = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return {key: value for key, value in values.items() if value is not None}


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    with disk.replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
