"""SIGKILL at random moments of a training."""

import json
import os
import subprocess
import sys

import pytest

from tests.faults.small import outcome
from tests.helpers import ROOT, same

KILLS = 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(tiny_data, tmp_path):
    command = [sys.executable, "-m", "tests.faults.killing", str(tiny_data), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["status"] == 0 and found["kills"] == KILLS
    assert found["in a checkpoint"] >= KILLS // 6, "too few kills have met a checkpoint half written"
    assert found["lost"] == []
    whole = outcome(tmp_path / "whole")
    assert len(whole["curve"]) == 18 and whole["left over"] == [] and len(whole["images"]) == 3
    for number in range(found["runs"]):
        killed = outcome(tmp_path / f"killed-{number}")
        for part, value in whole.items():
            assert same(killed[part], value), f"{part} of run {number}"
