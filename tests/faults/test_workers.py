"""Images that break while a run goes on, and workers that die."""

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dereflect import data
from dereflect.data.loader import MOST_RESTARTS, Loader
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb
from dereflect.util.program import SIGNALS
from dereflect.util.run.reader import read_metrics
from tests.helpers import (
    PHOTOGRAPHS,
    assert_same,
    batches,
    loader_of,
    options_for,
    run,
    same,
    state_of,
    write_noise,
    write_pairs,
)

BREAKING = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-60]),
    "text": lambda path: path.write_text("no picture"),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(autouse=True)
def _often_looked_after(monkeypatch):
    """PyTorch checks every half second, instead of every five, whether its workers are alive."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


@pytest.fixture
def base(tmp_path) -> Path:
    """Sixteen photographs, six pairs, a test set."""
    for i in range(16):
        write_noise(tmp_path / PHOTOGRAPHS / f"photo{i}.png", i, width=24 + i, height=40 - i)
    write_pairs(tmp_path / "train/real", [f"r{i}" for i in range(6)])
    write_pairs(tmp_path / "test/mine", "xyz")
    return tmp_path


# ---- images that break in mid-run -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", BREAKING)
@pytest.mark.timeout(120)
def test_a_sample_that_cannot_be_read_is_replaced(base, how, capsys):
    loader = loader_of(base, "--epoch_size", 40)
    before = batches(loader)
    broken = base / PHOTOGRAPHS / "photo3.png"
    BREAKING[how](broken)
    after = batches(loader)
    hit = ["photo3" in batch["name"][0].split("/")[1].split("+") for batch in before]
    assert 2 <= sum(hit) <= loader.faults["replaced"] < 2 * sum(hit)
    readable = [batch for batch, broke in zip(before, hit, strict=True) if not broke]
    for old, new, broke in zip(before, after, hit, strict=True):
        # Order and epoch have all samples, so what takes a place is one of them.
        assert any(same(new, other) for other in readable) if broke else same(new, old)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and str(broken) in told[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_replaced_does_not_depend_on_workers_or_resuming(base, workers):
    options = ("--epoch_size", 30, "--batchSize", 2)
    alone, shared = loader_of(base, *options), loader_of(base, *options, "--nThreads", workers)
    assert_same(batches(shared), batches(alone))
    (base / PHOTOGRAPHS / "photo3.png").unlink()
    (base / "train/real/transmission_layer/r2.png").write_bytes(b"")
    whole = batches(alone)
    faults = alone.faults
    assert faults["replaced"] > 3
    assert_same(batches(shared), whole)
    assert shared.faults == faults
    assert_same(batches(shared, step=7), whole[7:])
    assert_same(batches(shared, epoch=1), batches(alone, epoch=1))


def test_too_many_are_too_many(base):
    loader = loader_of(base, "--epoch_size", 400, "--mix", 1, 0, 0)
    for i in range(3):
        (base / PHOTOGRAPHS / f"photo{i}.png").unlink()
    seen = 0
    loader.batch_sampler.seek(0)
    with pytest.raises(UserError, match=r"^1[1-9] samples of this epoch .*photo\d\.png: there is no such"):
        for _ in loader:
            seen += 1
    assert 11 < seen < 60
    loader = loader_of(base, "--epoch_size", 4000, "--mix", 1, 0, 0)
    (base / PHOTOGRAPHS / "photo3.png").unlink()
    with pytest.raises(UserError, match=r"^4[1-9] samples of this epoch"):  # a hundredth of 4000, and the last's tries
        batches(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_gone_stops_at_once(base, workers):
    loader = loader_of(base, "--nThreads", workers)
    shutil.rmtree(base / "train")
    with pytest.raises(UserError) as error:
        batches(loader)
    told = str(error.value)
    assert told.startswith("10 samples in a row can't be read") and "\n" not in told and "Traceback" not in told


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_image_is_never_replaced(base, workers):
    options = options_for(base)
    pairs = data.discover(options).tests["mine"]
    loader = Loader(data.sirs_dataset.TestSet(options, pairs), [[0], [1], [2]], options, workers)
    assert [batch["name"] for batch in loader] == [["x"], ["y"], ["z"]]
    pairs[1].transmission.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*transmission_layer/y\.png: there is no such file$"):
        list(loader)
    write_noise(pairs[1].transmission, 1, width=20)
    with pytest.raises(UserError, match=r"y\.png.*not of one size"):
        list(loader)


SHORT = ("--nEpochs", "1", "--epoch_size", "6", "--log_every", "1")


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    status, folder = run(tiny_data, tmp_path_factory.mktemp("runs"), *SHORT)
    assert status == 0
    return folder


@pytest.fixture
def spoiled(monkeypatch, tiny_data, tmp_path):
    """Runs on a copy of the tiny data, of which files vanish once the start-up check is done; then they return."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    aside = tmp_path / "aside"
    discover = data.discover

    def start(pattern: str, *more: str) -> tuple[int, Path]:
        def then_spoil(options):
            sets = discover(options)
            for path in sorted(folder.glob(pattern)):
                (aside / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                path.rename(aside / path.relative_to(folder))
            return sets

        monkeypatch.setattr(data, "discover", then_spoil)
        try:
            return run(folder, tmp_path / "runs", *SHORT, *more)
        finally:
            monkeypatch.setattr(data, "discover", discover)
            if aside.exists():
                shutil.copytree(aside, folder, dirs_exist_ok=True)

    return start


def test_a_run_goes_on_without_an_image_and_counts_it(spoiled, capsys):
    status, folder = spoiled("train/VOCdevkit/**/02.png")
    assert status == 0
    assert capsys.readouterr().err.count("02.png") == 1
    counts = EventAccumulator(str(folder)).Reload().Scalars("data/replaced")
    assert max(point.value for point in counts) >= 1


@pytest.mark.parametrize(
    ("pattern", "named"), [("train/*/**/*.png", "10 samples in a row"), ("test/demo_screen/*/01.png", "01.png")]
)
def test_a_run_that_cannot_go_on_is_saved_and_ends_as_an_undisturbed_one(spoiled, whole, tmp_path, pattern, named):
    with pytest.raises(UserError) as error:
        spoiled(pattern)
    told = str(error.value)
    assert named in told and "saved after step" in told and "--resume" in told and "\n" not in told
    stopped = tmp_path / "runs" / whole.name
    measured = [line["set"] for line in read_metrics(stopped) if line["estimate"] == "model"]
    assert "demo_screen" not in measured and "average" not in measured
    status, _ = spoiled("nothing", "--resume", "force")  # as the files have come back
    assert status == 0 and same(state_of(stopped), state_of(whole))
    figures = [
        {(line["epoch"], line["set"], line["estimate"]): (line["count"], line["PSNR"]) for line in read_metrics(f)}
        for f in (stopped, whole)
    ]
    assert figures[0] == figures[1]


# ---- workers that die -------------------------------------------------------------------------------------------


def test_workers_that_are_killed_change_nothing(base, capsys):
    options = ("--epoch_size", 60, "--batchSize", 2)
    whole = batches(loader_of(base, *options))
    loader = loader_of(base, *options, "--nThreads", 2)
    for step, kill in ((5, [0]), (0, [1]), (20, [0, 1])):
        loader.batch_sampler.seek(0)
        found = []
        for batch in loader:
            if len(found) == step:
                for number in kill:
                    os.kill(loader.workers[number].pid, signal.SIGKILL)
            found.append(batch)
        assert_same(found, whole)
        assert loader.faults == {"replaced": 0, "restarts": 1}
    told = capsys.readouterr().err
    assert "killed (SIGKILL)" in told and "1 of 3" in told


def test_a_signal_to_all_processes_leaves_the_workers_at_work(base):
    """As a shell and Slurm send it: only the main process acts on it, and needs the others to the end."""
    options = ("--epoch_size", 30)
    whole = batches(loader_of(base, *options))
    loader = loader_of(base, *options, "--nThreads", 2)
    loader.batch_sampler.seek(0)
    found = []
    for batch in loader:
        if len(found) < len(SIGNALS):
            others = [forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid]
            others += [worker.pid for worker in loader.workers]
            subprocess.run(["kill", f"-{SIGNALS[len(found)]:d}", *map(str, others)], check=True)
        found.append(batch)
    assert_same(found, whole)
    assert loader.faults["restarts"] == 0 and all(Path(f"/proc/{process}").exists() for process in others)


def test_the_main_process_can_still_end_a_worker(base):
    loader = loader_of(base, "--nThreads", 1)
    loader.batch_sampler.seek(0)
    next(iter(loader))
    loader.workers[0].terminate()
    loader.workers[0].join(20)
    assert loader.workers[0].exitcode is not None


class Deadly(Dataset):
    """Ends its worker at sample 2 by a signal, always; without one, leaves it no shared memory."""

    def __init__(self, number: int):
        self.number = number

    def __getitem__(self, key: int) -> torch.Tensor:
        if key == 2 and self.number:
            os.kill(os.getpid(), self.number)
        elif key == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of the file behind the shared memory
        return torch.full((100_000,), float(key))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ("killed (SIGKILL)", "memory", "--nThreads", "--cache_images", "1 times before")),
        (signal.SIGBUS, ("SIGBUS", "/dev/shm is full", "--nThreads 0", "--shm-size")),
        (signal.SIGSEGV, ("SIGSEGV",)),
        (0, ("no room", "/dev/shm is full", "--nThreads 0", "--shm-size")),
    ],
)
def test_workers_that_always_die_are_a_clear_error(base, monkeypatch, number, words):
    restarts = int(number == signal.SIGKILL)
    monkeypatch.setattr("dereflect.data.loader.MOST_RESTARTS", restarts)
    loader = Loader(Deadly(number), [[0], [1], [2], [3]], options_for(base), workers=1)
    found = []
    with pytest.raises(UserError) as error:
        found += [float(batch[0, 0]) for batch in loader]
    told = str(error.value)
    assert all(word in told for word in words) and "\n" not in told
    assert loader.faults["restarts"] == restarts


def test_a_run_whose_worker_is_killed_ends_as_an_undisturbed_one(tiny_data, whole, tmp_path, monkeypatch):
    build = data.build_train_loader

    def and_kill(*arguments) -> Loader:
        loader = build(*arguments)
        threading.Thread(target=kill, args=[loader], daemon=True).start()
        return loader

    def kill(loader: Loader) -> None:
        while not loader.workers:
            time.sleep(0.01)
        os.kill(loader.workers[0].pid, signal.SIGKILL)

    monkeypatch.setattr(data, "build_train_loader", and_kill)
    status, folder = run(tiny_data, tmp_path, *SHORT, "--nThreads", "1")
    assert status == 0 and same(state_of(folder), state_of(whole))
    assert EventAccumulator(str(folder)).Reload().Scalars("data/restarts")[-1].value == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_workers_killed_at_random_moments(base):
    options = ("--epoch_size", 200, "--cache_images", "0.01")
    whole = batches(loader_of(base, *options[:2]))
    rng = random.Random(1)
    killed = 0
    while killed < 50:
        loader = loader_of(base, *options, "--nThreads", 2)
        loader.batch_sampler.seek(0)
        done = threading.Event()
        kills = []

        def kill(loader=loader, done=done, kills=kills) -> None:
            while len(kills) < MOST_RESTARTS and not done.wait(rng.uniform(0, 0.5)):
                worker = rng.choice(loader.workers or [None])
                if worker and worker.is_alive():
                    os.kill(worker.pid, signal.SIGKILL)
                    kills.append(worker.pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found = [batch for batch in loader if time.sleep(0.005) is None]
        finally:
            done.set()
            killer.join()
        assert_same(found, whole)
        assert loader.faults["restarts"] <= len(kills)
        killed += len(kills)


# ---- the cache --------------------------------------------------------------------------------------------------


class Dying:
    """A shared tensor at whose `fatal`-th writing the process is killed, half of it written; only once."""

    def __init__(self, tensor: torch.Tensor, fatal: int):
        self.tensor, self.fatal = tensor, fatal
        self.writes = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __getitem__(self, place):
        return self.tensor[place]

    def __len__(self) -> int:
        return len(self.tensor)

    def __setitem__(self, place, value) -> None:
        self.writes += 1
        if int(self.writes) == self.fatal:
            if isinstance(value, torch.Tensor):
                self.tensor[place][: len(value) // 2] = value[: len(value) // 2]
            os.kill(os.getpid(), signal.SIGKILL)
        self.tensor[place] = value


@pytest.mark.parametrize(("written", "fatal"), [("pixels", 3), ("used", 3), ("entries", 5), ("entries", 6)])
def test_a_worker_that_dies_while_it_fills_the_cache_leaves_no_half_image(base, written, fatal):
    options = ("--epoch_size", 30)
    plain = batches(loader_of(base, *options))
    loader = loader_of(base, *options, "--cache_images", "0.01", "--nThreads", 1)
    cache = loader.dataset.images
    setattr(cache, written, Dying(getattr(cache, written), fatal))
    assert_same(batches(loader), plain)
    assert loader.faults["restarts"] == 1
    assert_same(batches(loader), plain)
    assert loader.faults["restarts"] == 0
    kept = [file for file, number in cache.numbers.items() if cache.entries[number][-1]]
    assert len(kept) > 10
    for file in kept:
        assert cache.read(file).pixels.tobytes() == read_rgb(file, cache.least).tobytes()
