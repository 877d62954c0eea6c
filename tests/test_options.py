"""The command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dereflect import options
from dereflect.models.separator import load_separator
from dereflect.options import as_text, parse_train, presets
from dereflect.options.arguments import roles, train_parser
from dereflect.options.config import RECORDED
from dereflect.options.parser import Role
from tests.helpers import children_seconds

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A folder without ./dataset."""
    monkeypatch.chdir(tmp_path)


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys\nfrom dereflect import options\ntry: options.parse_train(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'dereflect.models', 'dereflect.data') if m in sys.modules])"
    began = children_seconds()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert children_seconds() - began < 1
    assert done.stdout.strip().endswith("[]")
    assert "--lambda_vgg" in done.stdout


def test_every_option_has_help_and_a_role():
    assert [a.dest for a in train_parser()._actions if not a.help] == []
    assert set(roles()) == set(vars(parse_train([]))), "an option without a role would be in no record"


def test_roles_decide_what_is_recorded_compared_and_exported():
    found = {role: {name for name, has in roles().items() if has is role} for role in Role}
    assert found[Role.START] == {"name", "comment", "checkpoints_dir", "resume", "config", "list_models"}
    assert found[Role.FROM] == {"weight_path"}
    assert found[Role.WHERE] == {"base_dir", "demo", "save_every", "keep", "save_steps", "save_images", "panels"}
    assert found[Role.HOW] == {
        "gpu_ids", "compile", "checkpoint_activations", "scan_backend", "passes_backend", "nThreads", "cache_images",
        "skip_bad_images", "log_every", "log_norms", "eval_batch", "tracker",
    }  # fmt: skip


def test_backends_are_those_there_are():
    from dereflect.models import passes, scan

    choices = {action.dest: set(action.choices or ()) for action in train_parser()._actions}
    assert choices["scan_backend"] == set(scan.BACKENDS)
    assert choices["passes_backend"] == set(passes.BACKENDS)


def test_published_command_runs_unchanged(tmp_path):
    (tmp_path / "dataset/reflection-removal").mkdir(parents=True)
    line = (
        "--lr 0.0001 --inet dsrnet_l --model dsrnet_model_sirs --dataset sirs_dataset --loss losses --name dsrnet_l "
        "--lambda_vgg 0.01 --lambda_rec 0.2 --if_align --seed 2018 --base_dir ./dataset/reflection-removal/"
    )
    parsed = parse_train(line.split())
    assert parsed.inet == "dsrnet_l" and parsed.if_align and not parsed.demo
    plain = vars(parse_train(["--inet", "dsrnet_l", "--if_align"]))
    assert {k: v for k, v in vars(parsed).items() if plain[k] != v} == {}, "the published values are the defaults"


def test_published_recipe_is_the_default(tmp_path):
    (tmp_path / "dataset/reflection-removal").mkdir(parents=True)
    parsed = vars(parse_train([]))
    wanted = {"batchSize": 1, "nEpochs": 25, "seed": 2018, "lr": 1e-4, "optimizer": "adamw", "wd": 1e-2}
    wanted |= {"scheduler": "cosine_iter", "period": 300, "lr_min": 1e-5, "crop_size": 224, "mix": [0.6, 0.2, 0.2]}
    wanted |= {"precision": "fp32", "grad_clip": 0, "ema": 0, "lambda_vgg": 0.01, "lambda_rec": 0.2}
    assert {key: parsed[key] for key in wanted} == wanted


def test_demo_where_there_is_no_data():
    parsed = parse_train(["--nEpochs", "7"])
    assert parsed.demo and parsed.vgg_weights == "random" and parsed.base_dir == options.DEMO_DATA
    assert parsed.nEpochs == 7, "the command line wins over the demo's schedule"


def test_demo_starts_from_the_box_unless_told_otherwise(tmp_path):
    given = parse_train(["--inet", "madsrnet_xs", "--batchSize", "3"])
    assert given.weight_path == options.PRETRAINED and given.lambda_vgg == 0 and given.batchSize == 3
    (tmp_path / "c.yaml").write_text("inet: madsrnet_xs\n")
    assert parse_train(["--config", "c.yaml"]).weight_path == options.PRETRAINED
    scratch = parse_train(["--inet", "madsrnet_xs", "--weight_path", "none"])
    assert scratch.weight_path is None and scratch.lr == parse_train([]).lr == 1e-3
    for elsewhere in (["--inet", "dsrnet_s"], ["--inet", "madsrnet_xs", "--base_dir", "."]):
        assert parse_train(elsewhere).weight_path is None


def test_config_gives_defaults_that_the_command_line_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 0.002\nnEpochs: 3\nif_align: true\nmix: [1, 0, 0]\nbase_dir: .\n")
    parsed = parse_train(["--config", "c.yaml", "--nEpochs", "4"])
    assert (parsed.lr, parsed.nEpochs, parsed.if_align, parsed.mix) == (0.002, 4, True, [1, 0, 0])
    assert parsed.base_dir == Path() and not parsed.demo


PUBLISHED = {
    "published-w": ("dsrnet_l", "adamw", 0, "cosine_iter", 25, [0.6, 0.2, 0.2]),
    "iccv": ("dsrnet_l", "adam", 0, "none", 20, [0.7, 0.3, 0]),
    "iccv-nature": ("dsrnet_l_nature", "adam", 0, "none", 20, [0.6, 0.2, 0.2]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_of_the_published_models_are_what_really_ran(name, tmp_path):
    (tmp_path / "dataset/reflection-removal").mkdir(parents=True)
    parsed = parse_train(["--config", name])
    keys = ("inet", "optimizer", "wd", "scheduler", "nEpochs", "mix")
    assert tuple(getattr(parsed, key) for key in keys) == PUBLISHED[name]
    assert (parsed.val_split, parsed.best_by, parsed.if_align) == (0, "test", True)
    assert (parsed.lr, parsed.batchSize) == (1e-4, 1)
    assert not parsed.demo and parsed.config == Path(name), "the record names it as it was typed"
    assert parse_train(["--config", name, "--inet", "mdsrnet_l", "--wd", "0.1"]).wd == 0.1, "the command line wins"


def test_presets_of_the_demo_and_of_the_bundled_weights(tmp_path):
    (tmp_path / "dataset/reflection-removal").mkdir(parents=True)
    demo = vars(parse_train(["--config", "demo", "--inet", "madsrnet_xs"]))
    assert demo["demo"] and demo["weight_path"] is None and demo["lr"] == 1e-3
    bundled = vars(parse_train(["--config", "demo-bundled"]))
    assert bundled["weight_path"] == options.PRETRAINED and bundled["lambda_l1"] == 0.6
    assert bundled["sizes"] == list(load_separator(gpu_ids=[]).sizes), "so that what goes on from them is used alike"
    (tmp_path / "dataset/reflection-removal").rmdir()
    assert {k for k, v in vars(parse_train(["--inet", "madsrnet_xs"])).items() if v != bundled[k]} == {"config"}
    assert parse_train(["--config", "bundled", "--base_dir", "."]).synthesis == "physical"


def test_presets_are_listed_and_a_file_is_named_by_its_path(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "iccv" in presets.names() and all(name in shown for name in presets.names())
    (tmp_path / "iccv").write_text("nEpochs: 3\n")
    assert parse_train(["--config", "iccv"]).nEpochs == 20
    assert parse_train(["--config", str(tmp_path / "iccv")]).nEpochs == 3


START = {"resume": "must", "name": "old", "comment": "before", "checkpoints_dir": "runs"}


@pytest.mark.parametrize("chosen", [RECORDED, Role], ids=["today's", "an older version's"])
def test_written_options_start_a_new_run_like_it(chosen, tmp_path):
    given = ["--inet", "dsrnet_m", "--base_dir", ".", "--lr", "3e-4", "--gpu_ids", "0,1"]
    first = parse_train([*given, *(f"--{key}={value}" for key, value in START.items())])
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(as_text(first, chosen)))
    second = vars(parse_train(["--config", "options.yaml"]))
    assert {k for k, v in second.items() if v != vars(first)[k]} == {"config", *START}
    assert (second["resume"], second["name"], second["comment"]) == (None, "dsrnet_m", "")


def test_a_config_of_ones_own_may_say_how_to_start(tmp_path):
    (tmp_path / "c.yaml").write_text("name: mine\nresume: auto\ncomment: of my own\n")
    parsed = parse_train(["--config", "c.yaml"])
    assert (parsed.name, parsed.resume, parsed.comment) == ("mine", "auto", "of my own")


@pytest.mark.parametrize("more", [[], ["--weight_path", "none"]], ids=["pretrained", "scratch"])
def test_options_of_a_demo_start_another_demo(more, tmp_path):
    first = parse_train(["--inet", "madsrnet_xs", *more])
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(as_text(first, RECORDED)))
    (tmp_path / "dataset/reflection-removal").mkdir(parents=True)  # meanwhile
    second = vars(parse_train(["--config", "options.yaml"]))
    assert second["demo"] and {k for k, v in second.items() if v != vars(first)[k]} == {"config"}
    assert not parse_train(["--config", "options.yaml", "--base_dir", "."]).demo


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--crop_size", "100"], "multiple of 16"),
        (["--max_scale", "0.5"], "at least 1"),
        (["--mix", "0", "0", "0"], "--mix"),
        (["--lr", "1e-6"], "--lr_min"),
        (["--lr", "nan"], "finite"),
        (["--batchSize", "0"], "at least 1"),
        (["--nEpochs", "-1"], "negative"),
        (["--ema", "1"], r"\[0, 1\)"),
        (["--weight_path", "nowhere.pt"], "nowhere.pt"),
        (["--base_dir", "nowhere"], "nowhere"),
        (["--vgg_weights", "nowhere.pth"], "nowhere.pth"),
        (["--name", "../x"], "plain folder name"),
        (["--nEpochs", "0"], "--weight_path"),
        (["--gpu_ids", "0,0"], "repeated"),
        (["--gpu_ids", "zero"], "zero"),
        (["--loss", "nowhere"], "models/nowhere.py"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "icv"], "--config icv: there is no such file; did you mean iccv\\?"),
        (["--nepochs", "3"], "there is no option --nepochs; did you mean --nEpochs\\?"),
        (["--batch-size=3"], "did you mean --batchSize\\?"),
        (["--zzz"], "there is no option --zzz; --help"),
        (["--nEpochs", "three"], "--nEpochs: 'three' is not a whole number"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--precision", "fp64"], "--precision: 'fp64' is not one of 'fp32', 'bf16', 'auto'"),
        (["--config", "bad.yaml"], "there is no option 'learning_rate'"),
        (["--config", "near.yaml"], "there is no option 'batch_size'; did you mean batchSize\\?"),
        (["--config", "worse.yaml"], "--lr"),
        (["--config", "list.yaml"], "option: value"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_created(arguments, told, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rate: 1\n")
    (tmp_path / "near.yaml").write_text("batch_size: 1\n")
    (tmp_path / "worse.yaml").write_text("lr: fast\n")
    (tmp_path / "list.yaml").write_text("- lr\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        parse_train(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(told, line)
    assert sorted(tmp_path.iterdir()) == before
