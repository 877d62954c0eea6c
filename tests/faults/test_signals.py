"""Signals: whenever one comes, the step ends, the state is saved, and one line says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dereflect import engine, models, train_sirs
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.util import program
from dereflect.util.run import checkpoint
from dereflect.util.run.record import Record
from tests.helpers import ROOT, arguments, at_call, run, same, state_of, wait_for_writes
from tests.project import NVIDIA_SMI, RECORDER, Project

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
SETTINGS = ("--nEpochs", "2", "--epoch_size", "3", "--save_steps", "1")


def main(*given) -> int:
    """The program, in this process."""
    return program.run(train_sirs.main, arguments(*given))


@pytest.fixture(autouse=True)
def _hangup_as_usual():
    """Even where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Path:
    """An undisturbed run."""
    return run(tiny_data, tmp_path_factory.mktemp("runs"), *SETTINGS, "--name", "whole")[1]


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_step(number, tiny_data, tmp_path, monkeypatch, capfd):
    before = signal.getsignal(number)
    at_call(monkeypatch, engine.Engine, "_gradient", 2, lambda: signal.raise_signal(number))
    assert main(tiny_data, tmp_path, *SETTINGS, "--name", "a") == 128 + number
    assert checkpoint.load(tmp_path / "a/last.pt")["global_step"] == 2, "that step is done, no other is begun"
    told = capfd.readouterr()
    assert told.out.count("stopped") == 1 and f"stopped by {number.name}; saved after step 2" in told.out
    assert "Traceback" not in told.out + told.err and "stopped" not in told.err
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("where", "name", "call"),
    [(DSRNetModel, "predict", 2), (checkpoint, "save", 2), (Record, "averages", 1)],
    ids=["evaluating", "saving", "between epochs"],
)
def test_outside_of_steps_and_resumed(where, name, call, whole, tiny_data, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        at_call(patched, where, name, call, lambda: signal.raise_signal(signal.SIGTERM))
        assert main(tiny_data, tmp_path, *SETTINGS, "--name", "a") == 128 + signal.SIGTERM
    assert capfd.readouterr().out.count("stopped by SIGTERM") == 1
    assert run(tiny_data, tmp_path, *SETTINGS, "--name", "a", "--resume")[0] == 0
    assert same(state_of(tmp_path / "a"), state_of(whole))


def test_while_starting(tiny_data, tmp_path, monkeypatch, capfd):
    at_call(monkeypatch, models, "build_model", 1, lambda: signal.raise_signal(signal.SIGUSR1))
    assert main(tiny_data, tmp_path, *SETTINGS, "--name", "a") == 128 + signal.SIGUSR1
    told = capfd.readouterr()
    assert told.err.splitlines()[-1] == "stopped by SIGUSR1" and "Traceback" not in told.err
    assert not list(tmp_path.rglob("*.pt"))


def test_under_nohup_a_hangup_is_ignored(tiny_data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_call(monkeypatch, engine.Engine, "_gradient", 1, lambda: signal.raise_signal(signal.SIGHUP))
        assert main(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "1", "--name", "a") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("pause", "status"), [(0.0, 7), (1.1, -signal.SIGTERM)])
def test_a_second_signal_ends_at_once_if_it_is_another(pause, status):
    """torchrun sends what it gets to processes that may have got it, too: at the same moment, that is one signal."""
    code = (
        "import os, signal, time\nfrom util.program import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    time.sleep({pause})\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise SystemExit(7 if interrupt.signal == signal.SIGTERM else 8)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == status


@pytest.mark.parametrize("ignored", [False, True])
def test_the_runner_has_torchrun_hand_on_every_signal(ignored, tmp_path):
    project = Project(tmp_path)
    project.nvidia_smi(NVIDIA_SMI)
    package = project.root / "torch" / "distributed"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "run.py").write_text(RECORDER)
    trap = "trap '' HUP; " if ignored else ""
    done = project.bash("-c", f"{trap}exec bash runner.sh 0,1 dsrnet_l x")
    assert done.returncode == 0, done.stderr
    handed_on = set(json.loads(done.stdout.splitlines()[-1])["environment"]["PET_SIGNALS_TO_HANDLE"].split(","))
    assert handed_on == {"SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"} | (set() if ignored else {"SIGHUP"})


@pytest.mark.parametrize(
    ("seed", "tries"), [(1, 2), pytest.param(3, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_to_the_process_group_while_workers_start(seed, tries, tiny_data, tmp_path):
    command = [sys.executable, "-m", "tests.faults.signalling", tiny_data, tmp_path, str(seed), str(tries)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == tries
    for one in found:
        assert one["status"] == 128 + signal.Signals[one["signal"]] and one["step"] is not None, one
        assert one["stopped"] == 1 and one["odd"] == [], one


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_several_processes_save_and_end(number, tiny_data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_sirs.py"]
    command += arguments(tiny_data, tmp_path, "--nEpochs", "50", "--save_steps", "1", "--name", "a")
    more = {"OMP_NUM_THREADS": "1", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_writes(tmp_path / "a/last.pt", process, 2)
        began = time.monotonic()
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - began < 30, output
    assert output.count(f"stopped by {number.name}; saved after step") == 1, output
    assert checkpoint.load(tmp_path / "a/last.pt")["global_step"] > 0
    assert not list((tmp_path / "a").glob("alive_*"))
