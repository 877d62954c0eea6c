"""What all tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dereflect.data.demo import build_demo
from dereflect.util.images import read_image, write_image
from dereflect.util.stability import Guard
from tests.helpers import PHOTOGRAPHS, write_noise, write_pairs
from tests.project import Project


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """Tests end processes, never the machine, so nothing written is lost without fsync, which takes most of a tiny
    run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The embedded demo set."""
    folder = tmp_path_factory.mktemp("dataset") / "demo"
    build_demo(folder)
    return folder


@pytest.fixture
def quick_guard(monkeypatch):
    """A guard that judges, and loses patience, within a few steps."""
    monkeypatch.setattr(Guard, "WARM_UP", 2)
    monkeypatch.setattr(Guard, "WINDOW", 4)
    monkeypatch.setattr(Guard, "PATIENCE", 2)
    monkeypatch.setattr(Guard, "MOST_RETURNS", 1)


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (24, 40, 3), smooth, different in every corner and channel."""
    y, x = np.mgrid[:24, :40]
    return np.stack([x * 6, y * 10, 240 - x * 3 - y * 4], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def tiny_data(demo, tmp_path_factory) -> Path:
    """The demo set with every image cut down to 52 x 40 pixels, for runs of a few seconds."""
    folder = tmp_path_factory.mktemp("dataset") / "tiny"
    for path in sorted(demo.rglob("*.png")):
        if int(path.stem) < 4:
            (folder / path.relative_to(demo)).parent.mkdir(parents=True, exist_ok=True)
            write_image(folder / path.relative_to(demo), read_image(path)[40:80, 40:92])
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    """A whole small data set: 8 photographs, 5 real and 4 nature pairs, two test sets."""
    for i in range(8):
        write_noise(tmp_path / PHOTOGRAPHS / f"photo{i}.png", i, width=24 + i, height=30 - i)
    write_pairs(tmp_path / "train/real", [f"r{i}" for i in range(5)])
    write_pairs(tmp_path / "train/nature", [f"n{i}" for i in range(4)])
    write_pairs(tmp_path / "test/SIR2/PostcardDataset", "ab", ("blended", "transmission_layer", "reflection_layer"))
    write_pairs(tmp_path / "test/real20_420", ["3", "4", "9"], width=70, height=50)
    return tmp_path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy of the project's shell scripts."""
    return Project(tmp_path)
