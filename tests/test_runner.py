"""runner.sh: how it calls train_sirs.py, and what it refuses."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.project import RECORDER

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def published(model: str, comment: str, ids: str) -> list[str]:
    return ["--inet", model, "--name", model, f"--comment={comment}", "--if_align", "--gpu_ids", ids]


# How train_sirs.py is called


def test_one_gpu_is_device_0_of_those_visible(project):
    call = project.call("1", "dsrnet_l", "first try")
    assert call["program"] is None  # the file itself, not through torchrun
    assert call["arguments"] == published("dsrnet_l", "first try", "0")
    assert call["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert call["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert call["environment"]["PYTHONUNBUFFERED"] == "1"


def test_cpu_hides_all_gpus(project):
    project.nvidia_smi("#!/bin/sh\nexit 9\n")
    call = project.call("cpu", "dsrnet_s", "x")
    assert call["arguments"] == published("dsrnet_s", "x", "-1")
    assert call["environment"]["CUDA_VISIBLE_DEVICES"] == ""


def test_mps_needs_no_nvidia_gpu(project):
    project.nvidia_smi("#!/bin/sh\nexit 9\n")
    assert project.call("mps", "dsrnet_s", "x")["arguments"] == published("dsrnet_s", "x", "0")


def test_several_gpus_go_through_torchrun(project):
    package = project.root / "torch" / "distributed"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "run.py").write_text(RECORDER)
    call = project.call("12,0", "dsrnet_l", "two", "--batchSize", "2")
    assert call["program"] == "torch.distributed.run"
    assert call["arguments"] == [
        "--standalone",
        "--nproc_per_node=2",
        "train_sirs.py",
        *published("dsrnet_l", "two", "0,1"),
        "--batchSize",
        "2",
    ]
    assert call["environment"]["CUDA_VISIBLE_DEVICES"] == "12,0"


@pytest.mark.parametrize(
    "comment",
    [
        "two  blanks ",
        'it\'s "quoted"',
        "$HOME `id` $(id) \\n",
        "*",
        "-5 dB",
        "a=b;c|d&",
        "twice\nlines",
        "Größe",
    ],
)
def test_the_comment_arrives_as_typed(project, comment):
    assert f"--comment={comment}" in project.call("cpu", "dsrnet_s", comment)["arguments"]


@pytest.mark.parametrize("options", [[], [""], ["--nEpochs", "3"], ["--help"]])
def test_the_comment_may_be_left_out(project, options):
    arguments = project.call("cpu", "dsrnet_s", *options)["arguments"]
    assert arguments == [*published("dsrnet_s", "", "-1"), *(option for option in options if option)]


def test_further_options_come_last_and_as_typed(project):
    options = ["--lr", "0.0002", "--name", "my run", "--base_dir", "/data/a b", "--config", ""]
    assert project.call("cpu", "dsrnet_s", "x", *options)["arguments"][-len(options) :] == options


def test_help_after_the_comment_is_for_train_sirs(project):
    assert project.call("cpu", "dsrnet_s", "x", "--help")["arguments"][-1] == "--help"


def test_it_works_in_its_own_folder_and_says_so(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Path(project.call("cpu", "dsrnet_s", "x", cwd=elsewhere)["folder"]).samefile(project.root)
    assert "Working in" in project.run("cpu", "dsrnet_s", "x", cwd=elsewhere).stderr
    assert "Working in" not in project.run("cpu", "dsrnet_s", "x").stderr


def test_python_takes_the_place_of_the_shell(project):
    """So that signals sent to the runner reach the training."""
    with subprocess.Popen(
        ["bash", "runner.sh", "cpu", "dsrnet_s", "x"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert json.loads(process.communicate()[0].splitlines()[-1])["pid"] == process.pid


def test_the_exit_status_is_that_of_the_training(project):
    (project.root / "train_sirs.py").write_text(RECORDER + "    sys.exit(7)\n")
    assert project.run("cpu", "dsrnet_s", "x").returncode == 7


def test_a_log_file_gets_no_terminal_codes(project):
    done = project.run("cpu", "dsrnet_s", "x")
    assert not set("\x1b\r") & set(done.stdout + done.stderr)


def test_through_a_link(project, tmp_path):
    (tmp_path / "elsewhere/bin").mkdir(parents=True)
    (tmp_path / "elsewhere/run").symlink_to(project.root / "runner.sh")
    (tmp_path / "elsewhere/bin/again").symlink_to("../run")
    done = subprocess.run(
        ["bash", str(tmp_path / "elsewhere/bin/again"), "cpu", "dsrnet_s", "x"],
        cwd=tmp_path,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout.splitlines()[-1])["folder"]).samefile(project.root)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "GPU and MODEL are missing"),
        (["0"], "MODEL is missing"),
    ],
)
def test_missing_arguments(project, arguments, missing):
    line = project.refuse(*arguments)
    assert missing in line
    assert "for example: ./runner.sh" in line


@pytest.mark.parametrize("model", ["dsrnet_x", "dsrnet", "dsrnet_.", "", "-v"])
def test_an_unknown_model_gets_the_list(project, model):
    line = project.refuse("cpu", model, "x")
    assert line.endswith(f"there is no model '{model}'; there are: dsrnet_s, dsrnet_l, mdsrnet_l")


def test_models_that_cannot_be_listed(project):
    (project.root / "train_sirs.py").write_text("raise SystemExit('broken')\n")
    done = project.run("cpu", "dsrnet_s", "x")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "broken",
        "runner.sh: train_sirs.py could not list its models (see above)",
    ]


@pytest.mark.parametrize(("gpu", "index"), [("2", "2"), ("0,3", "3"), ("00", "00")])
def test_an_unknown_gpu_gets_the_list(project, gpu, index):
    assert project.refuse(gpu, "dsrnet_s", "x").endswith(
        f"there is no GPU {index} here; there are: 0 (NVIDIA H100 80GB HBM3), 1 (NVIDIA A100-SXM4-40GB), 12 (NVIDIA T4)"
    )


@pytest.mark.parametrize("gpu", ["", "gpu0", "-1", "0,", ",0", "0,,1", "0 1", "cpu,0", "1.0"])
def test_a_malformed_gpu(project, gpu):
    assert f"'{gpu}' is not a GPU" in project.refuse(gpu, "dsrnet_s", "x")


def test_a_gpu_named_twice(project):
    assert "GPU 1 is named twice in 1,0,1" in project.refuse("1,0,1", "dsrnet_s", "x")


def test_no_gpu_at_all(project):
    project.nvidia_smi("#!/bin/sh\necho 'NVIDIA-SMI has failed' ; exit 9\n")
    assert "no NVIDIA GPU found here" in project.refuse("0", "dsrnet_s", "x")


def test_nvidia_smi_is_not_installed(project):
    project.only("sed")
    line = project.refuse("0", "dsrnet_s", "x")
    assert line.endswith("no NVIDIA GPU found here (nvidia-smi -L lists none); use cpu")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_comes_before_any_installation(project, option):
    (project.root / "tools" / "environment.sh").unlink()
    project.environment["PYTHON"] = "no-such-python"
    done = project.run(option)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith('usage: ./runner.sh GPU MODEL ["COMMENT"]')
    assert "nohup ./runner.sh 1 mdsrnet_l" in done.stdout
    assert "tensorboard --logdir checkpoints" in done.stdout
