"""The distribution: built, installed beside other packages, used from a folder with `models` and `data` of its own."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dereflect

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"models", "data", "options", "tools", "util", "engine", "train_sirs"}
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, as an index would serve it; needs no network: the build's packages are installed."""
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    assert list(out.glob("*.tar.gz"))
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is unpacked into, which is what installing a pure one does."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """A user's folder whose packages have the names of this project's folders."""
    for name in ROOMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the wrong {name}')")
    return tmp_path


def use(installed: Path, folder: Path, code: str) -> str:
    code = f"import sys; sys.path.insert(1, {str(installed)!r})\n{code}"  # before a checkout that is installed
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_imports_go_through_the_package():
    """Under two names a module would be loaded twice, and `models` may be a user's own."""
    assert len(SOURCES) > 100
    for file, node in [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not ROOMS & {name.partition(".")[0] for name in names}, f"{file}: {ast.unparse(node)}"


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        told = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {name.partition("/")[0] for name in names} == {"dereflect", f"dereflect-{dereflect.__version__}.dist-info"}
    held = {name.partition("/")[2] for name in names}
    assert {"__init__.py", "py.typed", "engine.py", "train_sirs.py"} <= held
    weights = {path.name for path in (ROOT / "models/pretrained").glob("*.safetensors")}
    assert weights and weights <= {name.rpartition("/")[2] for name in held}
    for path in [*ROOT.glob("tools/**/*.html"), *ROOT.glob("options/presets/*.yaml"), *ROOT.glob("tools/page/*.js")]:
        assert str(path.relative_to(ROOT)) in held
    assert not [name for name in names if name.endswith(".pyc") or "/tests/" in name]
    assert "Provides-Extra: app" in told and "Provides-Extra: dev" in told and "Project-URL: " in told
    assert "License-Expression: Apache-2.0" in told


def test_it_is_used_beside_packages_of_the_same_names(installed, elsewhere):
    photograph = ROOT / "docs/demo.png"
    code = f"""
from pathlib import Path
import dereflect
assert Path(dereflect.__file__).is_relative_to({str(installed)!r})
from dereflect.options import PRETRAINED
separator = dereflect.load_separator(PRETRAINED)
from dereflect.util.images import read_image
image = read_image({str(photograph)!r})[:48, :64]
assert separator.separate(image).transmission.shape == image.shape
print("separated")
try:
    import models
except SystemExit as error:
    print(error)
"""
    assert use(installed, elsewhere, code).split("\n")[:2] == ["separated", "the wrong models"]


def test_the_commands_of_the_package_help(installed, elsewhere):
    code = "import importlib.metadata, json; print(json.dumps([[e.name, e.value] for e in importlib.metadata.entry_points(group='console_scripts') if e.value.startswith('dereflect')]))"  # noqa: E501
    import json

    commands = dict(json.loads(use(installed, elsewhere, code)))
    assert set(commands) == {"dereflect", "dereflect-train", "dereflect-evaluate", "dereflect-page"}
    for name, place in commands.items():
        module, function = place.split(":")
        run = f"from {module} import {function} as f; sys.argv = [{name!r}, '--help']; sys.exit(f())"
        assert use(installed, elsewhere, run).startswith(f"usage: {name} [-h]")


def test_a_missing_package_of_an_extra_is_named_without_files_that_are_not_installed(installed, elsewhere):
    code = "sys.modules['uvicorn'] = None; sys.argv = ['dereflect-page']; from dereflect.tools.app import program\n"
    code += "sys.stderr = sys.stdout; status = program(); assert status == 2"
    told = use(installed, elsewhere, code)
    assert "uvicorn" in told and told.rstrip().endswith(f"{sys.executable} -m pip install uvicorn")


def test_the_scan_alone_loads_nothing_of_the_networks(installed, elsewhere):
    code = """
from dereflect import Mamba, causal_conv1d, selective_scan
import torch
print(Mamba(8)(torch.zeros(1, 5, 8)).shape)
print(sorted(name for name in sys.modules if name.startswith(("torchvision", "cv2", "PIL", "dereflect.models.arch"))))
"""
    assert use(installed, elsewhere, code) == "torch.Size([1, 5, 8])\n[]\n"


def test_importing_the_package_loads_nothing(elsewhere):
    assert use(ROOT, elsewhere, "import dereflect; print('torch' in sys.modules)") == "False\n"
    assert set(dir(dereflect)) >= {"load_separator", "selective_scan", "causal_conv1d", "Mamba"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dereflect.nothing  # noqa: B018
