"""runner.sh and environment.sh, in a copy of the project whose train_sirs.py just says how it was called.

Nothing is installed: the copy's requirements are met by the Python that runs the tests, or the test is about
what is said when they are not.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Stands in for train_sirs.py and for torchrun. Prints how it was called as the last line of its output.
RECORDER = """
import json, os, sys
if "--list_models" in sys.argv:
    print("dsrnet_s\\ndsrnet_l\\nmdsrnet_l")
else:
    print(json.dumps({"program": __spec__ and __spec__.name, "arguments": sys.argv[1:], "pid": os.getpid(),
                      "folder": os.getcwd(), "environment": dict(os.environ)}))
"""

NVIDIA_SMI = """#!/bin/sh
[ "$*" = -L ] || exit 1
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a)"
echo "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1b)"
echo "  MIG 1g.5gb     Device  0: (UUID: MIG-2c)"
echo "GPU 12: NVIDIA T4 (UUID: GPU-3d)"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Project:
    """A copy of the scripts in a folder of its own, with stand-ins around them."""

    def __init__(self, folder: Path):
        self.root = folder / "a project"  # the blank is meant
        self.bin = folder / "bin"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "runner.sh", self.root)
        shutil.copy(ROOT / "tools" / "environment.sh", self.root / "tools")
        (self.root / "requirements.txt").write_text("pytest\n")
        (self.root / "train_sirs.py").write_text(RECORDER)
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.nvidia_smi(NVIDIA_SMI)

    def nvidia_smi(self, text: str) -> None:
        executable(self.bin / "nvidia-smi", text)

    def only(self, *tools: str) -> None:
        """Leaves nothing in PATH but bash, dirname and these."""
        shutil.rmtree(self.bin)
        self.bin.mkdir()
        for tool in ("bash", "dirname", *tools):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment["PATH"] = str(self.bin)

    def apt_get(self, effect: str) -> None:
        """An apt-get for a root user: `install` has this effect."""
        executable(self.bin / "id", "#!/bin/sh\necho 0\n")
        log = self.root / "apt.log"
        executable(self.bin / "apt-get", f"""#!/bin/sh\necho "$*" >>"{log}"\n[ "$2" = update ] || {effect}\n""")

    def bash(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *command],
            cwd=cwd or self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return self.bash(str(self.root / "runner.sh"), *arguments, cwd=cwd)

    def call(self, *arguments: str, cwd: Path | None = None) -> dict:
        """What the stand-in recorded of a call that must succeed."""
        done = self.run(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def refuse(self, *arguments: str) -> str:
        """The one line that a call is refused with before anything starts."""
        done = self.run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        *before, line = done.stderr.splitlines()
        assert line.startswith("runner.sh: ")
        assert all(text.startswith("Python: ") for text in before)
        return line

    def use_environment(self, requirements: str, *prelude: str) -> subprocess.CompletedProcess:
        """`use_environment` with these requirements; apt-get and pip must not be reached."""
        (self.root / "requirements.txt").write_text(requirements)
        script = [". tools/environment.sh", *prelude, "use_environment requirements.txt", 'echo "$PYTHON"']
        return self.bash("-euc", "\n".join(script))

    def lacking(self, requirements: str) -> str:
        """What the Python of the tests is said to lack."""
        (self.root / "requirements.txt").write_text(requirements)
        done = self.bash("-uc", '. tools/environment.sh; lacking "$PYTHON" "$ROOT/requirements.txt"')
        assert done.stderr == ""
        assert done.returncode == (1 if done.stdout else 0)
        return done.stdout.strip()

    def distribution(self, name: str, version: str) -> None:
        """Something installed, as far as metadata goes."""
        folder = self.root / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.environment["PYTHONPATH"] = str(self.root / "site")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


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


# What is refused


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "GPU, MODEL and COMMENT are missing"),
        (["0"], "MODEL and COMMENT are missing"),
        (["0", "dsrnet_s"], "COMMENT is missing"),
        (["0", "dsrnet_s", ""], "COMMENT is missing"),
        (["0", "dsrnet_s", "--nEpochs", "3"], "COMMENT is missing"),
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
    assert done.stdout.startswith('usage: ./runner.sh GPU MODEL "COMMENT"')
    assert "nohup ./runner.sh 1 mdsrnet_l" in done.stdout
    assert "tensorboard --logdir checkpoints" in done.stdout


# Which Python is used


@pytest.mark.parametrize(
    ("requirements", "lacks"),
    [
        ("", ""),
        ("# a comment\n\nTiny_Thing>=2.0  # another\n--prefer-binary\n", ""),
        ("tiny-thing>=2.4,<3", ""),
        ("tiny-thing>=2.10", "tiny-thing>=2.10 (it has 2.4.1)"),  # as numbers, not as text
        ("tiny-thing<2.4", "tiny-thing<2.4 (it has 2.4.1)"),
        ("absent-thing", "absent-thing"),
        ("absent-thing; python_version < '3'", ""),
        ("nightly>=2.11", ""),
        ("nightly>=2.12", "nightly>=2.12 (it has 2.11.0a0+nv26)"),
        ("-r more/others.txt\ntiny-thing", "absent-thing>=1"),
        ("a-a\nb-b\ntiny-thing\nc-c\nd-d\ne-e", "a-a, b-b, c-c and 2 more"),
    ],
)
def test_what_a_python_lacks(project, requirements, lacks):
    project.distribution("tiny_thing", "2.4.1")
    project.distribution("nightly", "2.11.0a0+nv26")
    (project.root / "more").mkdir()
    (project.root / "more" / "others.txt").write_text("-r deeper.txt\n")
    (project.root / "more" / "deeper.txt").write_text("absent-thing>=1\n")
    assert project.lacking(requirements) == lacks


def test_an_interrupted_installation_does_not_count(project):
    project.distribution("tiny_thing", "2.4.1")
    (project.root / "site" / "tiny_thing-2.4.1.dist-info" / "METADATA").unlink()
    assert project.lacking("tiny-thing") == "tiny-thing (half-installed)"


def test_the_projects_own_requirements_are_met_here(project):
    """The tests run where requirements-dev.txt is installed, and that includes requirements.txt."""
    shutil.copy(ROOT / "requirements.txt", project.root)
    assert project.lacking((ROOT / "requirements.txt").read_text()) == ""


def test_a_python_that_has_everything_is_used(project):
    done = project.use_environment("pytest\n")
    assert done.stdout.strip() == sys.executable
    assert done.stderr.strip() == f"Python: {sys.executable}, which has all of requirements.txt"
    assert not (project.root / ".venv").exists()


def test_otherwise_the_one_in_venv(project):
    project.distribution("absent_thing", "1.0")
    site = project.environment.pop("PYTHONPATH")
    executable(
        project.root / ".venv" / "bin" / "python",
        f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n',
    )
    done = project.use_environment("absent-thing\n")
    assert done.stdout.strip() == f"{project.root}/.venv/bin/python"
    assert done.stderr.strip() == f"Python: .venv/bin/python, because {sys.executable} lacks absent-thing"


def test_an_incomplete_venv_is_completed(project):
    """Of two set-ups at once, one waits for the other and then finds all in place."""
    project.distribution("absent_thing", "1.0")
    project.environment.pop("PYTHONPATH")
    (project.root / "site").rename(project.root / "wheel")
    executable(
        project.root / ".venv" / "bin" / "python",
        f"""#!/bin/sh
        case "$*" in
        "-m pip install"*) echo one >>pip.log; sleep 1; mv wheel site; exit ;;
        esac
        PYTHONPATH=site exec "{sys.executable}" "$@"
        """,
    )
    (project.root / "requirements.txt").write_text("absent-thing\n")
    script = '. tools/environment.sh; use_environment requirements.txt; echo "$PYTHON"'
    both = [
        subprocess.Popen(
            ["bash", "-euc", script],
            cwd=project.root,
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [output.strip() for output, _ in ends] == [f"{project.root}/.venv/bin/python"] * 2
    assert sum("waiting for it" in errors for _, errors in ends) == 1
    assert (project.root / "pip.log").read_text() == "one\n"


def test_when_pip_fails_the_last_line_says_what_to_do(project):
    executable(
        project.root / ".venv" / "bin" / "python",
        f"""#!/bin/sh
        case "$*" in
        "-m pip install"*) echo "no network" >&2; exit 1 ;;
        esac
        exec "{sys.executable}" "$@"
        """,
    )
    (project.root / "requirements.txt").write_text("absent-thing\n")
    done = project.run("cpu", "dsrnet_s", "x")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2] == "no network"
    assert done.stderr.splitlines()[-1].startswith("pip could not install requirements.txt into .venv (see above)")


def test_a_python_named_by_hand_must_work(project):
    project.environment["PYTHON"] = "no-such-python"
    done = project.run("cpu", "dsrnet_s", "x")
    assert done.returncode == 1
    assert done.stderr.strip() == "PYTHON=no-such-python is not a Python of version 3.10 or newer"


def test_an_old_python_is_passed_over(project):
    executable(project.bin / "python3", "#!/bin/sh\nexit 1\n")  # what the version check ends with
    executable(project.bin / "python3.13", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    del project.environment["PYTHON"]
    assert project.use_environment("pytest\n").stdout.strip() == sys.executable


def test_without_any_python_it_says_how_to_get_one(project):
    del project.environment["PYTHON"]
    done = project.use_environment("pytest\n", "path_of_python() { return 1; }", "apt_install() { return 1; }")
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.10 or newer is needed and was not found.")
    assert "sudo apt-get install python3 python3-venv" in done.stderr


def test_without_any_python_root_gets_one_from_apt(project):
    project.only()
    python = project.bin / "python3"
    wrapper = f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n"
    executable(project.root / "packaged", wrapper)
    project.apt_get(f'{shutil.which("cp")} "{project.root}/packaged" "{python}"')
    del project.environment["PYTHON"]
    done = project.use_environment("pytest\n", "complete_venv() { say made with $1; }")
    assert done.returncode == 0
    assert done.stderr.splitlines()[:2] == [
        "Installing python3 python3-venv with apt-get",
        f"made with {sys.executable}",
    ]
    assert (project.root / "apt.log").read_text().splitlines()[-1].endswith("python3 python3-venv")


@pytest.fixture
def bare_python(project: Project) -> Path:
    """A Python without ensurepip, until something makes the file `ensurepip` beside it."""
    python = project.root / "debian" / "python3"
    executable(
        python,
        f"""#!/bin/sh
        case "$*" in
        *"sys.executable"*) echo "$0"; exit ;;
        *"import ensurepip"*) [ -e "${{0%/*}}/ensurepip" ]; exit ;;
        "-m venv --clear"*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; exit ;;
        "-m pip"*) exit ;;
        esac
        exec "{sys.executable}" "$@"
        """,
    )
    project.environment["PYTHON"] = str(python)
    return python


VENV_PACKAGE = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"


def test_without_ensurepip_it_says_which_package_to_install(project, bare_python):
    done = project.use_environment("absent-thing\n", "apt_install() { return 1; }")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"{bare_python} cannot make virtual environments; do: sudo apt-get install {VENV_PACKAGE}"
    )
    assert not (project.root / ".venv").exists()


def test_without_ensurepip_root_gets_it_from_apt(project, bare_python):
    project.apt_get(f'touch "{bare_python.parent}/ensurepip"')
    done = project.use_environment("absent-thing\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{project.root}/.venv/bin/python"
    assert done.stderr.startswith(f"Installing {VENV_PACKAGE} with apt-get\nInstalling requirements.txt into .venv")
    assert (project.root / "apt.log").read_text().splitlines()[-1].endswith(VENV_PACKAGE)
