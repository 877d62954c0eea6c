"""tools/evaluate.py: the numbers are those of a training's record, whatever writes them."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from dereflect.options import parse_evaluate, parse_train
from dereflect.tools import evaluate, infer
from dereflect.train_sirs import train
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.evaluation import judge
from dereflect.util.images import read_image
from dereflect.util.metrics import load_lpips, quality_assess
from dereflect.util.published import AVERAGED_SETS, FIGURES, TEST_SETS
from dereflect.util.run.reader import METRICS, read_metrics


@pytest.fixture(scope="module")
def small(tiny_data, tmp_path_factory) -> Path:
    """Two test sets of two images, 52 x 40, and what a training needs."""
    folder = tmp_path_factory.mktemp("dataset") / "small"
    shutil.copytree(tiny_data, folder)
    for path in folder.glob("test/*/*/*.png"):
        if int(path.stem) > 1:
            path.unlink()
    return folder


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """The folder of a run of one epoch with --if_align and a moving average."""
    runs = tmp_path_factory.mktemp("runs")
    line = "--gpu_ids -1 --crop_size 32 --vgg_weights random --epoch_size 2 --nThreads 0 --nEpochs 1 --ema 0.5 "
    line += f"--if_align --panels 0 --eval_batch 2 --base_dir {small} --checkpoints_dir {runs} --name run"
    assert train(parse_train(line.split())) == 0
    return runs / "run"


def run(small: Path, finished: Path, *more: object) -> int:
    line = [finished / "last.pt", "--base_dir", small, "--gpu_ids", "-1", "--nThreads", "0", *more]
    return program.run(evaluate.main, [str(word) for word in line])


@pytest.fixture(scope="module")
def published(small, finished, tmp_path_factory) -> Path:
    """The folder of results of the published protocol."""
    folder = tmp_path_factory.mktemp("results") / "published"
    assert run(small, finished, "-o", folder) == 0
    return folder


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_protocol_is_what_the_training_recorded(finished, published):
    measured = {(row["estimate"], row["set"]): row for row in rows_of(published / "evaluation.csv")}
    lines = [line for line in read_metrics(finished) if line["set"] != "val" and line["epoch"] in (0, 1)]
    assert len(lines) == 6, "two sets and the average, input and model"
    assert len(measured) == 12 and {"gamma 1.2", "times 0.9"} < {estimate for estimate, _ in measured}
    for line in lines:
        estimate = "input" if line["estimate"] == "input" else str(finished / "last.pt")
        row = measured[estimate, line["set"]]
        assert int(row["images"]) == line["count"]
        for metric in METRICS:
            assert float(row[metric]) == pytest.approx(line[metric], abs=1e-6)
    assert measured[str(finished / "last.pt"), "average"]["inet"] == "dsrnet_s"
    assert measured[str(finished / "last.pt"), "average"]["epoch"] == "1"


def test_every_image_is_written(finished, published):
    recorded = {(row["set"], row["name"]): row for row in rows_of(finished / "per_image/epoch_001.csv")}
    images = rows_of(published / "per_image.csv")
    assert len(images) == 4
    for row in images:
        for column in (*METRICS, *(f"input_{metric}" for metric in METRICS)):
            assert float(row[column]) == pytest.approx(float(recorded[row["set"], row["name"]][column]), abs=2e-6)


def test_results_in_words(published, finished):
    text = (published / "evaluation.md").read_text()
    whole = json.loads((published / "evaluation.json").read_text())
    assert "WARNING: these are not the published test sets" in text and "demo_clip" in text
    assert "real20_420 is missing" in text and "demo_clip, demo_screen are none of them" in text
    assert whole["protocol"] == "published" and whole["warnings"][0] in text
    first = next(line for line in whole["measured"] if line["estimate"] == "input" and line["set"] == "demo_clip")
    assert re.search(rf"\| input \| {first['PSNR']:.2f} / {first['SSIM']:.3f} \|", text)
    assert "| DSRNet | 24.23 / 0.820 | 26.28 / 0.914 |" in text and "Wild (55) | average (474)" in text
    assert "28.76 / -" in text
    assert whole["published"]["RDNet"]["average_published"] == [26.65, 0.917]
    assert f"{finished / 'last.pt'} (dsrnet_s)" in text


def test_native_protocol_measures_what_is_saved(small, finished, tmp_path, monkeypatch, capsys):
    assert run(small, finished, "-o", tmp_path, "--protocol", "native", "--tile", "64", "--overlap", "32") == 0
    assert "the published figures were measured by --protocol published" in capsys.readouterr().out
    folder = small / "test/demo_clip"
    arguments = [folder / "blended", "-o", tmp_path / "t", "--checkpoint", finished / "last.pt", "--gpu_ids", "-1"]
    assert infer.main([str(word) for word in [*arguments, "--tile", "64", "--overlap", "32"]]) == 0
    images = [row for row in rows_of(tmp_path / "per_image.csv") if row["set"] == "demo_clip"]
    assert [row["name"] for row in images] == ["00", "01"]
    for row in images:
        made = np.asarray(Image.open(tmp_path / f"t/{row['name']}_behind_glass.png"), np.float64)
        target = read_image(folder / f"transmission_layer/{row['name']}.png") * 255
        for metric, value in quality_assess(made, target).items():
            assert float(row[metric]) == pytest.approx(value, abs=1e-6)
        joint = peak_signal_noise_ratio(target, made, data_range=255)
        assert float(row["PSNR_joint"]) == pytest.approx(joint, abs=1e-4)  # of float32 images


def test_parameters_that_are_silenced(small, finished, tmp_path, capsys):
    assert run(small, finished, "-o", tmp_path / "whole") == 0
    assert run(small, finished, "-o", tmp_path / "part", "--silence", "unet.*") == 0
    assert re.search(r"\d+ of \d+ parameters set to 0", capsys.readouterr().out)
    whole, part = ([row["PSNR"] for row in rows_of(tmp_path / name / "per_image.csv")] for name in ("whole", "part"))
    assert len(whole) == len(part) == 4 and whole != part
    assert run(small, finished, "--silence", "nothing.*") == 2
    assert "--silence nothing.*: no parameter of dsrnet_s has such a name" in capsys.readouterr().err


def test_several_checkpoints_and_lpips(small, finished, tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.shape == b.shape and a.ndim == 4 and float(a.min()) >= -1 and float(b.max()) <= 1
            return (a - b).abs().mean().reshape(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    line = [finished / "last.pt", finished / "best.pt", "--base_dir", small, "--max_dataset_size", "1", "-o", tmp_path]
    assert program.run(evaluate.main, [*map(str, line), "--gpu_ids=-1", "--nThreads=0"]) == 0
    rows = rows_of(tmp_path / "evaluation.csv")
    checkpoints = [str(finished / f"{name}.pt") for name in ("last", "best")]
    baselines = ["input", "gamma 1.2", "times 0.9"]
    assert {row["estimate"] for row in rows} == {*baselines, *checkpoints}
    assert [row["estimate"] for row in rows[::3]][:3] == baselines
    assert all(row["images"] == "1" for row in rows if row["set"] != "average")
    assert all(float(row["LPIPS"]) > 0 for row in rows)
    assert "worse / LPIPS" in (tmp_path / "evaluation.md").read_text()


def test_lpips_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_lpips(torch.device("cpu")) == (None, "LPIPS is left out: pip install lpips.")

    def fail(**_):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=fail))
    assert "weights can't be had (no network)" in load_lpips(torch.device("cpu"))[1]


def test_an_image_is_judged_by_structure_and_harm():
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 200, (16, 16, 3))
    mixture = 0.5 * target + 60 + rng.uniform(0, 20, target.shape)
    estimates = {
        "input": mixture,
        "darker": 0.6 * mixture,
        "clean": target,
        "worse": mixture + 30 * rng.random((16, 16, 3)),
    }
    found = judge(estimates, target)
    assert found["darker"]["PSNR_aligned"] == pytest.approx(found["input"]["PSNR_aligned"])
    assert found["clean"]["PSNR_aligned"] == found["clean"]["PSNR_joint"] == 100
    assert found["worse"]["PSNR_aligned"] < found["input"]["PSNR_aligned"]
    assert [found[kind]["worse"] for kind in ("input", "clean", "worse")] == [0, 0, 1]
    assert found["clean"]["gain"] == pytest.approx(100 - found["input"]["PSNR_joint"])


def test_means_medians_and_shares():
    rows = [{"gain": gain, "worse": float(gain < -0.1)} for gain in (-1.0, 0.0, 4.0)]
    lines = {line.set: line.values for line in evaluate.summarise("x", "", None, {"a": rows, "b": rows[2:]})}
    assert lines["a"] == {"worse": pytest.approx(1 / 3), "median_gain": 0.0}
    assert lines["average"] == {"worse": pytest.approx(1 / 4), "median_gain": 2.0}


def test_clean_photographs_are_compared_with_themselves(small, finished, tmp_path, capsys):
    photographs = small / "test/demo_clip/transmission_layer"
    assert run(small, finished, "--clean", photographs, "--strength", "0") == 0
    text = capsys.readouterr().out
    assert "PSNR_joint of clean photographs (2)" in text
    assert re.search(r"last\.pt +100\.0 +100\.0$", text, re.MULTILINE), "nothing is removed"
    assert re.search(r"gamma 1\.2 +\d\d\.\d ", text)
    (tmp_path / "empty").mkdir()
    assert run(small, finished, "--clean", tmp_path / "empty") == 2
    assert "no photograph in it" in capsys.readouterr().err


def test_published_sets_are_told_from_others():
    counts = {name: TEST_SETS[name].images for name in AVERAGED_SETS}
    assert evaluate.doubts(counts, "published") == evaluate.doubts(counts | {"Nature": 20}, "published") == []
    assert "real20_420 has 19 images instead of 20" in evaluate.doubts(counts | {"real20_420": 19}, "published")[0]
    assert "mine is none of them" in evaluate.doubts(counts | {"mine": 3}, "published")[0]


def test_averages_count_images():
    rows = {name: [{"PSNR": float(i), "gain": 0.0}] * TEST_SETS[name].images for i, name in enumerate(AVERAGED_SETS)}
    lines = {
        line.set: line for line in evaluate.summarise("x", "", None, rows | {"Nature": [{"PSNR": 9.0, "gain": 1}] * 20})
    }
    assert lines["average_published"].count == 474 and lines["average"].count == 494
    assert lines["average_published"].values["PSNR"] == pytest.approx((200 + 2 * 199 + 3 * 55) / 474)
    assert "average_published" not in {
        line.set for line in evaluate.summarise("x", "", None, {"Nature": rows["real20_420"]})
    }


def test_published_averages_follow_from_their_sets():
    """Of those networks that this project rebuilds; to the rounding of the figures."""
    counts = [TEST_SETS[name].images for name in AVERAGED_SETS]
    for name in ("DSRNet", "M2DSRNet", "MXDSRNet", "DSRNet-W"):
        *sets, average = FIGURES[name]
        assert np.average([psnr for psnr, _ in sets], weights=counts) == pytest.approx(average[0], abs=0.011), name


def test_what_cannot_be_measured(small, finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", finished) == 2
    assert "there isn't a test set" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        line = evaluate.Line("x", "", None, "s", 1, {"PSNR": 1.0})
        row = {"checkpoint": "x", "set": "s", "name": "1", "model": {"PSNR": 1.0}, "input": {"PSNR": 1.0}}
        options = SimpleNamespace(output=tmp_path / "file", base_dir=small, protocol="native")
        evaluate.write(options, [line], [row], [], "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.pt", "--base_dir", "."], "nowhere.pt"),
        (["w.pt", "--base_dir", "nowhere"], "nowhere"),
        (["w.pt"], "--base_dir"),
        (["w.pt", "--base_dir", ".", "--protocol", "other"], "--protocol"),
        (["w.pt", "--base_dir", ".", "--tile", "64"], "only with --protocol native"),
    ],
)
def test_usage_errors(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("w.pt").touch()
    with pytest.raises(SystemExit) as stop:
        parse_evaluate(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
