"""What the README and the files beside it say is so; its commands run in order, on a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from tests.helpers import ROOT, project_table
from tests.pictures import PICTURES, main
from tests.project import executable
from tests.test_blocks import commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = "--nEpochs 1 --epoch_size 2 --batchSize 2 --crop_size 64 --nThreads 0"
# Commands that aren't run, by how they begin, and why.
EXCEPTED = {
    "pip": "wants the network",
    "dereflect-page": "serves until it is stopped; tests/test_app.py starts it",
    "./tests/run.sh": "is what runs this",
    "./runner.sh 0": "wants a GPU, and days; tests/test_runner.py has its command line",
    "./runner.sh 1": "wants two GPUs, and days",
    "tensorboard": "serves until it is stopped",
}


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_every_picture_is_shown_and_the_one_script_makes_it(tmp_path):
    texts = [ROOT / name for name in tracked("*.md")]
    shown = {
        (text.parent / path).resolve() for text in texts for path in re.findall(r"!\[.*?]\((.*?)\)", text.read_text())
    }
    assert shown == {(ROOT / name).resolve() for name in tracked("*.png", "*.jpg", "*.svg") if "tools/page" not in name}
    assert shown == {ROOT.resolve() / f"docs/{name}.png" for name in PICTURES}
    main(["demo"], tmp_path)
    with Image.open(tmp_path / "demo.png") as made, Image.open(ROOT / "docs/demo.png") as there:
        assert made.size == there.size


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A copy of the project with photographs in it; the package's commands are in PATH, and `python` is this one."""
    root, bin_ = tmp_path / "project", tmp_path / "bin"
    for name in tracked():
        if not name.startswith(("tests/", "docs/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for name in ("photograph.jpg", "holiday/a.png", "holiday/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    executable(bin_ / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name, place in project_table()["scripts"].items():
        module, function = place.split(":")
        code = f"import sys; from {module} import {function} as f; sys.exit(f())"
        executable(bin_ / name, f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    for name, value in {
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root), "PYTHON": sys.executable
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return root


def test_the_commands_in_order(fresh):
    ran = set()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for words in commands(block):
            if any(words[: len(start.split())] == start.split() for start in EXCEPTED):
                continue
            line = " ".join(word if "*" in word else shlex.quote(word) for word in words)
            line += f" {TINY}" if words[0] == "./runner.sh" else ""
            done = subprocess.run(["bash", "-c", line], cwd=fresh, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stdout + done.stderr
            ran.add(words[1] if words[0] == "python" else words[0])
    assert ran >= {"dereflect", "./runner.sh", *(f"tools/{name}.py" for name in ("infer", "evaluate", "report"))}
    for made in ("separated", "mine", "dataset/demo", "checkpoints/madsrnet_xs/best.pt", "evaluation", "report.html"):
        assert (fresh / made).exists(), made
    assert (fresh / "mine.safetensors").stat().st_size > 1e6


def test_it_is_a_welcome_and_no_book():
    assert len(README.split()) <= 1200
    assert max(map(len, README.splitlines())) <= 120


def test_the_layout_names_every_file_and_only_these():
    text = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
    named = re.findall(r"^([\w./-]+) {2,}\S", text.split("```")[1], re.MULTILINE)
    folders = tuple(name for name in named if name.endswith("/"))
    assert all((ROOT / name).exists() for name in named)
    parts = ("tools/benchmarks/", "tools/inspection/", "tools/page/", "tools/preparation/", "tools/reports/", *folders)
    missing = [
        name
        for name in tracked("*.py", "*.sh")
        if name not in named and not name.startswith(parts) and not name.endswith("__init__.py")
    ]
    assert not missing


def test_the_papers_to_cite_are_the_same_everywhere():
    papers = (ROOT / "docs/papers.bib").read_text(encoding="utf-8")
    titles = [re.sub("[{}]", "", title) for title in re.findall(r"^  title *= ?\{(.+)\},$", papers, re.MULTILINE)]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    assert titles and titles == [reference["title"] for reference in cited]
    of_networks = re.findall(r"^  title=\{(.+)\},$", README, re.MULTILINE)
    assert of_networks and set(of_networks) < set(titles)


def test_the_constraints_are_one_set_that_fits():
    """What is required, and what the tests want, each pinned within its bounds; hooks have the same linters."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = project_table()["optional-dependencies"]
    wanted = [
        *project_table()["dependencies"],
        *(line for extra in ("app", "onnx", "hub", "dev") for line in extras[extra]),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != project_table()["name"]:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for name, version in (line.split("==") for hook in hooks for line in hook["additional_dependencies"]):
        assert pins[name] == version


def test_the_docs_name_tests_that_exist():
    here = {Path(name).name for name in tracked("tests/*.py")}
    named = {
        name
        for page in tracked("*.md")
        for name in re.findall(r"\btest_\w+\.py", (ROOT / page).read_text(encoding="utf-8"))
        if name != "test_sirs.py"  # a program of the published code
    }
    assert len(named) > 30 and named <= here
