"""What the subcommands share: timing in turn, peak memory, the machine's ceilings, tables, plots and files."""

import argparse
import ctypes
import functools
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.arch import list_models
from util.device import available_memory
from util.errors import UserError
from util.tables import Rows, as_markdown, as_text

Call = Callable[[], object]
Timer = Callable[[Call, str], float]


# Options ---------------------------------------------------------------------------------------------------


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")


def add_output(parser: argparse.ArgumentParser, plot: str | None = None) -> None:
    """--json and --markdown; --plot, too, where `plot` says what it draws."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {plot} there")


def choose_device(options: argparse.Namespace) -> str:
    """What --device means here, "cpu" or "cuda"."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return options.device


def check_models(option: str, names: Iterable[str]) -> None:
    """Stop if one of the models that `option` names isn't there."""
    for name in names:
        if name not in list_models():
            raise UserError(f"{option} {name}: no such model; there are {', '.join(list_models())}")


# Time and memory -------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a call took."""

    seconds: list[float] = field(default_factory=list)  # of every repeat
    peak: float = float("nan")  # bytes beyond those held before
    note: str = ""  # why there are no seconds

    @property
    def milliseconds(self) -> float | None:
        """The median; None where there is none."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else None


def elapsed(call: Call, device: str) -> float:
    """Seconds of one call, until the device has done all of it."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_seconds(call: Call, device: str) -> float:
    """`elapsed` for what takes no longer than its launch: on a GPU the median of several, by Triton's tools."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(call, warmup=5, rep=50, return_mode="median")
    return elapsed(call, device)


def in_turn(
    calls: Mapping[str, Call],
    device: str,
    repeats: int,
    max_seconds: float,
    title: str,
    foreseen: Mapping[str, tuple[float, float]],
    timer: Timer = elapsed,
) -> dict[str, Cost]:
    """Time and peak memory of calls side by side; each is called twice before it is timed.

    Args:
        calls: what is compared, by name.
        device: "cpu" or "cuda".
        repeats: how often each is timed at most.
        max_seconds: for all repeats of one call; one that is foreseen to need more even once is left out.
        title: of the line that tells the progress.
        foreseen: seconds and bytes that calls are expected to take, as far as that is known.
        timer: seconds of a call on the device.
    """
    costs, counts = {}, {}
    for name, call in calls.items():
        progress(f"{title}: {name}")
        costs[name] = cost = Cost(note=_too_much(*foreseen[name], max_seconds, device) if name in foreseen else "")
        if cost.note:
            continue
        try:
            cost.peak = peak_memory(call, device)
            cost.seconds = [timer(call, device)]
        except torch.cuda.OutOfMemoryError:
            cost.note = "out of memory"
            continue
        counts[name] = min(repeats, int(max_seconds / cost.seconds[0]) + 1)
    further = take_turns({name: calls[name] for name in counts}, counts, device, title, timer, done=1)
    for name, seconds in further.items():
        costs[name].seconds += seconds
    return costs


def take_turns(
    calls: Mapping[str, Call],
    counts: Mapping[str, int],
    device: str,
    title: str,
    timer: Timer = elapsed,
    done: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every call, `counts` of each less those `done`, in turn: what disturbs one disturbs all."""
    seconds = {name: [] for name in calls}
    for turn in range(done, max(counts.values(), default=0)):
        if sys.stderr.isatty():
            progress(f"{title}: round {turn + 1}")
        for name, call in calls.items():
            if turn < counts[name]:
                seconds[name].append(timer(call, device))
    progress("")
    return seconds


def _too_much(seconds: float, size: float, max_seconds: float, device: str) -> str:
    """Why a call that would take so many seconds and bytes is left out; nothing if it isn't."""
    if seconds > max_seconds:
        return f"left out, about {seconds:.0f} s"
    if size > 0.8 * available_memory(torch.device(device)):
        return f"left out, about {size / 2**30:.0f} GiB"
    return ""


def peak_memory(call: Call, device: str) -> float:
    """Bytes that a call holds at its peak beyond those held before; nan where the system doesn't tell."""
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


# The machine -----------------------------------------------------------------------------------------------


def matrix_side(device: str) -> int:
    """Rows and columns of the matrices that `matrix_rate` multiplies."""
    return 8192 if device == "cuda" else 2048


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's matrix product, the most that this machine does."""
    side = matrix_side(device)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _fastest(lambda: a @ a, device)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    a = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _fastest(lambda: b.copy_(a), device)


def _fastest(call: Call, device: str) -> float:
    """Seconds of the fastest of ten calls, or of as many as two seconds hold."""
    seconds = []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < 2):
        seconds.append(kernel_seconds(call, device))
    return min(seconds)


def ceilings(device: str) -> dict[str, float]:
    """Matrix products in FLOP/s, by precision, and the copy in B/s."""
    progress("the machine's ceilings")
    rates = {
        "fp32": matrix_rate(device, torch.float32),
        "bf16": matrix_rate(device, torch.bfloat16),
        "copy": copy_rate(device),
    }
    progress("")
    return rates


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def setting(options: argparse.Namespace, device: str) -> dict[str, object]:
    """What ran on what: the header of a report."""
    return {
        "command": f"python tools/benchmark.py {options.arguments}",
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def with_ceilings(options: argparse.Namespace, device: str, rates: Mapping[str, float]) -> dict[str, object]:
    """`setting` and the rates of `ceilings` in words."""
    products = ", ".join(f"{rates[precision] / 1e9:.0f} GFLOP/s {precision}" for precision in ("fp32", "bf16"))
    side = matrix_side(device)
    words = f"{products} (a {side} x {side} matrix product), copy {rates['copy'] / 1e9:.1f} GB/s read and written"
    return setting(options, device) | {"ceilings": words}


# What is shown and written ---------------------------------------------------------------------------------


def progress(text: str) -> None:
    """One line on standard error that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def report(
    options: argparse.Namespace, header: Mapping[str, object], tables: Iterable[tuple[str, Rows]], **record: object
) -> None:
    """Print the header and the tables (title and rows, the first with the columns' names), and write what is asked
    for: them as --markdown, the header and `record` as --json."""
    text = "\n".join(f"{key}: {value}" for key, value in header.items())
    print(f"{text}\n")
    for title, rows in tables:
        print(f"{title}\n{as_text(rows, left=2, rule=False)}\n")
    if options.markdown:
        parts = [f"### {title}\n\n{as_markdown(rows)}" for title, rows in tables]
        options.markdown.write_text("\n".join([f"```\n{text}\n```\n", *parts]))
    if options.json:
        options.json.write_text(json.dumps({"setting": header, **record}, indent=1) + "\n")


@dataclass
class Panel:
    """A row of axes over one quantity: every line has x and as many ys as there are axes."""

    title: str
    xlabel: str
    ylabels: tuple[str, ...]
    lines: dict[str, tuple[list[float], ...]]


def draw(panels: list[Panel], title: str, path: Path) -> None:
    """Write a picture of logarithmic axes, a row for every panel."""
    plt = import_matplotlib()
    columns = len(panels[0].ylabels)
    same = len({panel.xlabel for panel in panels}) == 1
    size = (5.5 * columns, 4 * len(panels))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, sharex=same, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for axis, label, number in zip(row, panel.ylabels, range(1, columns + 1), strict=True):
            for name, line in panel.lines.items():
                axis.plot(line[0], line[number], marker="o", label=name)
            axis.set(xscale="log", yscale="log", title=panel.title, xlabel=panel.xlabel, ylabel=label)
            places = sorted({x for line in panel.lines.values() for x in line[0]})
            axis.set_xticks(places, [f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in places])
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
            for direction in (axis.xaxis, axis.yaxis):
                direction.set_minor_formatter("")
            axis.grid(alpha=0.3)
        row[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def import_matplotlib():
    """pyplot for files; called early, so that it's missed before anything is measured."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
