"""tools/environment.sh: which Python is used, and how a virtual environment is set up.

Nothing is installed: the copy's requirements are met by the Python that runs the tests, or the test is about what is
said when they are not.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.project import Project, executable

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
    shutil.copy(ROOT / "pyproject.toml", project.root)
    for name in ("requirements.txt", "requirements-app.txt", "requirements-dev.txt"):
        assert project.lacking((ROOT / name).read_text()) == ""


def test_what_the_project_and_its_extras_want_is_looked_up(project):
    asks = '[project]\nname = "p"\ndependencies = ["pytest", "no-such-a"]\n[project.optional-dependencies]\n'
    (project.root / "pyproject.toml").write_text(asks + 'x = ["p[y]", "no-such-b>=2"]\ny = ["no-such-c"]\n')
    assert project.lacking("-e .\n") == "no-such-a"
    assert project.lacking("-e .[y]\n") == "no-such-a, no-such-c"
    assert project.lacking("-e .[x]\n") == "no-such-a, no-such-a, no-such-c and 1 more"


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
    assert done.stderr.strip() == "Python: .venv/bin/python"


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


def installed(project, *prelude: str, uv: bool) -> list[str]:
    """How uv or pip is called to install torch and another thing; both must be stubs that note it."""
    log = project.root / "log"
    executable(
        project.root / ".venv/bin/python",
        f"""#!/bin/sh
        case "$*" in
        "-m pip install"*) echo "pip $*" >>"{log}"; exit ;;
        esac
        exec "{sys.executable}" "$@"
        """,
    )
    (project.root / "pyproject.toml").write_text('dependencies = [\n    "torch>=99,<100",\n    "torchvision>=98",\n]\n')
    project.only("sed", "uname", "cat")
    if uv:
        executable(project.bin / "uv", f'#!/bin/sh\necho "uv $*" >>"{log}"\n')
    done = project.use_environment("torch>=99,<100  # a comment\ntorchvision>=98\nabsent-thing\n", *prelude)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith(
        "Installing requirements.txt into .venv with " + ("uv" if uv else "pip")
    )
    assert ("1.5 GB" if len(log.read_text().splitlines()) == 2 else "6 GB") in done.stderr
    assert f"because {sys.executable} lacks torch<100,>=99" in done.stderr
    return log.read_text().splitlines()


@pytest.mark.parametrize("uv", [True, False])
def test_a_cpu_gets_torch_without_cuda_where_its_index_answers(project, uv):
    first, second = installed(project, "CPU_ONLY=yes", "uname() { echo Linux; }", "answers() { :; }", uv=uv)
    assert first.endswith("--index-url https://download.pytorch.org/whl/cpu torch>=99,<100 torchvision>=98")
    assert first.startswith("uv pip install" if uv else "pip -m pip install")
    assert second.endswith(f"-r {project.root}/requirements.txt") and "--index-url" not in second


@pytest.mark.parametrize(
    "prelude",
    [
        ("uname() { echo Linux; }", "answers() { :; }"),
        ("CPU_ONLY=yes", "uname() { echo Linux; }", "answers() { return 1; }"),
    ],
    ids=["a GPU", "no answer"],
)
def test_otherwise_all_comes_from_the_usual_index(project, prelude):
    (line,) = installed(project, *prelude, uv=False)
    assert line.endswith(f"-r {project.root}/requirements.txt") and "--index-url" not in line


def test_only_the_runner_for_a_cpu_asks_for_torch_without_cuda(project):
    stub = 'use_environment() { echo "${CPU_ONLY:-no}" >&2; return 1; }\nROOT=.\nsay() { :; }\n'
    (project.root / "tools/environment.sh").write_text(stub)
    assert [project.run(gpu, "dsrnet_s").stderr for gpu in ("cpu", "0")] == ["yes\n", "no\n"]


def test_what_does_not_answer_is_noticed(project):
    executable(project.root / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    done = project.bash("-uc", ". tools/environment.sh; answers http://127.0.0.1:9/ || echo silent")
    assert done.stdout == "silent\n" and done.stderr == ""


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
    assert done.stderr.splitlines()[-1].startswith("Could not install requirements.txt into .venv (see above)")


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
        "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
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


def test_without_ensurepip_uv_makes_the_environment(project, bare_python):
    log = project.root / "uv.log"
    makes = f'mkdir -p .venv/bin && cp "{bare_python}" .venv/bin/python'
    executable(project.bin / "uv", f'#!/bin/sh\necho "$*" >>"{log}"\n[ "$1" = pip ] || {{ {makes}; }}\n')
    done = project.use_environment("absent-thing\n", "apt_install() { return 1; }")
    assert done.returncode == 0, done.stderr
    first, second = log.read_text().splitlines()
    assert first == f"venv --quiet --seed --python {bare_python} {project.root}/.venv"
    assert second.startswith(f"pip install --python {project.root}/.venv/bin/python")


def test_without_ensurepip_root_gets_it_from_apt(project, bare_python):
    project.apt_get(f'touch "{bare_python.parent}/ensurepip"')
    done = project.use_environment("absent-thing\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{project.root}/.venv/bin/python"
    assert done.stderr.startswith(f"Installing {VENV_PACKAGE} with apt-get\nInstalling requirements.txt into .venv")
    assert (project.root / "apt.log").read_text().splitlines()[-1].endswith(VENV_PACKAGE)


def test_nothing_is_imported_from_the_folder_it_is_called_in(project, tmp_path):
    """Where that folder has files of the names of what a set-up uses."""
    for name in ("fcntl", "ensurepip", "venv", "pip", "packaging", "re", "importlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    executable(
        project.root / "bare" / "python3",
        f"""#!/bin/sh
        case "$*" in
        *"sys.executable"*) echo "$0"; exit ;;
        "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
        esac
        case "$*" in
        "-m "*) exec "{sys.executable}" "$1" "$2" --help ;;
        esac
        exec "{sys.executable}" "$@"
        """,
    )
    project.environment["PYTHON"] = str(project.root / "bare" / "python3")
    (project.root / "requirements.txt").write_text("absent-thing\n")
    script = f'. "{project.root}/tools/environment.sh"; use_environment requirements.txt'
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=project.environment, capture_output=True, text=True, timeout=60
    )
    assert "Installing" in done.stderr and not (tmp_path / "imported").exists(), done.stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_the_tests_only_helps(option, project):
    (project.root / "tests").mkdir()
    shutil.copy(ROOT / "tests/run.sh", project.root / "tests")
    (project.root / "tools/environment.sh").unlink()
    done = project.bash("tests/run.sh", option)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ./tests/run.sh")


@pytest.mark.parametrize("effect", ["true", "exit 100"])
def test_ci_gets_a_browser_or_goes_on_without(tmp_path, effect):
    for name in (".ci/run", "tools/environment.sh"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    executable(tmp_path / "tests/run.sh", '#!/bin/sh\necho "tests: $*"\n')
    for tool in ("bash", "sh", "dirname", "env"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    executable(tmp_path / "bin/id", "#!/bin/sh\necho 0\n")
    executable(tmp_path / "bin/apt-get", f'#!/bin/sh\necho "$*" >>"{tmp_path}/log"\n{effect}\n')

    def run() -> str:
        done = subprocess.run(
            [tmp_path / ".ci/run", "-k", "x"], env={"PATH": f"{tmp_path}/bin"}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    assert run() == "Running ./tests/run.sh\ntests: -k x\n"
    log = (tmp_path / "log").read_text()
    assert "update" in log and ("chromium chromium-driver" in log) == (effect == "true")
    for name in ("chromium", "chromedriver"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\n")
    run()
    assert (tmp_path / "log").read_text() == log  # asked for nothing more
