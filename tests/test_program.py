"""How every program starts and ends."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dereflect.util import program
from dereflect.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "models/pretrained/madsrnet_xs.safetensors"

# Of each program: arguments that are accepted, and the function that then does the work.
PROGRAMS = {
    "train_sirs": (["--base_dir", "."], "dereflect.train_sirs.train"),
    "tools.app": ([], "dereflect.tools.app.serve"),
    "tools.benchmark": (["scan"], "dereflect.tools.benchmarks.scan.run_scan"),
    "tools.evaluate": ([WEIGHTS, "--base_dir", "."], "dereflect.tools.evaluate.evaluate"),
    "tools.export": ([WEIGHTS, "-o", "x.safetensors"], "dereflect.tools.export.export"),
    "tools.convert_mobilenet": (["x.tflite"], "dereflect.tools.convert_mobilenet.convert"),
    "tools.infer": (["x.png"], "dereflect.tools.infer.infer"),
    "tools.model_info": (["dsrnet_xs"], "dereflect.tools.model_info.show"),
    "tools.prepare_data": (["check", "."], "dereflect.tools.preparation.check.check"),
    "tools.replay": (["x.pt"], "dereflect.tools.replay.replay"),
    "tools.report": (["."], "dereflect.tools.report.report"),
    "tools.summarize": (["."], "dereflect.tools.summarize.summarize"),
}
every_program = pytest.mark.parametrize("name", PROGRAMS)


def run(name: str, work, monkeypatch) -> int:
    """A program's exit status, with `work` in place of what it does."""
    arguments, function = PROGRAMS[name]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(function, lambda *_: work())
    return program.run(importlib.import_module(f"dereflect.{name}").main, arguments)


def test_here_is_every_program():
    found = {f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"}
    assert set(PROGRAMS) == found | {"train_sirs"}


@pytest.mark.parametrize("name", [*PROGRAMS, *(f"tools.benchmark {kind}" for kind in ("scan", "step", "eval", "data"))])
def test_help_shows_a_default_once(name, capsys):
    module, *subcommand = name.split()
    with pytest.raises(SystemExit):
        importlib.import_module(f"dereflect.{module}").main([*subcommand, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: ") and not re.search(r"\(default: [^)]*\)[ .]*\(default: ", shown)


@every_program
def test_ctrl_c_is_130_without_a_traceback(name, monkeypatch, capsys):
    assert run(name, lambda: signal.raise_signal(signal.SIGINT), monkeypatch) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped by SIGINT")


def test_of_several_processes_the_first_one_tells_of_a_signal(monkeypatch, capsys):
    for rank, told in (("0", "stopped by SIGTERM\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert program.run(lambda _: signal.raise_signal(signal.SIGTERM)) == 128 + signal.SIGTERM
        assert capsys.readouterr().err == told


@every_program
def test_a_closed_pipe_is_no_error(name, monkeypatch, capfd):
    """`program | head -1`: what is printed after head has left is lost."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        status = run(name, lambda: print("x" * 100_000, flush=True), monkeypatch)
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # so that it can be closed
    assert status == 0 and capfd.readouterr().err == ""


@every_program
def test_bad_input_is_2_and_one_line(name, monkeypatch, capsys):
    def refuse():
        raise UserError("x.png: there is no such file")

    assert run(name, refuse, monkeypatch) == 2
    assert capsys.readouterr().err == "error: x.png: there is no such file\n"


@every_program
def test_a_python_without_the_requirements_is_told_in_one_line(name):
    """Without site-packages Python has its standard library alone."""
    file = f"{name.replace('.', '/')}.py"
    arguments = PROGRAMS[name][0] if name != "tools.infer" else ["README.md"]
    done = subprocess.run([sys.executable, "-S", "-E", file, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    requirements = "requirements-app.txt" if name == "tools.app" else "requirements.txt"
    assert " has no package " in line and (requirements in line or line.endswith(".venv/bin/python"))


def missing(_):
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_where_the_runner_has_made_an_environment_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "_ROOT", tmp_path)
    (tmp_path / "requirements.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert program.run(missing) == 2
    assert "-m pip install -r requirements.txt" in capsys.readouterr().err
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert program.run(missing) == 2
    assert capsys.readouterr().err.rstrip().endswith("has set up: .venv/bin/python")


def test_a_defect_shows_its_traceback():
    def misspelt(_):
        from dereflect.util import no_such_thing  # noqa: F401

    with pytest.raises(ImportError):
        program.run(misspelt)
    with pytest.raises(ZeroDivisionError):
        program.run(lambda _: 1 / 0)


def test_the_status_is_what_main_returns():
    assert [program.run(lambda _, status=status: status) for status in (None, 0, 1)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("given", "count"), [({}, 10000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_threads_do_not_spin_for_long_unless_told_to(given, count):
    """What OpenMP itself says. By its own 300,000 turns small steps took four times as long on a busy machine."""
    code = "from dereflect.util import program\nprogram.run(lambda _: __import__('torch') and None)"
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = plain | {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("torch's OpenMP is not GNU's")
    assert set(map(int, found)) == {count}


def test_nothing_is_collected_while_a_program_starts_nor_when_it_ends():
    code = (
        "import atexit, gc\n"
        "from dereflect.util.program import starting\n"
        "with starting():\n    print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count())\n"
        "atexit._run_exitfuncs()\n"
        "print(gc.get_freeze_count() > 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "0", "True"], done.stderr


def test_what_computes_nothing_starts_without_torch(tmp_path):
    """The leaderboard, the report without pictures, the check of the data: torch alone takes seconds to import."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/options.yaml").write_text("inet: dsrnet_s\nnEpochs: 1\n")
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from dereflect.tools import prepare_data, report, summarize\n"
        f"folder = {str(tmp_path)!r}\n"
        "summarize.main([folder])\n"
        "report.main([folder + '/run', '--pictures', 'none'])\n"
        "prepare_data.main(['check', folder])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
