"""Checkpoints that are cut short, damaged, of something else or hostile; and what a resumed run makes of them."""

import os
import pickle
import random
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from models.arch import create_model
from tests.faults.small import outcome, train_small
from tests.helpers import arguments, same
from tools import evaluate, infer, replay
from train_sirs import main
from util import program
from util.errors import UserError
from util.run import checkpoint, resume

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


def flipped(data: bytes, bit: int) -> bytes:
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


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


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.fixture
def run(finished, tmp_path, small_network) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def _rewritten(path: Path, **change: object) -> None:
    checkpoint.save(checkpoint.load(path) | change, path)


def _without(path: Path, key: str) -> None:
    checkpoint.save({name: value for name, value in checkpoint.load(path).items() if name != key}, path)


DAMAGES = {
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), "cut short or damaged"),
    "flipped": (lambda path: path.write_bytes(flipped(path.read_bytes(), 8 * 3000)), "cut short or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("not found"), "not a readable checkpoint"),
    "model": (lambda path: _rewritten(path, inet="dsrnet_m"), "a checkpoint of dsrnet_m"),
    "shapes": (lambda path: _rewritten(path, network=create_model("dsrnet_s").state_dict()), "not this network's"),
    "version": (lambda path: _rewritten(path, format=99), "later version"),
    "weights only": (lambda path: _without(path, "optimizer"), "no usable optimizer"),
    "code": (lambda path: torch.save({"x": Malicious()}, path), "not a readable checkpoint"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious())), "not a readable checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_falls_back_to_the_checkpoint_before(run, finished, tiny_data, capsys, damage):
    harm, told = DAMAGES[damage]
    harm(run / "last.pt")
    damaged = (run / "last.pt").read_bytes()
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    output = capsys.readouterr()
    assert told in output.out and f"{run}/last.pt" in output.out and f"{run}/previous.pt" in output.out
    assert "executed" not in output.out + output.err
    assert (run / "refused.pt").read_bytes() == damaged
    (run / "refused.pt").unlink()
    assert same(outcome(run), outcome(finished))


@pytest.mark.parametrize("damage", ["flipped", "code", "model"])
def test_without_a_whole_one_resuming_is_refused(run, tiny_data, capsys, monkeypatch, damage):
    harm, told = DAMAGES[damage]
    for name in ("last.pt", "previous.pt"):
        harm(run / name)
    before = {path: path.read_bytes() for path in run.glob("*.pt")}
    given = arguments(tiny_data, run.parent, "--inet", "small", "--ema", "0.9", "--name", "run", "--resume")
    assert program.run(main, given) == 2
    output = capsys.readouterr()
    assert output.err.count(told) == 2 and "previous.pt" in output.err and "Traceback" not in output.err
    assert "executed" not in output.out + output.err
    assert {path: path.read_bytes() for path in run.glob("*.pt")} == before


def test_a_resumed_run_reads_and_checks_its_checkpoint_once(run, tiny_data, monkeypatch):
    calls = {"read": 0, "finite": 0}

    def count(name: str, plain):
        def call(*given):
            calls[name] += 1
            return plain(*given)

        return call

    monkeypatch.setattr(checkpoint, "load", count("read", checkpoint.load))
    monkeypatch.setattr(checkpoint, "check_finite", count("finite", checkpoint.check_finite))
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    assert calls == {"read": 1, "finite": 2}, "the weights, and their moving average"


def test_resume_takes_the_one_before_where_a_kill_has_left_only_that(run, finished, tiny_data):
    (run / "last.pt").unlink()
    (run / ".tmp-epoch_009.pt").write_bytes(b"half of it")
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    assert same(outcome(run), outcome(finished))


def test_tools_execute_nothing(tmp_path, tiny_data, capsys):
    bad, picture = tmp_path / "bad.pt", next((tiny_data / "test").rglob("*.png"))
    torch.save({"network": {"weight": Malicious()}, "inet": "dsrnet_s", "options": {}}, bad)
    (tmp_path / "best.pt").write_bytes(bad.read_bytes())
    assert program.run(replay.main, [str(bad)]) == 2
    assert program.run(infer.main, [str(picture), "--checkpoint", str(bad), "-o", str(tmp_path / "out")]) == 2
    assert program.run(evaluate.main, [str(bad), "--base_dir", str(tiny_data)]) == 2
    output = capsys.readouterr()
    assert output.err.count(str(bad)) == 3 and "executed" not in output.out + output.err


def test_old_checkpoints_go_when_the_new_one_is_safe(tiny_data, tmp_path, small_network, monkeypatch):
    more = ("--name", "run", "--epoch_size", "1", "--keep", "2")
    status, folder = train_small(tiny_data, tmp_path, "--nEpochs", "3", *more)
    assert status == 0
    assert sorted(path.name for path in folder.glob("epoch_*.pt")) == ["epoch_002.pt", "epoch_003.pt"]
    plain = torch.save

    def full(state, file):
        if "epoch_" in file.name:
            raise OSError(28, "No space left on device")
        plain(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"epoch_004\.pt: cannot be written: No space left"):
        train_small(tiny_data, tmp_path, "--nEpochs", "4", *more, "--resume")
    assert sorted(path.name for path in folder.glob("*epoch_*.pt")) == ["epoch_002.pt", "epoch_003.pt"]


@pytest.mark.parametrize("seed", range(3))
def test_records_that_a_kill_has_cut_are_repaired(run, finished, tiny_data, seed):
    """Of the second epoch's, whose evaluation is repeated."""
    state = checkpoint.load(run / "previous.pt")
    assert (state["epoch"], state["step"]) == (1, 3)
    (run / "last.pt").unlink()
    rng = random.Random(seed)
    metrics = (run / "metrics.jsonl").read_bytes()
    first = metrics.index(b'{"epoch": 2')
    (run / "metrics.jsonl").write_bytes(metrics[: rng.randrange(first, len(metrics))])
    for path in (run / "per_image/epoch_002.csv", run / "panels/val.png"):
        os.truncate(path, rng.randrange(path.stat().st_size))
    events = next(run.glob("events.*"))
    os.truncate(events, events.stat().st_size - rng.randrange(1, 200))
    (run / "options.yaml").write_bytes(b"")
    (run / "panels/.tmp-val.png").write_bytes(b"half")
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    assert same(outcome(run), outcome(finished))


def test_records_of_a_first_evaluation_are_repaired_in_their_order(tiny_data, tmp_path, small_network):
    """The untouched input's lines, of epoch 0, included."""
    more = ("--nEpochs", "1", "--name", "run")
    run = train_small(tiny_data, tmp_path, *more)[1]
    whole = outcome(run)
    for count in range(len(whole["metrics"])):
        checkpoint.save(checkpoint.load(run / "epoch_001.pt") | {"epoch": 0, "step": 3, "best": None}, run / "last.pt")
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:count]))
        assert train_small(tiny_data, tmp_path, *more, "--resume")[0] == 0
        assert outcome(run)["metrics"] == whole["metrics"], count


@pytest.mark.parametrize("length", [5, 70, 100])
def test_an_evaluation_by_itself_repairs_the_table_that_a_kill_has_cut(run, finished, tiny_data, length, capsys):
    """But for the held-out pairs, which it doesn't look for, and which haven't changed therefore."""
    table = run / "per_image/epoch_002.csv"
    os.truncate(table, length)
    assert train_small(tiny_data, run.parent, "--name", "run", "--nEpochs", "0", "--resume")[0] == 0
    lines = (finished / "per_image/epoch_002.csv").read_text().splitlines()
    assert table.read_text().splitlines() == [line for line in lines if not line.startswith("val,")]
    assert "files" not in capsys.readouterr().out


def test_a_damaged_line_costs_no_other(run, tiny_data):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"epoch", b"\xffpoch")
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:3] + lines[4:])


def test_points_of_a_run_that_was_killed_before_its_first_checkpoint_are_not_doubled(
    tiny_data, tmp_path, small_network
):
    more = ("--nEpochs", "1", "--name", "run")
    run = train_small(tiny_data, tmp_path, *more)[1]
    curve = outcome(run)["curve"]
    for path in run.glob("*.pt"):
        path.unlink()
    assert train_small(tiny_data, tmp_path, *more, "--resume", "auto")[0] == 0
    assert len(curve) == 3 and outcome(run)["curve"] == curve


def test_events_of_a_run_whose_clock_was_set_back_come_last(run, finished, tiny_data, monkeypatch):
    shutil.copy(run / "epoch_001.pt", run / "last.pt")
    (run / "previous.pt").unlink()
    monkeypatch.setattr("util.run.record.time.time", lambda: 1e9)
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume")[0] == 0
    assert len(list(run.glob("events.*"))) == 2
    assert outcome(run)["curve"] == outcome(finished)["curve"]


def resumed(data: Path, run: Path, *more: str) -> int:
    return train_small(data, run.parent, "--name", "run", "--nEpochs", "3", "--resume", *more)[0]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--lr", "2e-4"), "--lr was 0.0001, now it is 0.0002"),
        (("--batchSize", "3"), "--batchSize was 1, now it is 3"),
        (("--crop_size", "16"), "--crop_size was 32, now it is 16"),
        (("--seed", "7"), "--seed was 2018, now it is 7"),
    ],
)
def test_options_that_make_another_run_of_it_are_refused(run, tiny_data, option, told, capsys):
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match="--resume force") as error:
        resumed(tiny_data, run, *option)
    assert told in str(error.value) and "nEpochs" not in str(error.value)
    assert (run / "last.pt").read_bytes() == before and not (run / "lock").exists()
    assert train_small(tiny_data, run.parent, "--name", "run", "--nEpochs", "3", *option, "--resume", "force")[0] == 0
    assert told in capsys.readouterr().out


def test_a_forced_weight_decay_is_the_one_that_acts(run, tiny_data):
    assert (
        train_small(tiny_data, run.parent, "--name", "run", "--nEpochs", "3", "--wd", "0.5", "--resume", "force")[0]
        == 0
    )
    assert checkpoint.load(run / "last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_harmless_options_are_told(run, tiny_data, capsys):
    assert resumed(tiny_data, run, "--nThreads", "1", "--log_every", "2", "--comment", "further") == 0
    told = capsys.readouterr().out
    for line in ("--nThreads was 0, now it is 1", "--log_every was 1, now it is 2", "--nEpochs was 2, now it is 3"):
        assert f"changed since the run was saved: {line}" in told
    for own in ("--name", "--comment", "--resume"):  # each start has its own
        assert f"{own} was" not in told


def test_a_smaller_batch_with_more_accumulation_is_the_same_run():
    def identity(**options):
        return {"options": options, "samples_per_step": 4, "data": {}, "code": {}}

    was, now = identity(batchSize=4, accumulate=1), identity(batchSize=2, accumulate=2)
    harmless, serious = resume.differences(was, now)
    assert len(harmless) == 2 and serious == []
    assert len(resume.differences(was, identity(batchSize=2, accumulate=1))[1]) == 1
    cosine, more = identity(nEpochs=2, scheduler="cosine"), identity(nEpochs=3, scheduler="cosine")
    assert resume.differences(cosine, more)[1] == ["--nEpochs was 2, now it is 3"], "it would change the rate"


def test_changed_data_is_told_and_refused(run, tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    assert resumed(data, run) == 0
    assert "--base_dir was" in capsys.readouterr().out, "the same files elsewhere are the same data"
    test = next((data / "test").rglob("blended")).parent
    for layer in test.iterdir():
        next(iter(sorted(layer.iterdir()))).unlink()
    assert train_small(data, run.parent, "--name", "run", "--nEpochs", "4", "--resume")[0] == 0
    assert f"test set {test.name}: there were" in capsys.readouterr().out
    pair = next(iter(sorted((data / "train/real/blended").iterdir())))
    pair.write_bytes(pair.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"pairs.*files, as before, but with other names or sizes"):
        train_small(data, run.parent, "--name", "run", "--nEpochs", "5", "--resume")


def test_a_changed_program_is_told(run, tiny_data, capsys):
    state = checkpoint.load(run / "last.pt")
    assert {"torch", "engine.py", "models/losses.py", "data/synthesis.py", "util/disk.py", "util/run/resume.py"} <= (
        state["code"].keys()
    )
    _rewritten(run / "last.pt", code=state["code"] | {"engine.py": "other", "models/gone.py": "x"})
    assert resumed(tiny_data, run) == 0
    assert "the program isn't the same: engine.py, models/gone.py" in capsys.readouterr().out
