"""What the subcommands share: timing in turn, peak memory, measurements."""

import argparse
import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dereflect.models.arch import list_models
from dereflect.util import device as devices
from dereflect.util.errors import UserError

Call = Callable[[], object]
Timer = Callable[[Call, str], float]


# Options ---------------------------------------------------------------------------------------------------


def choose_device(options: argparse.Namespace) -> str:
    """The kind of the device that --gpu_ids names: "cpu" or "cuda"."""
    device = devices.choose_device(options.gpu_ids)
    if device.type != "cuda":
        return "cpu"
    torch.cuda.set_device(device)
    return "cuda"


def check_models(names: Iterable[str]) -> None:
    """Check the models that --inet names.

    Raises:
        UserError: there is no model of such a name.
    """
    for name in names:
        if name not in list_models():
            raise UserError(f"--inet {name}: there is no such model; there are {', '.join(list_models())}")


# Time and memory -------------------------------------------------------------------------------------------


def elapsed(call: Call, device: str) -> float:
    """Seconds of one call, until the device has done all of it."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_seconds(call: Call, device: str) -> float:
    """As `elapsed`, for calls that take no longer than their launch: on a GPU the median of several, by Triton."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(call, warmup=5, rep=50, return_mode="median")
    return elapsed(call, device)


def peak_memory(call: Call, device: str) -> float:
    """Bytes that a call holds at its peak, beyond those held before; nan where the system doesn't say."""
    call()  # compiles what is compiled and starts what threads there are
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else freed memory that the process kept would serve the call unseen
    before = _process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
    call()
    return _process_memory("VmHWM") - before


def _process_memory(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def progress(text: str) -> None:
    """One line on standard error that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# Measurements ----------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """The cost of one competitor in one setting.

    Attributes:
        what: competitor and setting, by column of the table. The words among the values, such as model and variant,
            name the curve that the measurement belongs to; the numbers, such as size and batch, its place on it.
        work: a number that time and memory are proportional to, such as pixels.
        seconds: the time of every repeat.
        peak: bytes beyond those held before; nan where the system doesn't say, None where it is not measured.
        figures: results computed from these, by name; None where a result is unknown.
        note: why the competitor was left out; empty where it was measured.
    """

    what: dict[str, str | float]
    work: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak: float | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    note: str = ""

    @property
    def curve(self) -> tuple[str, ...]:
        return tuple(value for value in self.what.values() if isinstance(value, str))

    @property
    def milliseconds(self) -> float:
        """The median."""
        return 1e3 * statistics.median(self.seconds)

    def record(self) -> dict[str, object]:
        """What was measured, and all results, by name."""
        if self.note:
            return self.what | {"note": self.note}
        times = {
            "milliseconds": self.milliseconds,
            "fastest": 1e3 * min(self.seconds),
            "slowest": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
            "peak_GiB": None if self.peak is None else self.peak / 2**30,
        }
        return self.what | {name: value for name, value in (times | self.figures).items() if value is not None}


def by_curve(found: Iterable[Measurement]) -> dict[tuple[str, ...], list[Measurement]]:
    """The measurements of every curve, without those left out."""
    curves = {}
    for m in found:
        if not m.note:
            curves.setdefault(m.curve, []).append(m)
    return curves


def add_ratio(found: Iterable[Measurement], base: Measurement | None, name: str = "ratio") -> None:
    """Add a figure: how many times as fast as `base` each one is, unless `base` is missing or was left out."""
    for m in found:
        if base and not (base.note or m.note):
            m.figures[name] = base.milliseconds / m.milliseconds


def compare(
    competitors: Sequence[tuple[Measurement, Call]],
    options: argparse.Namespace,
    device: str,
    earlier: Sequence[Measurement] = (),
    timer: Timer = elapsed,
) -> list[Measurement]:
    """Measure time and peak memory of calls side by side; each is called twice before it is timed.

    Args:
        competitors: the calls, each with an empty measurement, which is filled in.
        options: repeats, the most for each call, and max_seconds, for all repeats of a call; a call that is expected to
            need more than that even once is left out.
        device: "cpu" or "cuda".
        earlier: measurements to expect the costs from.
        timer: `elapsed` or `kernel_seconds`.
    """
    running, counts = [], []
    for m, call in competitors:
        progress(" ".join(map(str, m.what.values())))
        m.note = _too_much(*foresee(m, earlier), options.max_seconds, device)
        if m.note:
            continue
        try:
            m.peak = peak_memory(call, device)
            m.seconds.append(timer(call, device))
        except torch.cuda.OutOfMemoryError:
            m.note = "out of memory"
            continue
        running.append((m, call))
        counts.append(min(options.repeats, int(options.max_seconds / m.seconds[0]) + 1))
    take_turns(running, counts, device, timer)
    return [m for m, _ in competitors]


def take_turns(
    competitors: Sequence[tuple[Measurement, Call]], counts: Sequence[int], device: str, timer: Timer = elapsed
) -> None:
    """Time calls in turn until each has its count of repeats, so that a disturbance affects all of them."""
    while due := [
        (m, call) for (m, call), count in zip(competitors, counts, strict=True) if len(m.seconds) < count
    ]:  # fmt: skip
        if sys.stderr.isatty():
            progress(f"round {len(due[0][0].seconds) + 1}")
        for m, call in due:
            m.seconds.append(timer(call, device))
    progress("")


def foresee(wanted: Measurement, earlier: Iterable[Measurement]) -> tuple[float, float]:
    """Seconds and bytes that a measurement is expected to give: on the line that fits the curve's earlier measurements
    best, or, if these are all at one place, on the line through it and the origin; 0 if there are none."""
    same = by_curve(earlier).get(wanted.curve, [])
    if not same:
        return 0.0, 0.0
    points = [(0, 0, 0)] if len({m.work for m in same}) == 1 else []
    points += [(m.work, m.milliseconds / 1e3, m.peak) for m in same]
    work, seconds, peaks = zip(*points, strict=True)
    return tuple(float(np.polyval(np.polyfit(work, values, 1), wanted.work)) for values in (seconds, peaks))


def _too_much(seconds: float, size: float, max_seconds: float, device: str) -> str:
    """Why a call that takes this time and memory is left out; empty if it isn't."""
    if seconds > max_seconds:
        return f"left out, about {seconds:.0f} s"
    if size > 0.8 * devices.available_memory(torch.device(device)):
        return f"left out, about {size / 2**30:.0f} GiB"
    return ""
