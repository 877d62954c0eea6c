"""What several test files share: runs of a few tiny steps, small data sets, and faults on demand."""

import math
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import build_train_loader, discover
from models.losses import ReflectionLoss
from options import parse_train
from train_sirs import train
from util.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = "train/VOCdevkit/VOC2012/PNGImages"

# ---- runs ---------------------------------------------------------------------------------------------------------


def arguments(data_folder: Path, runs: Path, *more: str) -> list[str]:
    """A run of a few tiny steps, of the smallest network."""
    fixed = "--inet dsrnet_xs --gpu_ids -1 --crop_size 32 --vgg_weights random --epoch_size 4 --nThreads 0 "
    fixed += f"--val_split 0.2 --panels 1 --log_every 2 --base_dir {data_folder} --checkpoints_dir {runs}"
    return [*fixed.split(), "--comment", "a test", *more]


def run(data_folder: Path, runs: Path, *more: str) -> tuple[int, Path]:
    """Train in this process; the exit status and the run's folder."""
    options = parse_train(arguments(data_folder, runs, *more))
    return train(options), runs / options.name


def state_of(folder: Path) -> dict:
    """What a run's last checkpoint holds, except the options, which contain the run's name."""
    return {key: value for key, value in checkpoint.load(folder / "last.pt").items() if key != "options"}


def same(a, b) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def wait_for_writes(path: Path, process: subprocess.Popen, count: int, seconds: float = 120) -> None:
    """Wait until a file was replaced `count` times."""
    seen = set()
    deadline = time.monotonic() + seconds
    while len(seen) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        if path.exists():
            seen.add(path.stat().st_ino)
        time.sleep(0.002)


# ---- faults -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, bit: int) -> bytes:
    """The data with one bit turned."""
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


class Malicious:
    """Executes something when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def at_call(monkeypatch, where: object, name: str, number: int, act) -> None:
    """Call `act` just before the `number`-th call of a function."""
    plain, calls = getattr(where, name), iter(range(1, 1000))

    def call(*given, **named):
        if next(calls) == number:
            act()
        return plain(*given, **named)

    monkeypatch.setattr(where, name, call)


class _Poisoned(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def poison(monkeypatch, factors: dict[int, float]) -> None:
    """Multiply the gradients, or with NaN the losses, of these steps."""
    calls = iter(range(1000))
    plain = ReflectionLoss.forward

    def forward(self, transmission, *others):
        factor = factors.get(next(calls), 1.0)
        transmission = transmission * factor if math.isnan(factor) else _Poisoned.apply(transmission, factor)
        return plain(self, transmission, *others)

    monkeypatch.setattr(ReflectionLoss, "forward", forward)


# ---- data ---------------------------------------------------------------------------------------------------------


def write_noise(path: Path, seed: int, width: int = 28, height: int = 20) -> None:
    """Write a small image of smoothed noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_pairs(folder: Path, names, layers=("blended", "transmission_layer"), **size) -> None:
    """Write the layers of a set, an image of noise for each name."""
    for i, name in enumerate(names):
        for j, layer in enumerate(layers):
            write_noise(folder / layer / f"{name}.png", 100 * i + j, **size)


def options_for(base: Path, *more: str):
    """The options of a training on crops of 16 pixels."""
    return parse_train(["--base_dir", str(base), "--crop_size", "16", "--nThreads", "0", *map(str, more)])


def loader_of(base: Path, *more: str):
    """The train loader of these options."""
    options = options_for(base, *more)
    return build_train_loader(options, discover(options))


def batches(loader, epoch: int = 0, step: int = 0) -> list[dict]:
    """The batches of an epoch from a step on."""
    loader.batch_sampler.seek(epoch, step)
    return list(loader)


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    """Batches, or samples, are equal bit for bit."""
    assert [batch["name"] for batch in ours] == [batch["name"] for batch in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("mixture", "target_t", "target_r"):
            assert torch.equal(mine[key], other[key])
