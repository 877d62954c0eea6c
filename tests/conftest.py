"""What all tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.demo import build_demo
from tests.golden.fill import fill

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The embedded demo set."""
    folder = tmp_path_factory.mktemp("dataset") / "demo"
    build_demo(folder)
    return folder


def golden(name: str) -> dict[str, np.ndarray]:
    """A file of golden numbers."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def published_state(shapes: dict[str, list[int]], prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict that the golden numbers were computed with, under its published names."""
    return {
        name: torch.from_numpy(fill((prefix + name).replace("seq_r", "seq_l"), tuple(shape)))
        for name, shape in shapes.items()
    }


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, over the largest expected value."""
    actual = actual.detach().double().cpu().numpy()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
