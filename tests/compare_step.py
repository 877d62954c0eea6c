"""One training step of ours beside the plainly written network's, in turn, in one process.

    python -m tests.compare_step --model dsrnet_s --device cpu

A step is: forward, all losses, backward, gradient norm, AdamW. Prints medians, and the most memory that the first step
takes beyond what the process held before. On a CPU this is the C library's usual allocator, and then once more the
times with freed memory kept, as train_sirs.py has it.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine import parameter_groups
from models.arch import create_model, list_models
from models.arch.blocks import MuGIM, MuGIM2, MuGIMG
from models.dsrnet_model_sirs import DSRNetModel
from models.losses import ReflectionLoss
from models.vgg import Vgg19
from tests.plain import plain_forward
from util.allocator import keep_freed_memory

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list_models(), default="dsrnet_s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as train_sirs.py has it
    device = torch.device(options.device)
    vgg = Vgg19("random").to(device)
    batch = [torch.rand(options.batch, 3, options.size, options.size, device=device) for _ in range(3)]

    def network() -> nn.Module:
        return create_model(options.model).to(device)

    steps = {
        "ours, fp32": our_step(network(), vgg, batch, bf16=False),
        "ours, bf16": our_step(network(), vgg, batch, bf16=True),
    }
    if not any(isinstance(module, MuGIM | MuGIM2 | MuGIMG) for module in network().modules()):
        steps = {"plain, fp32": plain_step(network(), vgg, batch)} | steps  # which has no Mamba
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.model}, {options.size}x{options.size}, batch {options.batch}, {where}, torch {torch.__version__}")
    compare(steps, options.repeats, device, with_memory=True)
    if device.type == "cpu":
        keep_freed_memory()
        print("with freed memory kept:")
        compare(steps, options.repeats, device, with_memory=False)


def compare(steps: dict[str, Step], repeats: int, device: torch.device, with_memory: bool) -> None:
    times = {name: [] for name in steps}
    peaks = {}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if repeat:  # the first one warms up
                times[name].append(seconds(step, device))
            else:
                peaks[name] = peak_memory(step, device)
    first = next(iter(steps))
    for name, values in times.items():
        ratio = statistics.median(times[first]) / statistics.median(values)
        told = f"  {name:12} {statistics.median(values):7.3f} s ({min(values):.3f} to {max(values):.3f}), {ratio:.2f}x"
        if with_memory:
            told += f"; peak {peaks[name]:.2f} GiB, {peaks[name] / peaks[first]:.2f} of the first's"
        print(told, flush=True)


def our_step(net: nn.Module, vgg: nn.Module, batch: list[torch.Tensor], bf16: bool) -> Step:
    model = DSRNetModel(net, vgg, ReflectionLoss(vgg), bf16).to(batch[0].device)
    return step_of(net, lambda: model(*batch), fused=True)


def plain_step(net: nn.Module, vgg: nn.Module, batch: list[torch.Tensor]) -> Step:
    net.to(memory_format=torch.contiguous_format)
    loss = ReflectionLoss(vgg).to(batch[0].device)

    def forward() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            features = [f.contiguous() for f in vgg(batch[0])]
        return loss(*plain_forward(net, batch[0], features), *batch)

    return step_of(net, forward, fused=False)


def step_of(net: nn.Module, forward: Callable[[], dict[str, torch.Tensor]], fused: bool) -> Step:
    for scale in (p for p in net.parameters() if p.shape[0] == 1 and p.dim() == 4):
        nn.init.normal_(scale, std=0.1)  # at their initial 0 some gradients vanish
    optimizer = torch.optim.AdamW(parameter_groups(net, 1e-2), lr=1e-6, fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(forward().values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        optimizer.step()

    return step


def seconds(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(step: Step, device: torch.device) -> float:
    """GiB that a step takes at its peak beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 2**20


def status(field: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
