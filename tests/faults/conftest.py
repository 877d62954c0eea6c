"""What the tests of faults share."""

import pytest

import models.arch
from tests.faults.small import small


@pytest.fixture
def small_network(monkeypatch):
    """The small network, where --inet looks for one."""
    monkeypatch.setattr(models.arch, "small", small, raising=False)
