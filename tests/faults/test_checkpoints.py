"""Checkpoint files that are cut short, damaged, of something else or hostile, or whose writing is killed."""

import os
import resource
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from dereflect.tools import evaluate, infer, replay
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from tests.helpers import Malicious, flipped, same

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

STATE = {"format": 1, "a": torch.arange(15.0).reshape(3, 5), "n": {"w": torch.arange(7), "s": "text"}, "f": 0.25}


@pytest.fixture
def written(tmp_path) -> bytes:
    """A checkpoint's bytes."""
    checkpoint.save(STATE, tmp_path / "a.pt")
    return (tmp_path / "a.pt").read_bytes()


def notices(path: Path, data: bytes, load=checkpoint.load) -> bool:
    """Whether what was done to a file is found when it is loaded, or is without effect."""
    path.write_bytes(data)
    try:
        return same(load(path), STATE)
    except UserError as error:
        assert str(path) in str(error)
        return True


def test_flipped_bits_are_noticed(tmp_path, written):
    """Every 37th; by torch alone, many are not."""

    def torch_load(path):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise UserError(str(path)) from error

    bits = range(0, 8 * len(written), 37)
    unnoticed = [bit for bit in bits if not notices(tmp_path / "b.pt", flipped(written, bit))]
    assert unnoticed == []
    assert sum(not notices(tmp_path / "b.pt", flipped(written, bit), torch_load) for bit in bits) > 10


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(tmp_path, written):
    assert [b for b in range(8 * len(written)) if not notices(tmp_path / "b.pt", flipped(written, b))] == []


def test_files_cut_short_at_any_length_are_refused(tmp_path, written):
    for length in range(0, len(written), 7):
        (tmp_path / "b.pt").write_bytes(written[:length])
        with pytest.raises(UserError, match=r"b\.pt: "):
            checkpoint.load(tmp_path / "b.pt")


def test_foreign_files_without_checksums_are_loaded(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(checkpoint.load(tmp_path / "unchecked.pt"), STATE) and same(checkpoint.load(tmp_path / "old.pt"), STATE)
    checkpoint.save(STATE, tmp_path / "ours.pt")
    assert same(torch.load(tmp_path / "ours.pt", weights_only=True), STATE)


def test_one_that_would_unpack_to_more_than_it_is_is_refused(tmp_path, written):
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part) + bytes(10_000_000) * (part.filename == "archive/data/0"))
    with pytest.raises(UserError, match="more than it is"):
        checkpoint.load(tmp_path / "b.pt")


@pytest.mark.parametrize("limit", [0, 100, 1000, 1500, 10_000, 39_000])
def test_killed_while_a_checkpoint_is_written(tmp_path, limit):
    """By the kernel, as the file grows over so many bytes."""
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save({"step": 1}, path, previous)
    if not (pid := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoint.save({"step": 2, "x": torch.zeros(10_000)}, path, previous)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGXFSZ
    assert checkpoint.load(path) == {"step": 1} and not previous.exists()


def test_killed_between_any_two_calls_of_writing_a_checkpoint(tmp_path):
    """Before the first, between the first and the second ... until a child gets to the end."""
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    calls = [(os, "fsync"), (os, "link"), (os, "replace"), (os, "unlink"), (torch, "save")]
    stages = survived = 0
    while not survived:
        for file in tmp_path.iterdir():
            file.unlink()
        for step in (1, 2):
            checkpoint.save({"step": step}, path, previous)
        if not (pid := os.fork()):
            left = stages

            def or_die(plain):
                def call(*args, **kwargs):
                    nonlocal left
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return plain(*args, **kwargs)

                return call

            for owner, name in calls:
                setattr(owner, name, or_die(getattr(owner, name)))
            checkpoint.save({"step": 3}, path, previous)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        last, before = checkpoint.load(path)["step"], checkpoint.load(previous)["step"]
        assert (last, before) in {(2, 1), (2, 2), (3, 2)}, stages
        stages += 1
    assert stages > 7 and (last, before) == (3, 2)


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, plain=plain: calls.append(name) or plain(*given))
    checkpoint.save(STATE, tmp_path / "last.pt", tmp_path / "previous.pt")
    assert calls == ["fsync", "replace", "fsync"], "the file's content, its name, the folder"


def test_without_second_names_the_one_before_is_renamed(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2):
        checkpoint.save({"step": step}, path, previous)
    assert checkpoint.load(path) == {"step": 2} and checkpoint.load(previous) == {"step": 1}
    checkpoint.link(path, tmp_path / "good.pt")
    assert checkpoint.load(tmp_path / "good.pt") == {"step": 2}


def test_tools_execute_nothing(tmp_path, tiny_data, capsys):
    bad, picture = tmp_path / "bad.pt", next((tiny_data / "test").rglob("*.png"))
    torch.save({"network": {"weight": Malicious()}, "inet": "dsrnet_s", "options": {}}, bad)
    (tmp_path / "best.pt").write_bytes(bad.read_bytes())
    assert program.run(replay.main, [str(bad)]) == 2
    assert program.run(infer.main, [str(picture), "--checkpoint", str(bad), "-o", str(tmp_path / "out")]) == 2
    assert program.run(evaluate.main, [str(bad), "--base_dir", str(tiny_data)]) == 2
    output = capsys.readouterr()
    assert output.err.count(str(bad)) == 3 and "executed" not in output.out + output.err
