"""mamba-container.sh, with stand-ins for docker and nvidia-smi."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_runner import executable

ROOT = Path(__file__).parent.parent
# Keeps what it was called with and what it was given to build; has the images that were built.
DOCKER = """#!/bin/sh
echo "$@" >>"$LOG"
case $1 in
info) exit ${DOCKER_INFO:-0} ;;
image) [ -e "$LOG.$3" ] ;;
build) cat >"$LOG.recipe" && touch "$LOG.$3" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("mamba-container.sh", "requirements.txt", "requirements-cuda.txt"):
        shutil.copy(ROOT / name, project)
    executable(tmp_path / "bin/docker", DOCKER)
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 9.0\necho 8.6\necho 9.0\n")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": f"{tmp_path}/log"}

    def call(*command: str, **more: str) -> subprocess.CompletedProcess:
        script = str(project / "mamba-container.sh")
        return subprocess.run(
            ["bash", script, *command], env=environment | more, cwd=tmp_path, capture_output=True, text=True
        )

    return call


def test_builds_once_for_the_gpus_here_and_starts_the_command(call, tmp_path):
    for _ in range(2):
        done = call("./runner.sh", "0", "mdsrnet_l", "in a container")
        assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert sum(line.startswith("build") for line in log) == 1
    assert log[-1].startswith("run --rm --gpus all") and log[-1].endswith("./runner.sh 0 mdsrnet_l in a container")
    assert f"--volume {tmp_path}/a project:/workspace/sirs" in log[-1]
    recipe = (tmp_path / "log.recipe").read_text()
    assert 'TORCH_CUDA_ARCH_LIST="8.6;9.0"' in recipe and "MAMBA_KEEP_CUDA_BUILD=TRUE" in recipe


def test_other_requirements_are_another_image(call, tmp_path):
    call()
    with (tmp_path / "a project/requirements-cuda.txt").open("a") as file:
        file.write("# changed\n")
    call()
    log = (tmp_path / "log").read_text().splitlines()
    assert sum(line.startswith("build") for line in log) == 2
    assert log[-1].endswith(" bash")


def test_a_folder_with_the_data_is_seen_as_dataset(call, tmp_path):
    (tmp_path / "sirs").mkdir()
    assert call(DATASET="sirs").returncode == 2  # relative to the project, where it isn't
    assert call(DATASET=f"{tmp_path}/sirs").returncode == 0
    assert f"--volume {tmp_path}/sirs:/workspace/sirs/dataset" in (tmp_path / "log").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "told"),
    [({"DOCKER_INFO": "1"}, "docker does not answer"), ({"DATASET": "/nowhere"}, "/nowhere: there is no such folder")],
)
def test_what_is_missing_is_told_in_a_line(call, more, told):
    done = call(**more)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_gpu(call, tmp_path):
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert "no NVIDIA GPU" in call().stderr
    assert call(TORCH_CUDA_ARCH_LIST="9.0").returncode == 0


def test_help_needs_nothing(call):
    done = call("--help", PATH="/usr/bin:/bin")
    assert done.returncode == 0 and "usage: ./mamba-container.sh" in done.stdout
