"""Odd surroundings: they change nothing but what can't be told."""

import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dereflect.util.run.reader import read_run
from tests.helpers import arguments, project_table, run, same, state_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("--nEpochs", "1", "--epoch_size", "3", "--save_steps", "1")
COMMENT = "Größe ≥ 3 ı İ"
ODD = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "TZ": "Asia/Kathmandu",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def usual(tiny_data, tmp_path_factory) -> Path:
    """A run in usual surroundings."""
    return run(tiny_data, tmp_path_factory.mktemp("runs"), *SETTINGS, "--name", "usual")[1]


def test_no_home_no_terminal_another_zone_and_locale_nobody_listening(usual, tiny_data, tmp_path):
    """Standard input and error are closed, and whoever reads the output leaves after a line."""
    command = [sys.executable, "train_sirs.py", *arguments(tiny_data, tmp_path, *SETTINGS, "--name", "odd")]
    shell = 'exec "$@" <&- 2>&-'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command, "--comment", COMMENT],
        cwd=ROOT,
        env=ODD,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=200) == 0
    assert same(state_of(tmp_path / "odd"), state_of(usual))
    assert read_run(tmp_path / "odd").comment == COMMENT


def test_a_clock_that_goes_backwards(usual, tiny_data, tmp_path, monkeypatch):
    now, calls = time.time(), iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(calls))
    status, folder = run(tiny_data, tmp_path, *SETTINGS, "--name", "back")
    assert status == 0 and same(state_of(folder), state_of(usual))
    assert next(calls) > 0, "somebody has asked for the time"
    assert 0 <= read_run(folder).hours < 1


def say(code: str) -> subprocess.CompletedProcess:
    """Run a program that prints something."""
    script = f"import sys\nfrom util.program import run\n{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ODD, capture_output=True, timeout=60)


def test_letters_that_the_terminal_lacks_are_spelt_out():
    done = say("run(lambda _: run(lambda _: print('\\u00fc \\udcff')))")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xfc \\udcff\n", b"")


def test_what_is_told_into_a_full_disk_is_lost():
    done = say("sys.stdout = open('/dev/full', 'w'); run(lambda _: print('x' * 100000)); sys.stdout.flush()")
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_streams_are_not_taken_by_files(tmp_path):
    script = (
        "import os, sys\nfrom util.program import run\nrun(lambda _: None)\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\nos.write(1, b'noise'); os.write(2, b'noise')\n"
        "print('lost'); sys.stderr.isatty(); file.write('kept')\n"
    )
    shell = 'exec "$@" <&- >&- 2>&-'
    assert (
        subprocess.run(["bash", "-c", shell, "bash", sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode
        == 0
    )
    assert (tmp_path / "file").read_text() == "kept"


PROGRAMS = ["train_sirs.py", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py"))]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_programs_help_in_the_plainest_locale(program):
    done = subprocess.run(
        [sys.executable, program, "--help"],
        cwd=ROOT,
        env=ODD,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and b"usage:" in done.stdout, done.stderr.decode()


@pytest.mark.parametrize("extra", [None, "app", "onnx", "hub", "heif", "metrics", "dev"])
def test_requirements_have_both_bounds_and_are_met(extra):
    project = project_table()
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    requirements = [Requirement(line) for line in lines if not line.startswith(project["name"])]
    assert requirements
    for requirement in requirements:
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, requirement
        if extra is None:
            assert requirement.specifier.contains(version(requirement.name).partition("+")[0]), requirement
    if extra is None:
        bounds = {requirement.name: requirement.specifier for requirement in requirements}
        for package, oldest, newest in (("torch", "2.11", "2.14.1"), ("torchvision", "0.26", "0.29.1")):
            assert isinstance(bounds[package], SpecifierSet)
            assert bounds[package].contains(oldest) and bounds[package].contains(newest)


def test_requirement_files_only_point_at_the_project():
    for path in ROOT.glob("requirements*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert len(lines) == 1 and re.fullmatch(r"-e \.(\[\w+\])?", lines[0]), path
