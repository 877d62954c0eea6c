"""The training loop: what it records, that it resumes bit for bit, how it stops."""

import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dereflect.engine import Diverged, Engine
from dereflect.models.arch import create_model
from dereflect.options import parse_train, train_parser
from dereflect.tools import replay
from dereflect.train_sirs import main, train
from dereflect.util import evaluation, program
from dereflect.util.errors import UserError
from dereflect.util.images import read_image
from dereflect.util.optim import learning_rate, parameter_groups
from dereflect.util.published import AVERAGED_SETS
from dereflect.util.run import checkpoint
from dereflect.util.run.reader import best as best_line
from dereflect.util.run.reader import read_metrics, read_run, table
from dereflect.util.run.record import Record
from tests.helpers import ROOT, arguments, run, same, state_of, wait_for_writes

SETS = {"val", "demo_clip", "demo_screen", "average"}


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    """The folder of a run of four epochs, with everything switched on."""
    status, folder = run(tiny_data, tmp_path_factory.mktemp("runs"), *FULL, "--nEpochs", "4", "--name", "four")
    assert status == 0
    return folder


FULL = ("--ema", "0.9", "--grad_clip", "1", "--accumulate", "2", "--batchSize", "1", "--save_every", "2", "--guard")
FULL += ("--eval_batch", "3", "--save_images", "--cache_images", "0.001", "--checkpoint_activations", "--log_norms")


def test_records_of_a_run(finished):
    lines = read_metrics(finished)
    assert {(line["epoch"], line["set"]) for line in lines if line["estimate"] == "model"} == {
        (epoch, name) for epoch in range(1, 5) for name in SETS
    }
    assert {line["set"] for line in lines if line["estimate"] == "input"} == SETS
    assert sum(line["estimate"] == "input" for line in lines) == len(SETS), "the input is measured once"
    for line in lines:
        assert set(line) == {"epoch", "step", "set", "estimate", "count", "PSNR", "SSIM", "LMSE", "NCC", "seconds"}
        assert all(math.isfinite(line[metric]) for metric in ("PSNR", "SSIM", "LMSE", "NCC"))
    clip, screen, average = (
        next(line for line in lines if line["set"] == name and line["epoch"] == 4)
        for name in ("demo_clip", "demo_screen", "average")
    )
    assert average["count"] == clip["count"] + screen["count"] == 8
    weighted = (clip["count"] * clip["PSNR"] + screen["count"] * screen["PSNR"]) / 8
    assert average["PSNR"] == pytest.approx(weighted)
    assert average["step"] == 8, "four epochs of four samples, two a step"


def test_every_image_is_recorded(finished):
    with (finished / "per_image/epoch_003.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = {(line["set"], line["estimate"]): line for line in read_metrics(finished) if line["epoch"] in (0, 3)}
    for name in ("demo_clip", "demo_screen"):
        values = [row for row in rows if row["set"] == name]
        assert len({row["name"] for row in values}) == len(values) == 4
        mean = sum(float(row["PSNR"]) for row in values) / 4
        assert mean == pytest.approx(lines[name, "model"]["PSNR"], abs=1e-5)
        mean = sum(float(row["input_SSIM"]) for row in values) / 4
        assert mean == pytest.approx(lines[name, "input"]["SSIM"], abs=1e-5)


def test_tensorboard_has_curves_panels_and_options(finished):
    events = EventAccumulator(str(finished), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    for tag in ("t_pixel", "r_pixel", "vgg", "exclusion", "reconstruction", "total"):
        assert f"train/loss_{tag}" in tags["scalars"]
    for tag in ("train/lr", "train/gradient_norm", "speed/images_per_second", "speed/peak_memory_GiB", "PSNR/val"):
        assert tag in tags["scalars"]
    total = events.Scalars("train/loss_total")
    assert [point.step for point in total] == [2, 4, 6, 8]
    parts = sum(
        events.Scalars(f"train/loss_{t}")[0].value for t in ["t_pixel", "r_pixel", "vgg", "exclusion", "reconstruction"]
    )
    assert total[0].value == pytest.approx(parts, rel=1e-5)
    assert "activation_rms/unet.middle.0" in tags["scalars"] and "gradient_norm/unet.middle.0" in tags["scalars"]
    waited = events.Scalars("speed/seconds_waited_for_data")
    assert all(0 < point.value < 60 for point in waited)
    assert len(events.Images("panels/demo_clip")) == 4
    assert "options/text_summary" in tags["tensors"] and "custom_scalars__config__" in tags["tensors"]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    drawn = [[tag for tag in tags["scalars"] if any(re.match(regex, tag) for regex in chart.multiline.tag)]
             for category in layout.category for chart in category.chart if chart.title == "PSNR, dB"]  # fmt: skip
    pairs = [{f"PSNR/{name}", f"PSNR/{name}/input"} for name in ("average", "val", "demo_clip", "demo_screen")]
    assert list(map(set, drawn)) == [pairs[0], pairs[1], set().union(*pairs)]
    line = next(line for line in read_metrics(finished) if line["set"] == "demo_clip" and line["estimate"] == "input")
    untouched = [point.value for point in events.Scalars("PSNR/demo_clip/input")]
    assert untouched == pytest.approx([line["PSNR"]] * 4), "a level line beside the network's"
    kinds = {tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in
             events.PluginTagToContent("hparams").items()}  # fmt: skip
    given = kinds["_hparams_/session_start_info"].session_start_info.hparams
    assert given["ema"].number_value == 0.9 and given["inet"].string_value == "dsrnet_xs" and "gpu_ids" not in given
    shown = [info.name.tag for info in kinds["_hparams_/experiment"].experiment.metric_infos]
    assert "PSNR/average" in shown and "PSNR/average" in tags["scalars"] and "_hparams_/session_end_info" in kinds


def test_a_tracker_gets_options_and_figures(tiny_data, tmp_path, monkeypatch):
    calls = []
    stub = types.SimpleNamespace(
        init=lambda **given: calls.append(("init", given)) or stub,
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)
    assert (
        run(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "2", "--tracker", "trackio", "--name", "t")[0] == 0
    )
    (_, given), *logs, end = calls
    assert given["name"] == "t" and given["config"]["nEpochs"] == 1 and end == ("finish",)
    assert any("PSNR/average" in values for _, _, values in logs) and any("train/lr" in v for _, _, v in logs)


def test_a_tracker_that_is_not_there_is_told(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(tiny_data, tmp_path, "--nEpochs", "1", "--tracker", "wandb")


def test_files_of_a_run(finished):
    written = yaml.safe_load((finished / "options.yaml").read_text())
    assert written["ema"] == 0.9 and "comment" not in written and "resume" not in written
    (start,) = map(json.loads, (finished / "starts.jsonl").read_text().splitlines())
    assert start["comment"] == "a test" and start["name"] == "four" and start["torch"] == torch.__version__
    assert (finished / "panels/demo_clip.png").stat().st_size > 1000
    names = sorted(path.name for path in finished.glob("*.pt"))
    assert names == ["best.pt", "epoch_002.pt", "epoch_004.pt", "good.pt", "last.pt", "previous.pt"]
    pictures = sorted(path.name for path in (finished / "images/demo_clip").iterdir())
    assert pictures == [f"{number:02}_{layer}.png" for number in range(4) for layer in "rt"]
    assert read_image(finished / "images/demo_clip/00_t.png").shape == (40, 52, 3)
    assert "optimizer" not in checkpoint.load(finished / "best.pt")
    scores = {line["epoch"]: line["PSNR"] for line in read_metrics(finished) if line["set"] == "val" and line["epoch"]}
    best = checkpoint.load(finished / "best.pt")
    assert best["best"] == max(scores.values()) == scores[best["epoch"]]


def test_two_and_two_epochs_equal_four(finished, tiny_data, tmp_path):
    assert run(tiny_data, tmp_path, *FULL, "--nEpochs", "2", "--name", "twice")[0] == 0
    status, folder = run(tiny_data, tmp_path, *FULL, "--nEpochs", "4", "--name", "twice", "--resume")
    assert status == 0
    assert same(state_of(folder), state_of(finished))
    without_time = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]
    assert without_time == [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(finished)]


@pytest.mark.parametrize(("before", "steps_left"), [(1, 1), (2, 0)])
def test_resuming_with_another_batch_goes_on_at_the_same_sample(
    finished, tiny_data, tmp_path, before, steps_left, monkeypatch
):
    """Two steps of `before` samples are done; what is left of the epoch's four comes in steps of two."""
    monkeypatch.setattr(Engine, "_evaluate_all", lambda self, epoch: None)
    (tmp_path / "other").mkdir()
    state = checkpoint.load(finished / "last.pt") | {"epoch": 3, "step": 2, "samples_per_step": before}
    checkpoint.save(state, tmp_path / "other/last.pt")
    steps_of_two = (*FULL, "--accumulate", "1", "--batchSize", "2", "--nEpochs", "4", "--name", "other", "--resume")
    status, folder = run(tiny_data, tmp_path, *steps_of_two)
    assert status == 0
    assert checkpoint.load(folder / "last.pt")["global_step"] == state["global_step"] + steps_left


def test_a_finished_run_says_so_and_how_to_go_on(finished, tiny_data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "four")
    status, folder = run(tiny_data, tmp_path, *FULL, "--nEpochs", "4", "--name", "four", "--resume")
    told = capsys.readouterr().out
    assert status == 0 and "it is finished: --nEpochs is 4; a larger one trains on" in told
    scores = {line["epoch"]: line["PSNR"] for line in read_metrics(folder) if line["set"] == "val" and line["epoch"]}
    top = max(scores, key=scores.get)
    assert f"best: epoch {top}, with {scores[top]:.2f} dB on the held-out pairs (val)" in told


def start(data_folder: Path, runs: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train_sirs.py", *arguments(data_folder, runs, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_mid_epoch_and_resumed_equals_undisturbed(tiny_data, tmp_path):
    settings = ("--nEpochs", "2", "--epoch_size", "6", "--save_steps", "1")
    whole = run(tiny_data, tmp_path, *settings, "--name", "whole")[1]
    process = start(tiny_data, tmp_path, *settings, "--name", "killed")
    wait_for_writes(tmp_path / "killed/last.pt", process, 3)
    process.kill()
    process.communicate()
    state = checkpoint.load(tmp_path / "killed/last.pt")
    assert (state["epoch"], state["step"]) < (2, 0)
    status, folder = run(tiny_data, tmp_path, *settings, "--name", "killed", "--resume")
    assert status == 0
    assert same(state_of(folder), state_of(whole))


def test_a_signal_to_the_program_saves_and_exits(tiny_data, tmp_path):
    """A real one, to a process with a worker; tests/faults/test_signals.py has every signal, at every point."""
    number = signal.SIGTERM
    process = start(tiny_data, tmp_path, "--nEpochs", "50", "--save_steps", "1", "--name", "stopped", "--nThreads", "1")
    wait_for_writes(tmp_path / "stopped/last.pt", process, 2)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    last = output.strip().splitlines()[-1]
    assert number.name in last and "--resume" in last and "Traceback" not in output
    assert checkpoint.load(tmp_path / "stopped/last.pt")["global_step"] > 0


def test_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    from dereflect.models import losses

    monkeypatch.setattr(losses, "exclusion_loss", lambda t, r: t.sum() * math.nan)
    status, folder = run(tiny_data, tmp_path, "--nEpochs", "1", "--name", "nan", "--batchSize", "2")
    assert status == 1
    told = capsys.readouterr().err
    saved = checkpoint.load(next(folder.glob("nonfinite_*.pt")))
    assert len(saved["names"]) == 2 and all(name in told for name in saved["names"])
    assert saved["batch"]["mixture"].shape == (2, 3, 32, 32) and math.isnan(saved["terms"]["exclusion"])
    assert "network" in saved and Diverged.__name__ not in told
    assert program.run(replay.main, [str(next(folder.glob("nonfinite_*.pt")))]) == 0
    told = capsys.readouterr().out
    assert saved["names"][0] in told and "exclusion nan" in told and "unet.decoders.1.0" in told
    assert program.run(replay.main, [str(folder / "last.pt")]) == 2


def test_every_option_is_read(tiny_data, tmp_path, monkeypatch):
    read: set[str] = set()

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    parsed = parse_train(arguments(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "2"))
    assert train(Spy(**vars(parsed))) == 0
    before_training = {"config", "list_models", "help"}  # read by parse_train and by main
    options = {action.dest for action in train_parser()._actions}
    assert options - read - before_training == set()


def test_evaluation_only(finished, tiny_data, tmp_path):
    status, folder = run(
        tiny_data, tmp_path, "--nEpochs", "0", "--weight_path", str(finished / "last.pt"), "--name", "e"
    )
    assert status == 0
    ours, theirs = (
        {
            line["set"]: line["PSNR"]
            for line in read_metrics(path)
            if line["estimate"] == "model" and line["epoch"] == at
        }
        for path, at in ((folder, 0), (finished, 4))
    )
    assert ours["demo_clip"] == pytest.approx(theirs["demo_clip"], abs=1e-6), "the moving average is what is loaded"
    assert not list(folder.glob("*.pt"))


def test_evaluating_again_replaces_the_record(finished, tiny_data, tmp_path):
    shutil.copytree(finished, tmp_path / "four")
    assert run(tiny_data, tmp_path, *FULL, "--nEpochs", "0", "--resume", "--name", "four")[0] == 0
    before, after = (
        {(line["epoch"], line["set"], line["estimate"]): line["PSNR"] for line in read_metrics(folder)}
        for folder in (finished, tmp_path / "four")
    )
    assert len(read_metrics(tmp_path / "four")) == len(after)
    assert after == before


def test_a_second_run_of_a_name_gets_a_folder_of_its_own(finished, tiny_data, capsys):
    status, _ = run(
        tiny_data, finished.parent, "--nEpochs", "0", "--weight_path", str(finished / "best.pt"), "--name", "four"
    )
    assert status == 0
    assert (finished.parent / "four-2/metrics.jsonl").exists()
    assert "four-2" in capsys.readouterr().out


def test_resuming_what_is_not_there_names_what_is(finished, tiny_data):
    with pytest.raises(UserError, match="four"):
        run(tiny_data, finished.parent, "--name", "fuor", "--resume")


@pytest.mark.parametrize(("change", "told"), [({"inet": "dsrnet_m"}, "dsrnet_m"), ({"format": 99}, "later version")])
def test_checkpoint_of_something_else_is_refused(finished, tiny_data, tmp_path, change, told):
    (tmp_path / "other").mkdir()
    checkpoint.save(checkpoint.load(finished / "last.pt") | change, tmp_path / "other/last.pt")
    with pytest.raises(UserError, match=told):
        run(tiny_data, tmp_path, *FULL, "--name", "other", "--resume")


def test_unknown_model_is_one_line_and_leaves_nothing(tmp_path, tiny_data, capsys):
    given = arguments(tiny_data, tmp_path / "runs", "--inet", "dsrnet_xl")
    assert program.run(main, given) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error:") and "dsrnet_s" in message and "\n" not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(tiny_data, tmp_path):
    settings = ("--nEpochs", "1", "--epoch_size", "8", "--lr", "1e-4", "--optimizer", "adam", "--name")
    one = run(tiny_data, tmp_path, *settings, "one", "--batchSize", "2")[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_sirs.py"]
    command += arguments(tiny_data, tmp_path, *settings, "two", "--batchSize", "1")
    subprocess.run(command, cwd=ROOT, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    a, b = (checkpoint.load(tmp_path / name / "last.pt")["network"] for name in ("one", "two"))
    for key in a:
        # Four steps of Adam, each of at most the learning rate; rounding may turn the smallest gradients.
        assert (a[key] - b[key]).abs().mean() < 4e-5, key
    counts = {(line["set"], line["count"]) for line in read_metrics(tmp_path / "two") if line["epoch"]}
    assert counts == {(line["set"], line["count"]) for line in read_metrics(one) if line["epoch"]}
    psnr = [
        next(line["PSNR"] for line in read_metrics(tmp_path / name) if line["set"] == "average" and line["epoch"])
        for name in ("one", "two")
    ]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.05)


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_ends_as_an_undisturbed_one(tiny_data, tmp_path):
    settings = arguments(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "14", "--save_steps", "1")

    def command(name: str) -> list[str]:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
        return [sys.executable, *launch, "train_sirs.py", *settings, "--resume", "auto", "--name", name]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    subprocess.run(command("whole"), cwd=ROOT, env=environment, check=True, timeout=240)
    process = subprocess.Popen(command("killed"), cwd=ROOT, env=environment)
    try:
        wait_for_writes(tmp_path / "killed/last.pt", process, 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
    whole, killed = (state_of(tmp_path / name) for name in ("whole", "killed"))
    assert same(whole, killed)


def test_learning_rate_follows_the_schedules():
    options = argparse.Namespace(scheduler="cosine_iter", lr=1e-4, lr_min=1e-5, period=300)
    rates = [learning_rate(step, options, 10_000) for step in range(1201)]
    assert rates[0] == rates[600] == rates[1200] == 1e-4
    assert rates[300] == pytest.approx(1e-5) and rates[150] == pytest.approx(5.5e-5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    published = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=1e-4), 300, 1e-5)
    for rate in rates[:599]:
        assert rate == pytest.approx(published.get_last_lr()[0], rel=1e-3)
        published.optimizer.step()
        published.step()
    options.scheduler = "cosine"
    assert learning_rate(0, options, 1000) == 1e-4 and learning_rate(1000, options, 1000) == pytest.approx(1e-5)
    options.scheduler = "none"
    assert learning_rate(123, options, 1000) == 1e-4


def test_decay_is_for_weights_of_convolutions_and_linear_layers():
    net = create_model("dsrnet_s")
    decayed, others = parameter_groups(net, 0.01)
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0
    decayed_ids = {id(p) for p in decayed["params"]}
    for name, parameter in net.named_parameters():
        is_weight = name.endswith(".weight") and "norm" not in name
        assert (id(parameter) in decayed_ids) == is_weight, name
    assert len(decayed["params"]) + len(others["params"]) == len(list(net.parameters()))


def test_the_untouched_input_is_measured_once_in_a_run(tiny_data, tmp_path, monkeypatch):
    measured = []
    plain = evaluation.quality_assess
    monkeypatch.setattr(evaluation, "quality_assess", lambda *images: measured.append(images) or plain(*images))
    folder = run(tiny_data, tmp_path, "--nEpochs", "2", "--epoch_size", "2", "--name", "twice")[1]
    first, second = ((folder / f"per_image/epoch_00{epoch}.csv").read_text().splitlines() for epoch in (1, 2))
    images = len(first) - 1
    assert images >= 9 and len(measured) == 3 * images, "the model's twice, the input's once"
    assert [line.split(",")[6:] for line in first] == [line.split(",")[6:] for line in second]


def test_published_average_is_weighted_by_counts(tmp_path):
    options = argparse.Namespace(comment="")
    record = Record(tmp_path, options, 0, 0)
    for number, (name, count) in enumerate(zip((*AVERAGED_SETS, "other"), (20, 200, 199, 55, 100), strict=True)):
        values = dict.fromkeys(("PSNR", "SSIM", "LMSE", "NCC"), float(number))
        rows = [{"name": str(i), "model": values, "input": values} for i in range(count)]
        record.evaluation(1, 10, name, rows, 1.0)
    record.averages(1, 10)
    record.close()
    lines = {line["set"]: line for line in read_metrics(tmp_path) if line["estimate"] == "model"}
    assert lines["average_published"]["count"] == 474 and lines["average"]["count"] == 574
    assert lines["average_published"]["PSNR"] == pytest.approx((200 + 2 * 199 + 3 * 55) / 474)
    assert "average_published" in table(read_metrics(tmp_path))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    line = {"epoch": 1, "step": 4, "set": "val", "estimate": "model", "count": 2}
    line |= {"PSNR": 20.0, "SSIM": 0.9, "LMSE": 0.1, "NCC": 0.9, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"epoch": 2, "st')
    assert read_metrics(tmp_path) == [line]


def test_data_problems_are_told_before_anything_is_created(tiny_data, tmp_path):
    (tmp_path / "data/test/mine/blended").mkdir(parents=True)
    (tmp_path / "data/test/mine/transmission_layer").mkdir()
    (tmp_path / "data/test/mine/blended/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png"):
        run(tmp_path / "data", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.cuda
def test_two_and_two_epochs_equal_four_on_a_gpu(tiny_data, tmp_path):
    settings = ("--gpu_ids", "0", "--precision", "bf16", "--crop_size", "96", "--batchSize", "2")
    four = run(tiny_data, tmp_path, *settings, "--nEpochs", "4", "--name", "four")[1]
    run(tiny_data, tmp_path, *settings, "--nEpochs", "2", "--name", "twice")
    twice = run(tiny_data, tmp_path, *settings, "--nEpochs", "4", "--name", "twice", "--resume")[1]
    assert same(state_of(twice), state_of(four))


def test_the_weights_that_a_training_starts_from_are_epoch_0_and_may_stay_the_best(finished, tiny_data, tmp_path):
    start = finished / "best.pt"
    more = ("--weight_path", str(start), "--nEpochs", "1", "--epoch_size", "2", "--lr", "0.02", "--name", "worse")
    status, folder = run(tiny_data, tmp_path, *more)
    assert status == 0
    lines = read_metrics(folder)
    assert {line["epoch"] for line in lines if line["estimate"] == "model"} == {0, 1}
    before, after = (next(x for x in lines if x["set"] == "val" and x["epoch"] == e) for e in (0, 1))
    score = next(x for x in lines if x["set"] == "val" and x["epoch"] == 0 and x["estimate"] == "model")["PSNR"]
    assert before["estimate"] == "input" and score > after["PSNR"]
    best, given = checkpoint.load(folder / "best.pt"), checkpoint.load(start)
    same(best["network"], given["ema"])
    assert "  epoch 0  " in table(lines) and best_line(read_run(folder)).startswith("best: epoch 0, with ")
    assert max(map(len, table(lines).splitlines())) <= 100 and f"{score:.2f} /" in table(lines)
