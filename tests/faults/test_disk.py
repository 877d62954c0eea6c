"""Disks that are full, read-only or beyond a quota, in every kind of write."""

import builtins
import errno
import io
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dereflect.train_sirs import main
from dereflect.util import disk, program
from dereflect.util.errors import UserError
from dereflect.util.images import write_image
from dereflect.util.run import checkpoint
from tests.faults.small import outcome, train_small
from tests.helpers import arguments, same

MIB = 1 << 20


@pytest.fixture
def little(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "little"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all the space but `leave` bytes."""
    path = folder / "others"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - leave))
    return path


def names(folder: Path) -> list[str]:
    """Of what is in it."""
    return sorted(path.name for path in folder.iterdir())


KINDS = {
    "checkpoint": "last.pt",
    "kept checkpoint": "epoch_",
    "best": "best.pt",
    "metrics": "metrics.jsonl",
    "per image": "per_image",
    "event": "events.out",
    "panel": "panels",
    "picture": "images",
    "options": "options.yaml",
    "starts": "starts.jsonl",
    "lock": "lock",
}


class Failing(io.FileIO):
    """A file that can't be written."""

    number = errno.ENOSPC

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("kind", "number"),
    list(zip(KINDS, itertools.cycle([errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.EIO]), strict=False)),
)
def test_every_kind_of_write_that_fails_ends_with_path_and_space(
    kind, number, tiny_data, tmp_path, small_network, monkeypatch, capsys, finished
):
    """The run, resumed once there is room again, ends as one that nothing has disturbed."""
    opened, fails = io.open, True

    def open_failing(file, mode="r", *args, **kwargs):
        path = os.fsdecode(file) if not isinstance(file, int) else ""
        inside = "run/" in path and KINDS[kind] in path.split("run/")[-1]
        if not (fails and inside and set(mode) & set("wax+")):
            return opened(file, mode, *args, **kwargs)
        raw = Failing(file, mode.replace("b", "").replace("t", ""))
        raw.number = number
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **kwargs)

    monkeypatch.setattr(io, "open", open_failing)
    monkeypatch.setattr(builtins, "open", open_failing)
    given = arguments(tiny_data, tmp_path, "--inet", "small", "--save_steps", "1", "--log_every", "1", "--ema", "0.9",
                      "--guard", "--save_every", "1", "--nEpochs", "2", "--epoch_size", "3", "--name", "run",
                      "--save_images", "--resume", "auto")  # fmt: skip
    assert program.run(main, given) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        told.startswith("error: ") and KINDS[kind] in told and os.strerror(number) in told and "are free there" in told
    )
    folder = tmp_path / "run"
    assert not list(folder.rglob(".tmp-*"))
    for path in folder.glob("*.pt"):
        checkpoint.load(path)
    fails = False
    assert program.run(main, given) == 0
    shutil.rmtree(folder / "images")
    assert same(outcome(folder), outcome(finished))


def test_full_while_training(little, tiny_data, small_network, monkeypatch, capsys, finished):
    """A real one: others take the space at the third step."""
    plain = checkpoint.save

    def save(state, path, previous=None):
        if state["global_step"] == 3:
            fill(little, leave=8192)
        plain(state, path, previous)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(UserError, match=r"written: No space left on device \(0\.. MiB are free there now\)"):
            train_small(tiny_data, little, "--name", "run")
    assert "saved last after step 2, of 3; --resume continues" in capsys.readouterr().out
    run = little / "run"
    assert checkpoint.load(run / "last.pt")["global_step"] == 2 and not list(run.rglob(".tmp-*"))
    (little / "others").unlink()
    assert train_small(tiny_data, little, "--name", "run", "--resume")[0] == 0
    assert same(outcome(run), outcome(finished))


@pytest.mark.parametrize("left", [0, 4096, 3 * 4096])
def test_full_from_the_start(little, tiny_data, small_network, left):
    fill(little, left)
    with pytest.raises(UserError, match=f"^{little}/run.*free"):
        train_small(tiny_data, little, "--name", "run")
    assert not list(little.rglob("*.pt")) and not list(little.rglob(".tmp-*"))


def test_read_only(little, tiny_data, small_network):
    status, run = train_small(tiny_data, little, "--name", "run")
    assert status == 0
    subprocess.run(["mount", "-o", "remount,ro", little], check=True)
    with pytest.raises(UserError, match=rf"^{run}.*cannot be written: Read-only file system.*free"):
        train_small(tiny_data, little, "--name", "run", "--nEpochs", "3", "--resume")
    with pytest.raises(UserError, match=rf"^{little}/new: cannot be written: Read-only file system.*free"):
        train_small(tiny_data, little, "--name", "new")
    assert checkpoint.load(run / "last.pt")["epoch"] == 2


def test_room_for_the_checkpoints_is_seen_to_before_training(little, tiny_data, monkeypatch):
    """Ten thousand numbers: 40 kB of weights, as much of a moving average; the optimiser's means are small."""
    from tests.faults.small import Small

    def small(ballast=MIB // 4):
        return Small(ballast)

    small.__module__ = "dereflect.models.arch"
    monkeypatch.setattr("dereflect.models.arch.small", small, raising=False)
    monkeypatch.setattr("engine.Engine.fit", lambda self: pytest.fail("it has begun"))
    with pytest.raises(UserError, match=r"need 1[0-9]\.. MiB more, but only [78]\.. MiB are free.*--save_every"):
        train_small(tiny_data, little, "--name", "run")
    assert not (little / "run").exists()


def test_the_room_needed_is_what_a_run_takes(tiny_data, tmp_path, small_network, monkeypatch):
    """With what is written beside the others at the most; and a run that has its checkpoints needs hardly more."""
    asked, most = [], []
    monkeypatch.setattr(disk, "require", lambda folder, needed: asked.append(needed))
    replace = os.replace

    def measure(source, target):
        run = tmp_path / "run"
        sizes = {path.stat().st_ino: path.stat().st_size for path in run.iterdir() if path.suffix == ".pt"}
        most.append(sum(sizes.values()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", measure)
    more = ("--name", "run", "--nEpochs", "4", "--epoch_size", "1")
    assert train_small(tiny_data, tmp_path, *more)[0] == 0
    overhead = 16_000 * 7  # of a file: the names, the options, the program's hashes
    assert max(most) - overhead < asked[0] < 1.5 * max(most)
    train_small(tiny_data, tmp_path, *more, "--resume")
    assert asked[1] < asked[0] / 3


def test_a_picture_is_whole_or_not_there(little):
    rng = np.random.default_rng(0)
    write_image(little / "a.png", rng.random((64, 64, 3)))
    before = (little / "a.png").read_bytes()
    fill(little, leave=8192)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: No space"):
        write_image(little / "a.png", rng.random((256, 256, 3)))
    assert (little / "a.png").read_bytes() == before and names(little) == ["a.png", "others"]


@pytest.mark.parametrize("numbers", [1, 100])
@pytest.mark.parametrize("leave", [0, 100_000, 900_000])
def test_a_checkpoint_that_does_not_fit_leaves_nothing(little, numbers, leave):
    """Whatever part of it is being written when the disk is full."""
    checkpoint.save({"step": 1}, little / "last.pt")
    fill(little, leave)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({"x": [torch.zeros(MIB // 4 // numbers) for _ in range(numbers)]}, little / "last.pt")
    assert checkpoint.load(little / "last.pt") == {"step": 1}
    assert names(little) == ["last.pt", "others"]


def test_links_in_a_circle_are_one_line_and_stay(tmp_path):
    path = tmp_path / "a.png"
    path.symlink_to(path)
    told = r"a\.png: cannot be written: Too many levels of symbolic links"
    with pytest.raises(UserError, match=told), disk.replacing(path):
        pytest.fail("nothing can be written there")
    assert path.is_symlink() and len(list(tmp_path.iterdir())) == 1
