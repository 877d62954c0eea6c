"""A resumed run: from damaged checkpoints and records, and with what has changed since."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.train_sirs import main
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint, resume
from dereflect.util.run.record import Record
from tests.faults.small import outcome, train_small
from tests.helpers import Malicious, arguments, at_call, flipped, same

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


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
    assert len(whole["metrics"]) == 8, "of three sets and their average, the input and the model"
    for count in (0, 1, 2, 7):
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


class Killed(BaseException):
    """Ends a run where it is, as a kill does."""


@pytest.mark.parametrize(
    ("name", "call", "times"),
    [("panel", 1, 1), ("evaluation", 2, 2), ("averages", 1, 1), ("latest", 2, 1)],
    ids=["first set", "second set, twice", "averages", "after the last set"],
)
def test_points_of_an_evaluation_that_is_repeated_are_there_once(
    name, call, times, finished, tiny_data, tmp_path, small_network, monkeypatch
):
    def cut_off():
        raise Killed if name != "evaluation" else UserError("the disk is full")

    for number in range(times):
        with monkeypatch.context() as patched, pytest.raises((Killed, UserError)):
            at_call(patched, Record, name, call if not number else 1, cut_off)
            train_small(tiny_data, tmp_path, "--name", "run", *["--resume"][:number])
    assert train_small(tiny_data, tmp_path, "--name", "run", "--resume")[0] == 0
    assert same(outcome(tmp_path / "run"), outcome(finished))


def test_points_of_an_evaluation_by_itself_are_there_once(run, finished, tiny_data):
    assert train_small(tiny_data, run.parent, "--name", "run", "--resume", "--nEpochs", "0")[0] == 0
    assert same(outcome(run)["figures"], outcome(finished)["figures"])


def test_events_of_a_run_whose_clock_was_set_back_come_last(run, finished, tiny_data, monkeypatch):
    shutil.copy(run / "epoch_001.pt", run / "last.pt")
    (run / "previous.pt").unlink()
    monkeypatch.setattr("dereflect.util.run.record.time.time", lambda: 1e9)
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
