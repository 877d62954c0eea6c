"""Sets and processes that don't fit: fewer images than processes, no held-out pairs, names that are no file's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dereflect import train_sirs
from dereflect.data import discover
from dereflect.data.folders import find_test_sets
from dereflect.data.loader import Loader
from dereflect.options import parse_train
from dereflect.util import program
from dereflect.util.distributed import join
from dereflect.util.run.folder import RunFolder
from dereflect.util.run.reader import read_metrics, read_run
from tests.faults.small import RECIPE, train_small
from tests.helpers import PHOTOGRAPHS, ROOT, arguments, errors, options_for, write_noise, write_pairs


def processes(count: int, data: Path, runs: Path, *more: str) -> list[int]:
    """Train the small network in several processes; their exit statuses."""
    given = arguments(data, runs, *RECIPE, "--nEpochs", "1", "--epoch_size", "8", *more)
    command = [sys.executable, "-m", "tests.faults.processes", str(count), str(runs / "log"), *given]
    more = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | more, stdout=subprocess.PIPE, text=True, timeout=100)
    return json.loads(done.stdout)


@pytest.fixture
def few(tmp_path) -> Path:
    """Four photographs, two real pairs of which one is held out, a test set of three images and one of one."""
    for i in range(4):
        write_noise(tmp_path / PHOTOGRAPHS / f"{i}.png", i, width=40, height=40)
    write_pairs(tmp_path / "train/real", "ab", width=40, height=40)
    write_pairs(tmp_path / "test/three", "abc", width=40, height=40)
    write_pairs(tmp_path / "test/one", "a", width=40, height=40)
    return tmp_path


@pytest.mark.parametrize("count", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_sets_with_fewer_images_than_processes(count, few, tmp_path):
    assert processes(count, few, tmp_path, "--name", "run", "--save_images") == [0] * count
    found = {line["set"]: line["count"] for line in read_metrics(tmp_path / "run") if line["estimate"] == "model"}
    assert found == {"val": 1, "one": 1, "three": 3, "average": 4}
    assert len(list((tmp_path / "run/images").rglob("*_t.png"))) == 5
    assert processes(count, few, tmp_path, "--name", "run", "--resume", "--nEpochs", "2") == [0] * count
    assert {line["epoch"] for line in read_metrics(tmp_path / "run") if line["set"] == "val"} == {0, 1, 2}


def test_a_loader_without_batches_is_still_a_loader(few):
    assert Loader([], [], options_for(few), 0) and len(Loader([], [], options_for(few), 0)) == 0


def test_trained_on_photographs_alone(tmp_path, small_network, capsys):
    for i in range(4):
        write_noise(tmp_path / PHOTOGRAPHS / f"{i}.png", i, width=40, height=40)
    status, folder = train_small(tmp_path, tmp_path / "runs", "--name", "run", "--nEpochs", "1")
    output = capsys.readouterr().out
    assert status == 0 and not (folder / "best.pt").exists() and "epoch 1:" not in output
    assert output.index("no best.pt is written, last.pt stands for it") < output.index("parameters")
    run = read_run(folder)
    assert run.is_finished and run.epochs_done == 1 and not run.problems and run.picked == (None, "")
    assert str(folder / "last.pt") in "\n".join(RunFolder(folder).describe())
    assert train_small(tmp_path, tmp_path / "runs", "--name", "run", "--nEpochs", "2", "--resume")[0] == 0
    assert read_run(folder).epochs_done == 2


def test_what_picks_the_best_epoch_is_missed_only_where_it_is_missing(few):
    def told(*given: str) -> bool:
        return "no best.pt" in "\n".join(discover(options_for(few, *given)).missing)

    assert told("--val_split", "0") and not told() and not told("--val_split", "0", "--best_by", "test")


def test_sets_and_images_with_the_longest_names(few, tmp_path, small_network):
    name = "t" * 255
    for place in ("one", "two"):
        write_pairs(few / "test" / place / name, ["i" * 251], width=40, height=40)
    status, folder = train_small(few, tmp_path / "runs", "--name", "run", "--nEpochs", "1", "--save_images")
    sets = {line["set"] for line in read_metrics(folder)}
    assert status == 0 and {f"one-{name}", f"two-{name}"} <= sets
    assert len(list((folder / "panels").iterdir())) == 5 and len(list((folder / "images").rglob("*_r.png"))) == 7
    assert RunFolder(folder).panel(f"one-{name}").exists()


def test_held_out_pairs_of_one_name_are_told_apart(tmp_path, small_network):
    for place in ("real", "nature"):
        write_pairs(tmp_path / "train" / place, "12", width=40, height=40)
    status, folder = train_small(tmp_path, tmp_path / "runs", "--name", "run", "--nEpochs", "1", "--save_images")
    names = {path.name[:-6] for path in (folder / "images/val").glob("*_t.png")}
    assert status == 0 and len(names) == 2 and {name.partition("-")[0] for name in names} == {"real", "nature"}


def test_a_test_set_right_in_the_folder_of_test_sets(tmp_path):
    write_pairs(tmp_path / "test", "a")
    write_pairs(tmp_path / "test/inner/test", "a")
    assert sorted(find_test_sets(tmp_path / "test")) == ["inner-test", "test"]


@pytest.mark.parametrize(
    ("variable", "value", "model", "refused"),
    [
        ("SCAN_BACKEND", "triton", "mdsrnet_xs", True),
        ("SCAN_BACKEND", "mistyped", "mdsrnet_xs", True),
        ("PASSES_BACKEND", "mistyped", "dsrnet_xs", True),
        ("SCAN_BACKEND", "triton", "dsrnet_xs", False),
    ],
)
def test_a_backend_of_the_environment_that_cannot_run(
    variable, value, model, refused, few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(variable, value)
    if not refused:  # the model has no scan
        train_sirs.choose_backends(parse_train(arguments(few, tmp_path, "--inet", model)), join([]))
        return
    given = arguments(few, tmp_path / "runs", "--inet", model, "--name", "run")
    assert program.run(train_sirs.main, given) == 2
    assert f"{variable} {value}: " in errors(capsys)
    assert not (tmp_path / "runs").exists()
