"""Every code block of the README and of docs/: Python runs; commands are taken by the programs that they call."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dereflect.options import parse_train
from dereflect.util.images import write_image
from tests.helpers import ROOT, project_table
from tests.test_program import PROGRAMS

# What no test can run, by its first word, and why.
ELSEWHERE = {
    "srun": "wants a cluster",
    "torchrun": "wants two machines; tests/faults/test_ranks.py starts it with options alike",
    "pip": "wants the network",
    "tensorboard": "serves until it is stopped",
}

BENCHMARKS = {
    name: f"dereflect.tools.benchmarks.{place}"
    for name, place in {
        "step": "step.run_step", "memory": "step.run_memory", "scan": "scan.run_scan", "data": "loop.run_data",
        "eval": "overhead.run_eval", "metrics": "metrics.run_metrics",
    }.items()
}  # fmt: skip


def blocks(language: str) -> list:
    """All blocks of a language, each with the place where it stands."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if re.search(r"<!-- not run: .+ -->\s*$", text[: match.start()]):
                continue
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{path.name}:{line}"))
    return found


def commands(block: str) -> list[list[str]]:
    """The words of each command; comments, redirections and settings of the environment left out."""
    joined = re.sub(r"\\\n\s*", " ", block)
    found = []
    for line in joined.splitlines():
        words = shlex.split(re.sub(r" &?>+ ?\S+| 2>&1|&$", "", line), comments=True)
        while words and (re.match(r"[A-Z0-9_]+=", words[0]) or words[0] == "nohup"):
            words.pop(0)
        if words:
            found.append(words)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the README's examples name: photographs, a data set, a run of the first command."""
    write_image(tmp_path / "photograph.jpg", np.random.default_rng(0).random((48, 64, 3), np.float32))
    (tmp_path / "holiday").mkdir()
    shutil.copy(tmp_path / "photograph.jpg", tmp_path / "holiday")
    for name in ("dataset/demo", "dataset/reflection-removal", "checkpoints/madsrnet_xs", "docs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "checkpoints/madsrnet_xs/best.pt").symlink_to(ROOT / "models/pretrained/madsrnet_xs.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({block.id.partition(":")[0] for block in blocks("python")}))
def test_python(page, folder):
    """A page's blocks follow each other in one program."""
    program = "\n".join(block.values[0] for block in blocks("python") if block.id.startswith(f"{page}:"))
    code = f"import sys; sys.path.insert(1, {str(ROOT)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands(block, folder, monkeypatch):
    """The real programs parse the real command lines; only the work is left out."""
    for words in commands(block):
        if words[0] == "./runner.sh":
            device, name, *rest = words[1:]
            assert re.fullmatch(r"\d+(,\d+)*|cpu|mps", device)
            comment = ["--comment", rest.pop(0)] if rest and not rest[0].startswith("-") else []
            assert parse_train(["--inet", name, *comment, *rest]).inet == name
        elif words[0] == "python":
            program = words[1].removesuffix(".py").replace("/", ".")
            arguments = [str(found) for word in words[2:] for found in (sorted(Path().glob(word)) or [word])]
            called = []
            function = BENCHMARKS[words[2]] if program == "tools.benchmark" else PROGRAMS[program][1]
            monkeypatch.setattr(function, lambda *_, called=called: called.append(1) or 0)
            if "--list_models" not in arguments:
                importlib.import_module(f"dereflect.{program}").main(arguments)
                assert called, words
        elif words[0].startswith("dereflect"):
            module = project_table()["scripts"][words[0]].partition(":")[0]
            called = []
            monkeypatch.setattr(
                PROGRAMS[module.removeprefix("dereflect.")][1], lambda *_, called=called: called.append(1)
            )
            importlib.import_module(module).main(words[1:])
            assert called, words
        elif words[0].endswith(".sh"):
            assert (ROOT / words[0]).stat().st_mode & 0o100, words
        else:
            assert words[0] in ELSEWHERE, words


def test_there_are_blocks_and_all_are_of_known_languages():
    assert len(blocks("python")) >= 4 and len(blocks("bash")) >= 6
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        languages = re.findall(r"^```(\w*)\n(?:.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        assert set(languages) <= {"", "bash", "python", "bibtex"}, path
