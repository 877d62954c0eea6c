"""What the tests of faults share."""

from pathlib import Path

import pytest

from dereflect.models import arch
from tests.faults.small import small, train_small


@pytest.fixture
def small_network(monkeypatch):
    """The small network, where --inet looks for one."""
    monkeypatch.setattr(arch, "small", small, raising=False)


@pytest.fixture(scope="session")
def finished(tiny_data, tmp_path_factory) -> Path:
    """A run of the small network that nothing disturbs, two epochs of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arch, "small", small, raising=False)
        return train_small(tiny_data, tmp_path_factory.mktemp("runs"), "--name", "run")[1]
