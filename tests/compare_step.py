"""One training step of ours beside the plainly written network's, in turn, in one process, on the CPU.

    python -m tests.compare_step [MODEL] [SIZE] [REPEATS]

A step is: forward, all losses, backward, gradient norm, AdamW; batch 1. Prints medians, and by how much the first step
raises the process's memory at its peak; first with the C library's usual allocator for all, then with freed memory
kept, as train_sirs.py has it.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine import parameter_groups
from models.arch import create_model
from models.dsrnet_model_sirs import DSRNetModel
from models.losses import ReflectionLoss
from models.vgg import Vgg19
from tests.plain import plain_forward
from util.allocator import keep_freed_memory


def main(model: str = "dsrnet_s", size: str = "224", repeats: str = "5") -> None:
    torch.manual_seed(0)
    vgg = Vgg19("random")
    batch = [torch.rand(1, 3, int(size), int(size)) for _ in range(3)]
    steps = {
        "plain, fp32": plain_step(create_model(model), vgg, batch),
        "ours, fp32": our_step(create_model(model), vgg, batch, bf16=False),
        "ours, bf16": our_step(create_model(model), vgg, batch, bf16=True),
    }
    print(f"{model}, {size}x{size}, batch 1, {torch.get_num_threads()} threads, torch {torch.__version__}")
    compare(steps, int(repeats), with_memory=True)
    keep_freed_memory()
    print("with freed memory kept:")
    compare(steps, int(repeats), with_memory=False)


def compare(steps: dict[str, Callable[[], None]], repeats: int, with_memory: bool) -> None:
    times = {name: [] for name in steps}
    peaks = {}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if with_memory and not repeat:
                base = restart_peak()
            began = time.perf_counter()
            step()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - began)
            if with_memory and not repeat:
                peaks[name] = (memory("VmHWM") - base) / 2**20
    slowest = statistics.median(times["plain, fp32"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        told = f"  {name:12} {median:6.2f} s (from {min(seconds):.2f} to {max(seconds):.2f}), {slowest / median:.2f}x"
        if with_memory:
            told += f"; peak {peaks[name]:.2f} GiB, {peaks[name] / peaks['plain, fp32']:.2f} of the plain one's"
        print(told, flush=True)


def our_step(net: nn.Module, vgg: nn.Module, batch: list[torch.Tensor], bf16: bool) -> Callable[[], None]:
    model = DSRNetModel(net, vgg, ReflectionLoss(vgg), bf16)
    return step_of(net, lambda: model(*batch), fused=True)


def plain_step(net: nn.Module, vgg: nn.Module, batch: list[torch.Tensor]) -> Callable[[], None]:
    net.to(memory_format=torch.contiguous_format)
    loss = ReflectionLoss(vgg)

    def forward() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            features = [f.contiguous() for f in vgg(batch[0])]
        return loss(*plain_forward(net, batch[0], features), *batch)

    return step_of(net, forward, fused=False)


def step_of(net: nn.Module, forward: Callable[[], dict[str, torch.Tensor]], fused: bool) -> Callable[[], None]:
    for scale in (p for p in net.parameters() if p.shape[0] == 1 and p.dim() == 4):
        nn.init.normal_(scale, std=0.1)  # at their initial 0 some gradients vanish
    optimizer = torch.optim.AdamW(parameter_groups(net, 1e-2), lr=1e-6, fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(forward().values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        optimizer.step()

    return step


def restart_peak() -> int:
    """Give back what is free and forget the peak so far; what the process holds now, in KiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
