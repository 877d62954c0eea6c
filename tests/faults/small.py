"""A network of a moment, and trainings of it: what can go wrong around a network doesn't depend on its size."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dereflect.models import arch
from dereflect.options import parse_train
from dereflect.train_sirs import train
from dereflect.util.run.reader import METRICS
from tests.helpers import arguments

RECIPE = ("--inet", "small", "--save_steps", "1", "--log_every", "1", "--ema", "0.9", "--guard", "--save_every", "1")


class Small(nn.Module):
    """Two convolutions, and numbers that only make its checkpoints larger."""

    features = "vgg19"

    def __init__(self, ballast: int = 1 << 12):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 9, 3, padding=1))
        self.register_buffer("ballast", torch.randn(ballast))

    def forward(self, image: Tensor, features: list[Tensor]) -> tuple[Tensor, ...]:
        return self.layers(image).chunk(3, 1)


def small() -> Small:
    """As a function of arch, once it is put there."""
    return Small()


small.__module__ = arch.__name__


def train_small(data: Path, runs: Path, *more: str) -> tuple[int, Path]:
    """Train it, by default two epochs of three steps; the exit status and the run's folder."""
    options = parse_train(arguments(data, runs, *RECIPE, "--nEpochs", "2", "--epoch_size", "3", *more))
    return train(options), runs / options.name


def outcome(folder: Path) -> dict:
    """All that a run leaves which the same run, disturbed, must leave, too."""
    events = EventAccumulator(str(folder)).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "last.pt", weights_only=True)
    return {
        "state": {key: value for key, value in state.items() if key != "options"},
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "images": {path.name: path.read_text() for path in (folder / "per_image").iterdir()},
        "figures": {
            tag: [(point.step, point.value) for point in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag.partition("/")[0] in METRICS
        },
        "pictures": {tag: [point.step for point in events.Images(tag)] for tag in events.Tags()["images"]},
        "curve": [(point.step, point.value) for point in events.Scalars("train/loss_total")],
        "panels": {path.name: path.read_bytes() for path in (folder / "panels").iterdir()},
        "checkpoints": sorted(path.name for path in folder.glob("*.pt")),
        "left over": sorted(path.name for path in folder.rglob(".tmp-*")),
    }
