"""Too little memory: the state is saved, and what would fit is told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.util.device import enough_memory
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from tests.helpers import arguments, at_call, run, same, state_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("--nEpochs", "1", "--epoch_size", "6", "--save_steps", "1", "--batchSize", "2")


def lack() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_in_a_step(tiny_data, tmp_path, monkeypatch):
    whole = run(tiny_data, tmp_path, *SETTINGS, "--name", "whole")[1]
    with monkeypatch.context() as patched:
        at_call(patched, DSRNetModel, "forward", 3, lack)
        with pytest.raises(UserError) as error:
            run(tiny_data, tmp_path, *SETTINGS, "--save_steps", "0", "--name", "a")
    told = str(error.value)
    for way in (
        "step 2",
        "--batchSize 1 --accumulate 2 (the same samples, 1/2)",
        "--checkpoint_activations",
        "--precision bf16",
        "saved",
    ):
        assert way in told
    assert checkpoint.load(tmp_path / "a/last.pt")["global_step"] == 2
    assert run(tiny_data, tmp_path, *SETTINGS, "--name", "a", "--resume")[0] == 0
    assert same(state_of(tmp_path / "a"), state_of(whole)), "the weights were those of before the step"


def test_in_the_optimisers_step_nothing_half_done_is_saved(tiny_data, tmp_path, monkeypatch):
    at_call(monkeypatch, torch.optim.AdamW, "step", 2, lack)
    tiny = ("--batchSize", "1", "--precision", "bf16", "--checkpoint_activations")
    with pytest.raises(UserError, match=r"step 1 with --batchSize 1.*bf16; what takes less: a smaller --inet$"):
        run(tiny_data, tmp_path, *SETTINGS, *tiny, "--name", "a")
    assert checkpoint.load(tmp_path / "a/last.pt")["global_step"] == 1


@pytest.mark.parametrize(("batch", "way"), [("2", "--eval_batch 1"), ("1", "--precision bf16")])
def test_in_the_evaluation(batch, way, tiny_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_call(patched, DSRNetModel, "predict", 2, lack)
        with pytest.raises(UserError, match=f"52x40 pixels; what takes less: {way}"):
            run(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "2", "--eval_batch", batch, "--name", "a")
    state = checkpoint.load(tmp_path / "a/last.pt")
    assert (state["epoch"], state["step"]) == (0, 2), "all steps are kept; what is left is the evaluation"


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8), lack],
    ids=["PyTorch on the CPU", "NumPy", "PyTorch on a GPU"],
)
def test_every_librarys_way_to_say_so_is_understood(allocate):
    with pytest.raises(UserError, match="smaller"), enough_memory(lambda: "smaller"):
        allocate()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(2, "no file")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)), enough_memory(lambda: "smaller"):
        raise error


def test_a_limit_of_the_system(tiny_data, tmp_path):
    """A child that may have half a gigabyte of address space beyond what it takes to start."""
    code = """
import re, resource, sys
from pathlib import Path
from dereflect import engine
from dereflect import train_sirs
fit = engine.Engine.fit
def limited(self):
    taken = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, resource.RLIM_INFINITY))
    fit(self)
engine.Engine.fit = limited
from dereflect.util.program import run
sys.exit(run(train_sirs.main))
"""
    more = ("--nEpochs", "1", "--crop_size", "384", "--batchSize", "4", "--val_split", "0", "--name", "a")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(tiny_data, tmp_path, *more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: not enough memory on cpu for step 0")
    assert "--batchSize 2 --accumulate 2" in line and "--crop_size 256" in line
    assert checkpoint.load(tmp_path / "a/last.pt")["global_step"] == 0
