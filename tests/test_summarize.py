"""The leaderboard: its figures are those of the runs, whatever state these are in."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from dereflect.options import parse_train
from dereflect.tools import summarize
from dereflect.util import program
from dereflect.util.published import AVERAGED_SETS
from dereflect.util.run.reader import find_runs, read_metrics, read_run
from dereflect.util.run.record import Record

ROOT = Path(__file__).parent.parent
COUNTS = {"val": 2, "mine": 3, "other": 5}


def leave(folder: Path, scores: dict[int, dict[str, float]], *arguments: str) -> None:
    """What a run with these PSNRs of each epoch and set leaves; its SSIM is a hundredth of them."""
    options = parse_train(["--base_dir", ".", "--name", folder.name, *arguments])
    record = Record(folder, options, 0, 0)
    for epoch, sets in scores.items():
        for name, psnr in sets.items():
            row = {"PSNR": psnr, "SSIM": psnr / 100, "LMSE": 0.1, "NCC": 0.9}
            untouched = dict.fromkeys(row, 0.5)
            count = COUNTS.get(name, 4)
            record.evaluation(epoch, epoch, name, [{"name": "a", "model": row, "input": untouched}] * count, 1.0)
        record.averages(epoch, epoch)
    record.close()


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three runs of two epochs; the first one's validation and test sets disagree on the best epoch."""
    folder = tmp_path / "runs"
    leave(folder / "a", {1: {"val": 22, "mine": 20, "other": 24}, 2: {"val": 21, "mine": 30, "other": 30}},
          "--comment", "plain", "--nEpochs", "2")  # fmt: skip
    leave(folder / "deep/b", {1: {"val": 20, "mine": 25, "other": 25}}, "--lr", "3e-4", "--if_align", "--nEpochs", "3")
    leave(
        folder / "c", {1: {"mine": 27}, 2: {"mine": 26}}, "--val_split", "0", "--nEpochs", "2", "--mix", "1", "0", "0"
    )
    return folder


def rows_of(runs: Path, tmp_path: Path, *arguments: str) -> dict[str, dict]:
    assert program.run(summarize.main, [str(runs), "--json", str(tmp_path / "out.json"), *arguments]) == 0
    return {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}


def test_figures_are_those_of_the_picked_epoch(runs, tmp_path):
    rows = rows_of(runs, tmp_path)
    a = rows["a"]
    assert (a["epoch"], a["picked_by"], a["best_by_test"]["epoch"]) == (1, "val", 2)
    lines = {(line["set"], line["epoch"]): line for line in read_metrics(runs / "a") if line["estimate"] == "model"}
    for name in ("mine", "other"):
        assert a["sets"][name]["PSNR"] == lines[name, 1]["PSNR"]
        assert a["sets"][name]["SSIM"] == lines[name, 1]["SSIM"]
    assert a["average"]["PSNR"] == pytest.approx((3 * 20 + 5 * 24) / 8)
    assert a["best_by_test"]["PSNR"] == pytest.approx(30)
    assert a["val"]["PSNR"] == 22 and a["status"] == "finished" and a["epochs"] == 2
    assert rows["deep/b"]["status"] == "unfinished" and rows["deep/b"]["epochs_wanted"] == 3
    c = rows["c"]
    assert (c["epoch"], c["picked_by"], c["average"]["PSNR"]) == (2, "last", 26), "no test set picks an epoch"


def test_seeds_are_one_row_with_mean_and_spread(runs, tmp_path, capsys):
    for seed, psnr in ((1, 20.0), (2, 22.0), (3, 27.0)):
        leave(runs / f"s{seed}", {1: {"mine": psnr, "other": 2 * psnr}}, "--nEpochs", "1", "--seed", str(seed))
    leave(runs / "s4", {1: {"mine": 40}}, "--nEpochs", "2", "--seed", "4")  # unfinished
    leave(runs / "lr", {1: {"mine": 40}}, "--nEpochs", "1", "--seed", "5", "--lr", "1e-3")  # another recipe
    rows = rows_of(runs, tmp_path, "--over_seeds")
    assert set(rows) == {"a", "deep/b", "c", "s1, s2, s3", "s4", "lr"}
    merged = rows["s1, s2, s3"]
    assert merged["seed"] == "1, 2, 3" and rows["s4"]["seed"] == 4
    assert merged["sets"]["mine"] == {"PSNR": 23, "SSIM": pytest.approx(0.23), "count": 3, "spread": 13**0.5}
    assert merged["sets"]["other"]["spread"] == pytest.approx(2 * 13**0.5)
    assert rows["a"]["average"]["spread"] is None
    assert "23.00 +- 3.61 / 0.230" in capsys.readouterr().out
    assert set(rows_of(runs, tmp_path)) == {"a", "deep/b", "c", "s1", "s2", "s3", "s4", "lr"}


def test_every_start_is_recorded_and_the_latest_comment_shown(tmp_path):
    runs = tmp_path / "runs"
    for more in (["--comment", "first"], ["--comment", "second", "--resume"], ["--resume"]):
        leave(runs / "a", {1: {"mine": 20}}, *more)
    run = read_run(runs / "a")
    assert [(start.get("comment"), start.get("resume")) for start in run.starts] == [
        ("first", None), ("second", "must"), (None, "must"),
    ]  # fmt: skip
    assert rows_of(runs, tmp_path)["a"]["comment"] == "second"
    assert not {"comment", "resume", "config", "name", "checkpoints_dir"} & set(run.options)


def test_the_comment_of_a_run_of_an_older_version_stays(tmp_path):
    """It kept the latest start in options.yaml alone."""
    runs = tmp_path / "runs"
    leave(runs / "a", {1: {"mine": 20}})
    (runs / "a/starts.jsonl").unlink()
    old = (
        "# 'as it was', started 2026-01-02 03:04:05, torch 2.11, Linux\ncomment: as it was\nnEpochs: 25\nresume: must\n"
    )
    (runs / "a/options.yaml").write_text(old)
    row = rows_of(runs, tmp_path)["a"]
    assert (row["comment"], row["started"]) == ("as it was", "2026-01-02 03:04:05")
    leave(runs / "a", {2: {"mine": 21}}, "--resume")
    assert rows_of(runs, tmp_path)["a"]["comment"] == "as it was"
    assert read_run(runs / "a").starts[0]["torch"] == "2.11"


def test_what_is_kept_of_a_run_is_no_recipe(tmp_path):
    """Runs that differ in their seed and in options that train nothing else are one over their seeds."""
    runs = tmp_path / "runs"
    others = [], ["--save_every", "1", "--keep", "3"], ["--skip_bad_images", "--log_every", "5", "--nThreads", "0"]
    for seed, more in enumerate(others):
        leave(runs / f"s{seed}", {1: {"mine": 20 + seed}}, "--nEpochs", "1", "--seed", str(seed), *more)
    assert {row["recipe"] for row in rows_of(runs, tmp_path).values()} == {""}
    assert set(rows_of(runs, tmp_path, "--over_seeds")) == {"s0, s1, s2"}


def test_sorted_by_the_picked_epochs_average(runs, tmp_path, capsys):
    assert list(rows_of(runs, tmp_path)) == ["c", "deep/b", "a"]
    assert list(rows_of(runs, tmp_path, "--sort", "best_by_test")) == ["a", "c", "deep/b"]
    assert list(rows_of(runs, tmp_path, "--sort", "other")) == ["deep/b", "a", "c"], "c has no such set"
    assert list(rows_of(runs, tmp_path, "--sort", "name")) == ["a", "c", "deep/b"]
    assert program.run(summarize.main, [str(runs), "--sort", "nothing"]) == 2
    assert "best_by_test" in capsys.readouterr().err


def test_recipe_is_what_differs_from_the_defaults(runs, tmp_path):
    rows = rows_of(runs, tmp_path)
    assert rows["a"]["recipe"] == ""
    assert rows["deep/b"]["recipe"] == "if_align=True, lr=0.0003"
    assert rows["c"]["recipe"] == "mix=1.0 0.0 0.0, val_split=0"


def test_a_demo_run_is_compared_with_the_demos_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = vars(parse_train(["--crop_size", "32"]))
    assert options["demo"] and summarize.recipe(options) == "demo, crop_size=32"


def test_the_published_average_has_a_column(tmp_path, capsys):
    leave(tmp_path / "runs/full", {1: dict.fromkeys(AVERAGED_SETS, 25.0) | {"mine": 10.0}})
    row = rows_of(tmp_path / "runs", tmp_path)["full"]
    assert row["published"]["PSNR"] == pytest.approx(25) and row["average"]["PSNR"] < 25
    head = capsys.readouterr().out
    assert max(map(len, head.splitlines())) <= 100
    assert "published average" in head and head.index("real20_420") < head.index("mine")


def test_what_is_broken_is_listed(runs, tmp_path, capsys):
    for name in ("empty", "half", "bytes", "odd"):
        leave(runs / name, {1: {"mine": 20}}, "--val_split", "0")
    (runs / "empty/metrics.jsonl").write_text("")
    half = (runs / "half/metrics.jsonl").read_text()
    (runs / "half/metrics.jsonl").write_text(half[:-30])
    (runs / "half/options.yaml").write_text("lr: [")
    (runs / "bytes/metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (runs / "odd/metrics.jsonl").write_text('[1]\n{"epoch": "one"}\nnull\n' + half)
    (runs / "odd/options.yaml").unlink()
    (runs / "alone").mkdir()
    (runs / "alone/last.pt").write_bytes(b"")
    (runs / "nothing").mkdir()
    rows = rows_of(runs, tmp_path)
    assert set(rows) == {"a", "deep/b", "c", "empty", "half", "bytes", "odd", "alone"}
    assert "nothing has been evaluated" in rows["empty"]["status"] and rows["empty"]["average"]["PSNR"] is None
    assert "options.yaml" in rows["half"]["status"] and "1 of 4 lines" in rows["half"]["status"]
    assert "metrics.jsonl" in rows["bytes"]["status"]
    assert "no options.yaml" in rows["odd"]["status"] and rows["odd"]["average"]["PSNR"] == 20
    assert list(rows)[-4:] == ["alone", "bytes", "empty", "half"], "without an average they come last"
    capsys.readouterr()


def test_an_epoch_cut_off_in_its_evaluation_is_not_picked(tmp_path):
    leave(tmp_path / "a", {1: {"val": 20, "mine": 25}, 2: {"val": 30, "mine": 26}})
    path = tmp_path / "a/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    run = read_run(tmp_path / "a")
    assert run.epochs == [1] and run.picked == (1, "val")


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path):
    leave(tmp_path / "a", {1: {"val": float("nan"), "mine": float("nan")}, 2: {"val": 12, "mine": 13}})
    rows = rows_of(tmp_path, tmp_path)
    assert rows["a"]["epoch"] == 2 == rows["a"]["best_by_test"]["epoch"]


def test_files_hold_the_same_and_hostile_texts_do_no_harm(runs, tmp_path, capsys):
    comment = 'x\x1b[31m |pipe| `tick` <script>alert(1)</script>\nnew "line", a'
    leave(runs / "hostile", {1: {"mine": 20}}, "--comment", comment, "--val_split", "0")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("markdown", "csv", "json")}
    arguments = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert program.run(summarize.main, [str(runs), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "x?[31m" in shown
    lines = files["markdown"].read_text().splitlines()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:6]}
    assert len(cells) == 1 and lines[6] == "", "no cell breaks its row"
    assert "<script>" not in files["markdown"].read_text()
    with files["csv"].open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    rows = {row["name"]: row for row in json.loads(files["json"].read_text())}
    assert table["hostile"]["comment"] == rows["hostile"]["comment"] == comment
    for name, row in rows.items():
        assert float(table[name]["average_PSNR"]) == row["average"]["PSNR"]
        assert table[name]["other_PSNR"] == str(row["sets"].get("other", {"PSNR": ""})["PSNR"])


def test_averages_of_different_images_are_not_passed_off_as_comparable(runs, tmp_path, capsys):
    summarize.main([str(runs)])
    told = capsys.readouterr().out
    assert "not of the same images" in told and "--if_align" in told
    leave(tmp_path / "like/a", {1: {"mine": 20}})
    leave(tmp_path / "like/b", {1: {"mine": 21}})
    summarize.main([str(tmp_path / "like")])
    told = capsys.readouterr().out
    assert "not of the same images" not in told and "--if_align" not in told


def test_hours_are_those_of_every_start(tmp_path):
    leave(tmp_path / "a", {1: {"mine": 20}})
    for path in (tmp_path / "a").glob("events*"):
        path.unlink()
    assert read_run(tmp_path / "a").hours is None
    for start, seconds in enumerate((1800, 900)):
        with SummaryWriter(tmp_path / "a", filename_suffix=str(start)) as writer:  # its own first record is of now
            writer.add_image("panel", np.zeros((3, 300, 300)), 0)
            writer.add_scalar("train/lr", 1.0, 1, walltime=time.time() + seconds)
    assert read_run(tmp_path / "a").hours == pytest.approx(0.75, abs=0.01)
    path = sorted((tmp_path / "a").glob("events*"))[0]
    path.write_bytes(path.read_bytes()[:-5])
    assert read_run(tmp_path / "a").hours == pytest.approx(0.25, abs=0.01), "a record that was cut off is left out"


def test_a_file_with_two_names_takes_its_space_once(tmp_path):
    leave(tmp_path / "a", {1: {"mine": 20}})
    (tmp_path / "a/last.pt").write_bytes(bytes(1000))
    before = read_run(tmp_path / "a").disk
    assert before == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    os.link(tmp_path / "a/last.pt", tmp_path / "a/good.pt")
    assert read_run(tmp_path / "a").disk == before


def test_what_is_not_there_is_one_line(tmp_path, capsys):
    assert program.run(summarize.main, [str(tmp_path / "nowhere")]) == 2
    assert program.run(summarize.main, [str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "nowhere" in errors[0] and "no run" in errors[1]
    leave(tmp_path / "a", {1: {"mine": 20}})
    assert program.run(summarize.main, [str(tmp_path), "--csv", str(tmp_path / "none/x.csv")]) == 2
    assert "--csv" in capsys.readouterr().err
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


@pytest.mark.parametrize("program", ["summarize", "report", "prepare_data", "model_info", "export"])
def test_help_is_quick_and_imports_nothing_heavy(program):
    code = f"import sys\nfrom tools import {program}\ntry: {program}.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'dereflect.models', 'dereflect.data') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "usage" in done.stdout


def test_runs_are_read_without_torch():
    """The leaderboard starts in a tenth of a second."""
    code = "import sys, dereflect.util.run.reader, dereflect.tools.summarize; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
