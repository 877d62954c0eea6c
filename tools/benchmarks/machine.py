"""The machine that measurements are made on: its name, and the highest rates at which it computes and copies."""

import argparse
import functools
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dereflect.tools.benchmarks.common import kernel_seconds, progress


def matrix_side(device: str) -> int:
    """Rows and columns of the matrices that `matrix_rate` multiplies."""
    return 8192 if device == "cuda" else 2048


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's matrix product, the highest rate of this machine."""
    side = matrix_side(device)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _fastest(lambda: a @ a, device)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes a second, reads and writes together, of a copy of 256 MiB."""
    a = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _fastest(lambda: b.copy_(a), device)


def _fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of ten calls, or of those that fit into two seconds."""
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


def setting(options: argparse.Namespace, device: str, rates: Mapping[str, float] | None = None) -> dict[str, object]:
    """The header of a report: the command, the machine, and the `rates` of `ceilings` in words and as numbers."""
    header = {
        "command": f"python tools/benchmark.py {options.arguments}",
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if rates:
        products = ", ".join(f"{rates[precision] / 1e9:.0f} GFLOP/s {precision}" for precision in ("fp32", "bf16"))
        side = matrix_side(device)
        header["ceilings"] = (
            f"{products} (a {side} x {side} matrix product), copy {rates['copy'] / 1e9:.1f} GB/s read and written"
        )
        header["rates"] = rates
    return header
