"""mamba-container.sh and its Dockerfile, with stand-ins for docker, podman, nvidia-smi and nvidia-ctk."""

import itertools
import os
import pwd
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.project import executable

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Keeps what it was called with, an argument a line and an empty line behind, and knows the images that were built and
# the container that was started.
ENGINE = """#!/bin/sh
case "$1 $2" in
"--version "*) echo "${0##*/} version 5"; exit ;;
"info "*) echo "$INFO"; exit ${INFO_STATUS:-0} ;;
"image inspect") [ -e "$STATE/$3" ]; exit ;;
"container inspect") [ ! -e "$STATE/running" ] || cat "$STATE/running"; exit ;;
esac
{ printf '%s\\n' "${0##*/}" "$@"; echo; } >>"$STATE/log"
case $1 in
build) touch "$STATE/$3" ;;
tag) touch "$STATE/$3" ;;
run) [ "$2" != --detach ] || echo true >"$STATE/running" ;;
stop | rm) rm "$STATE/running" ;;
esac
"""

TOOLS = ("bash", "sh", "cat", "cksum", "cut", "dirname", "grep", "id", "mkdir", "paste", "rm", "sort", "touch")


class Host:
    """A machine with the project, an engine and GPUs."""

    def __init__(self, folder: Path, engine: str):
        self.project = folder / "a project"
        self.bin = folder / "bin"
        self.state = folder / "state"
        self.engine = engine
        self.project.mkdir()
        self.state.mkdir()
        for name in ("mamba-container.sh", "Dockerfile", "requirements.txt", "requirements-cuda.txt"):
            shutil.copy(ROOT / name, self.project)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        executable(self.bin / engine, ENGINE)
        executable(self.bin / "nvidia-smi", "#!/bin/sh\necho 9.0\necho 8.6\necho 9.0\n")
        executable(self.bin / "nvidia-ctk", "#!/bin/sh\necho nvidia.com/gpu=all\n")
        self.environment = {"PATH": str(self.bin), "HOME": str(folder / "home"), "STATE": str(self.state), "INFO": ""}

    def call(self, *command: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.project / "mamba-container.sh"), *command],
            env=self.environment | more,
            cwd=self.project.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def did(self, *command: str, **more: str) -> list[list[str]]:
        """What the engine was told to do by a call that must succeed: the arguments of each of its calls."""
        (self.state / "log").write_text("")
        done = self.call(*command, **more)
        assert done.returncode == 0, done.stderr
        calls = (self.state / "log").read_text().split("\n\n")[:-1]
        assert all(call.split("\n")[0] == self.engine for call in calls)
        return [call.split("\n")[1:] for call in calls]

    def refuses(self, *command: str, **more: str) -> str:
        """The one line that a call is refused with, before the engine does anything."""
        done = self.call(*command, **more)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("mamba-container.sh: ") and not (self.state / "log").exists()
        return line


@pytest.fixture
def docker(tmp_path) -> Host:
    return Host(tmp_path, "docker")


@pytest.fixture
def podman(tmp_path) -> Host:
    return Host(tmp_path, "podman")


def values(call: list[str], option: str) -> list[str]:
    """What follows an option, wherever it stands in a call."""
    return [value for name, value in itertools.pairwise(call) if name == option]


def without_root(host: Host) -> None:
    executable(host.bin / "id", "#!/bin/sh\ncase $1 in\n-un) echo someone ;;\n*) echo 1234 ;;\nesac\n")


def test_stand_ins_replace_links_and_leave_the_programs_of_the_system(docker):
    before = Path(shutil.which("id")).read_bytes()
    without_root(docker)
    assert Path(shutil.which("id")).read_bytes() == before and (docker.bin / "id").read_bytes() != before


def test_run_builds_once_and_runs_the_command(docker):
    command = ["./runner.sh", "0", "mdsrnet_l", "in a container"]
    build, run = docker.did("run", *command)
    assert build[0] == "build" and run[0] == "run"
    assert run[-5:] == [values(build, "--tag")[0], *command]  # the comment is one argument still
    assert "--rm" in run and values(run, "--gpus") == ["all"]
    assert [call[0] for call in docker.did("run", *command)] == ["run"]
    assert docker.did()[0][-1] == "bash"


def test_a_build_is_for_the_gpus_here(docker):
    (build,) = docker.did("build", MAX_JOBS="8")
    assert set(values(build, "--build-arg")) == {"TORCH_CUDA_ARCH_LIST=8.6;9.0", "MAX_JOBS=8"}
    assert values(build, "--file") == ["Dockerfile"] and build[-1] == "."
    (build,) = docker.did("build", TORCH_CUDA_ARCH_LIST="9.0", BASE_IMAGE="nvcr.io/nvidia/pytorch:26.01-py3")
    assert "TORCH_CUDA_ARCH_LIST=9.0" in build and "BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3" in build


@pytest.mark.parametrize("changed", ["Dockerfile", "requirements.txt", "requirements-cuda.txt", "BASE_IMAGE"])
def test_another_recipe_is_another_image(docker, changed):
    before = docker.did("run")[0]
    if changed == "BASE_IMAGE":
        build, _ = docker.did("run", BASE_IMAGE="other")
    else:
        with (docker.project / changed).open("a") as file:
            file.write("# changed\n")
        build, _ = docker.did("run")
    assert values(build, "--tag") != values(before, "--tag")


def test_a_pulled_image_stands_for_the_built_one(docker):
    pull, tag = docker.did("pull", "registry.example.org/sirs-mamba:1")
    assert pull == ["pull", "registry.example.org/sirs-mamba:1"]
    assert tag[:2] == ["tag", "registry.example.org/sirs-mamba:1"]
    assert [call[0] for call in docker.did("run")] == ["run"]


def test_start_enter_stop(docker):
    build, started = docker.did("start")
    assert build[0] == "build" and started[:2] == ["run", "--detach"] and started[-2:] == ["sleep", "infinity"]
    (name,) = values(started, "--name")
    assert docker.did("start") == []
    assert docker.did("enter", "python", "-c", "a b") == [["exec", "--interactive", name, "python", "-c", "a b"]]
    assert docker.did("enter") == [["exec", "--interactive", name, "bash"]]
    assert docker.did("stop") == [["stop", name]]
    (docker.state / "log").unlink()
    assert "is not there" in docker.refuses("stop")


def test_enter_starts_and_what_ended_is_cleared_away(docker):
    assert [call[0] for call in docker.did("enter")] == ["build", "run", "exec"]
    (docker.state / "running").write_text("false\n")
    assert [call[0] for call in docker.did("enter")] == ["rm", "run", "exec"]


def test_the_folder_the_data_and_the_weights_are_seen(docker, tmp_path):
    assert docker.did("run")[-1].count("--volume") == 2
    (tmp_path / "sirs").mkdir()
    (run,) = docker.did("run", DATASET=f"{tmp_path}/sirs")
    assert values(run, "--volume") == [
        f"{docker.project}:/workspace/sirs",
        f"{tmp_path}/sirs:/workspace/sirs/dataset",
        f"{tmp_path}/home/.cache/torch:/opt/torch",
    ]
    assert values(run, "--workdir") == ["/workspace/sirs"] and "TORCH_HOME=/opt/torch" in run
    assert (tmp_path / "home/.cache/torch").is_dir()  # made by its owner, not by the engine


def test_a_link_to_the_data_leads_there_in_the_container_too(docker, tmp_path):
    (tmp_path / "sirs").mkdir()
    (docker.project / "dataset").symlink_to(tmp_path / "sirs")
    assert f"{tmp_path}/sirs:{tmp_path}/sirs" in values(docker.did("run")[-1], "--volume")
    (docker.state / "log").unlink()
    assert "./dataset is a link" in docker.refuses("run", DATASET=str(tmp_path))


def test_shared_memory_gpus_and_further_options(docker):
    assert values(docker.did("run")[-1], "--ipc") == ["host"]
    (run,) = docker.did("run", SHM_SIZE="16g", GPUS="0,2", ENGINE_OPTIONS="--network host --volume /data:/data")
    assert values(run, "--shm-size") == ["16g"] and "--ipc" not in run
    assert values(run, "--gpus") == ['"device=0,2"']
    assert values(run, "--network") == ["host"] and "/data:/data" in values(run, "--volume")
    assert "--gpus" not in docker.did("run", GPUS="none")[0]


def test_docker_runs_as_oneself(docker):
    without_root(docker)
    run = docker.did("run")[-1]
    assert values(run, "--user") == ["1234:1234"] and "USER=someone" in run and "--userns" not in run
    assert "--user" not in docker.did("run", INFO="Security Options: rootless")[-1]  # there, root is oneself


def test_podman_is_found_and_told_in_its_own_way(podman):
    without_root(podman)
    run = podman.did("run", "nvidia-smi", GPUS="1,2")[-1]
    assert values(run, "--device") == ["nvidia.com/gpu=1", "nvidia.com/gpu=2"] and "--gpus" not in run
    assert values(run, "--userns") == ["keep-id"] and values(run, "--user") == ["1234:1234"]
    assert values(podman.did("run")[-1], "--device") == ["nvidia.com/gpu=all"]


def test_docker_may_be_podman(docker):
    executable(docker.bin / "docker", ENGINE.replace('"${0##*/} version 5"', '"podman version 5.4.0"'))
    assert values(docker.did("run")[-1], "--device") == ["nvidia.com/gpu=all"]


def test_the_engine_can_be_named(docker):
    executable(docker.bin / "podman", ENGINE)
    assert docker.did("build")[0][0] == "build"  # docker comes first
    docker.engine = "podman"
    assert docker.did("build", ENGINE="podman")[0][0] == "build"


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ((), {"INFO_STATUS": "1"}, "docker does not answer"),
        ((), {"ENGINE": "nerdctl"}, "ENGINE=nerdctl is not installed"),
        ((), {"DATASET": "/nowhere"}, "/nowhere: there is no such folder"),
        ((), {"GPUS": "first"}, "GPUS=first is neither"),
        (("./runner.sh", "0"), {}, "there is no ./runner.sh; run ./runner.sh ... runs a command"),
        (("pull",), {}, "pull takes the name of one image"),
        (("stop", "it"), {}, "stop takes no arguments"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(docker, command, more, told):
    assert told in docker.refuses(*command, **more)


def test_no_engine(docker):
    (docker.bin / "docker").unlink()
    assert "neither docker nor podman is installed" in docker.refuses()


def test_no_gpu(docker):
    executable(docker.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert "no NVIDIA GPU" in docker.refuses()
    docker.did("build", TORCH_CUDA_ARCH_LIST="9.0")


def test_no_toolkit_for_docker(docker):
    (docker.bin / "nvidia-ctk").unlink()
    assert "container toolkit is not installed" in docker.refuses("start")
    docker.did("run", GPUS="none")
    docker.did("run", DOCKER_HOST="ssh://elsewhere")


def test_no_toolkit_for_podman(podman):
    executable(podman.bin / "nvidia-ctk", "#!/bin/sh\n")
    assert "sudo nvidia-ctk cdi generate" in podman.refuses("start")


def test_without_a_home_it_takes_the_systems_or_says_what_to_name(docker):
    made = docker.state / "made"
    (docker.bin / "mkdir").unlink()
    executable(docker.bin / "mkdir", f'#!/bin/sh\necho "$2" >>"{made}"\n')
    home = pwd.getpwuid(os.getuid()).pw_dir
    del docker.environment["HOME"]
    for more in ({}, {"HOME": ""}):
        run = docker.did("run", "true", **more)[-1]
        assert f"{home}/.cache/torch:/opt/torch" in values(run, "--volume")
    executable(docker.bin / "mkdir", "#!/bin/sh\nexit 1\n")
    assert "TORCH_HOME=DIR names another" in docker.call("run", "true").stderr


def test_it_runs_through_a_link(docker, tmp_path):
    (tmp_path / "link").symlink_to(docker.project / "mamba-container.sh")
    (docker.bin / "readlink").symlink_to(shutil.which("readlink"))
    done = subprocess.run(
        ["bash", str(tmp_path / "link"), "run", "true"], env=docker.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_help_needs_nothing(docker):
    (docker.bin / "docker").unlink()
    done = docker.call("--help")
    assert done.returncode == 0 and "usage: ./mamba-container.sh" in done.stdout
    read = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "mamba-container.sh").read_text())) - {
        "TORCH_HOME",
        "DOCKER_HOST",
    }
    assert read == set(re.findall(r"^  ([A-Z_]+)  ", done.stdout, re.MULTILINE))  # every variable is told of


def test_the_dockerfile_gets_what_it_copies_and_builds_mamba_1s_kernels():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    ignored, *kept = (ROOT / ".dockerignore").read_text().split()
    assert ignored == "*"
    for line in re.findall(r"^COPY (.*)", text, re.MULTILINE):
        for name in shlex.split(line)[:-1]:
            assert (ROOT / name).is_file() and any(Path(name).match(pattern.removeprefix("!")) for pattern in kept)
    (build,) = [line for line in text.splitlines() if "requirements-cuda.txt" in line and line.startswith("RUN")]
    for variable in ("CAUSAL_CONV1D_FORCE_BUILD", "MAMBA_FORCE_BUILD", "MAMBA_KEEP_CUDA_BUILD"):
        assert f"{variable}=TRUE" in build
    for argument in ("BASE_IMAGE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        assert re.search(rf"^ARG {argument}=", text, re.MULTILINE)
