"""Several processes: one that dies or hangs takes the others with it, and the restart goes on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.util import distributed
from dereflect.util.distributed import World
from dereflect.util.run.reader import read_metrics
from tests.helpers import ROOT, arguments, same, state_of, wait_for_writes


@pytest.fixture
def lost(monkeypatch) -> list[tuple[int, int]]:
    """What the watch would have ended: (the rank that is lost, the rank that ends)."""
    ended = []
    monkeypatch.setattr(distributed, "_BEAT", 0.02)
    monkeypatch.setattr(distributed, "_end", lambda *ranks: ended.append(ranks))
    monkeypatch.setattr(World, "barrier", lambda world: None)
    return ended


def beat(file: Path, times: int) -> None:
    for _ in range(times):
        file.touch()
        time.sleep(0.02)


def test_a_process_that_stops_showing_life_is_noticed(lost, tmp_path):
    with World("cpu", rank=0, size=2).watched(tmp_path):
        beat(tmp_path / "alive_1", 20)
        assert lost == [] and (tmp_path / "alive_0").exists()
        time.sleep(0.6)
    assert lost == [(1, 0)]
    assert not (tmp_path / "alive_0").exists()


def test_one_that_hangs_right_at_the_start_is_noticed(lost, tmp_path):
    (tmp_path / "alive_1").touch()  # its only sign of life, before the watch begins
    with World("cpu", rank=0, size=2).watched(tmp_path):
        time.sleep(0.6)
    assert lost == [(1, 0)]


def test_one_that_has_finished_is_not_missed(lost, tmp_path):
    with World("cpu", rank=1, size=2).watched(tmp_path):
        beat(tmp_path / "alive_0", 5)
        (tmp_path / "alive_0").unlink()
        time.sleep(0.5)
    assert lost == []


def test_a_process_alone_is_not_watched(lost, tmp_path):
    before = threading.active_count()
    with World("cpu").watched(tmp_path):
        assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_the_end_says_which_rank_and_what_to_do(tmp_path):
    code = "from dereflect.util import distributed; distributed._end(3, 1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "rank 3 has shown no life for 45 s; rank 1 ends" in done.stderr and "--max-restarts" in done.stderr


def test_gradients_have_the_strides_that_the_exchange_expects():
    """Else DistributedDataParallel copies them, and says so in every log."""
    distributed.dist.init_process_group("gloo", store=distributed.dist.HashStore(), rank=0, world_size=1)
    try:
        network = create_model("dsrnet_xs")
        image = torch.rand(1, 3, 32, 32)
        sum(output.square().mean() for output in network(image)).backward()
        alone = [parameter.grad.clone() for parameter in network.parameters()]
        network.zero_grad()
        parallel = World(torch.device("cpu"), size=2).parallel(network)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sum(output.square().mean() for output in parallel(image)).backward()
    finally:
        distributed.dist.destroy_process_group()
    for parameter, gradient in zip(network.parameters(), alone, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.grad.stride() == parameter.stride()


def ranks(data: Path, runs: Path, *more: str, restarts: int = 0) -> list[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}")
    return [sys.executable, *launch, "train_sirs.py", *arguments(data, runs, *more)]


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PET_SHUTDOWN_TIMEOUT": "5",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
}


@pytest.mark.slow
def test_sets_that_do_not_divide_evenly_are_evaluated(tiny_data, tmp_path):
    command = ranks(tiny_data, tmp_path, "--nEpochs", "1", "--max_dataset_size", "3", "--val_split", "0", "--name", "a")
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=200)
    counts = {line["set"]: line["count"] for line in read_metrics(tmp_path / "a") if line["estimate"] == "model"}
    assert counts == {"demo_clip": 3, "demo_screen": 3, "average": 6}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_takes_the_others_with_it(rank, tiny_data, tmp_path):
    command = ranks(tiny_data, tmp_path, "--nEpochs", "50", "--save_steps", "1", "--name", "a")
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    try:
        wait_for_writes(tmp_path / "a/last.pt", process, 2)
        pids = children(process)
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(timeout=60) != 0
        assert time.monotonic() - began < 60 and not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_two_processes_agree_on_a_broken_test_image(tiny_data, tmp_path, broken):
    """With test sets of an odd number of images, of which one process has more."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    for path in folder.glob("test/*/*/03.png"):
        path.unlink()
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from dereflect import data
discover = data.discover
def then_break(options):
    sets = discover(options)
    Path({str(folder / "test/demo_clip/blended/01.png")!r}).unlink(missing_ok=True)
    return sets
if {broken}:
    data.discover = then_break
if __name__ == "__main__":
    from dereflect import train_sirs
    from dereflect.util.program import run
    sys.exit(run(train_sirs.main))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    command += arguments(folder, tmp_path, "--nEpochs", "1", "--name", "two")
    done = subprocess.run(
        command, cwd=ROOT, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert (tmp_path / "two/last.pt").exists()
    if broken:
        assert done.returncode and "01.png: there is no such file" in done.stderr and "exitcode  : 2" in done.stderr
        assert "saved after step" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert {line["count"] for line in read_metrics(tmp_path / "two") if line["set"] == "demo_clip"} == {3}


SETTINGS = ("--nEpochs", "1", "--epoch_size", "12", "--save_steps", "1", "--resume", "auto")


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Path:
    """An undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run(ranks(tiny_data, folder, *SETTINGS, "--name", "whole"), cwd=ROOT, env=ENVIRONMENT, check=True)
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_process_is_given_up_and_the_restart_goes_on(rank, whole, tiny_data, tmp_path):
    command = ranks(tiny_data, tmp_path, *SETTINGS, "--name", "hung", restarts=1)
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    told = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr))
    reader.start()
    try:
        wait_for_writes(tmp_path / "hung/last.pt", process, 2, seconds=300)
        while not (tmp_path / f"hung/alive_{rank}").exists():
            time.sleep(0.1)
        time.sleep(1)
        os.kill(children(process)[rank], signal.SIGSTOP)
        assert process.wait(timeout=500) == 0
    finally:
        process.kill()
        reader.join()
    assert re.search(f"rank {rank} has shown no life for 45 s; rank {1 - rank} ends", "".join(told))
    assert same(state_of(tmp_path / "hung"), state_of(whole))


def children(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    pids = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    by_rank = {}
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        by_rank |= {int(value[5:]): pid for value in environment if value.startswith(b"RANK=")}
    return [by_rank[rank] for rank in sorted(by_rank)]
