"""Paths that can't be followed: each program says so in one line that names the path."""

import os
from pathlib import Path

import pytest

from dereflect import train_sirs
from dereflect.tools import evaluate, export, infer, prepare_data, replay, report, summarize
from dereflect.util import program
from tests.helpers import errors

X = "PLACE/x.pt"
CALLS = [
    (summarize, ["PLACE/runs"]),
    (report, ["PLACE/runs"]),
    (prepare_data, ["check", "PLACE/x"]),
    (prepare_data, ["unpack", "PLACE/a.zip", "out"]),
    (prepare_data, ["download", "PLACE/a.zip"]),
    (prepare_data, ["voc", "PLACE/photos"]),
    (prepare_data, ["real20", "PLACE/pairs"]),
    (export, [X, "-o", "a.safetensors"]),
    (replay, [X]),
    (evaluate, [X, "--base_dir", "."]),
    (infer, ["a.png", "--checkpoint", X]),
    (train_sirs, ["--resume", "--checkpoints_dir", "PLACE/runs"]),
    (train_sirs, ["--weight_path", X]),
    (train_sirs, ["--vgg_weights", X]),
    (train_sirs, ["--base_dir", "PLACE/data"]),
]


@pytest.fixture(params=["locked", "x" * 300, "loop", "file"])
def place(request, tmp_path, monkeypatch) -> str:
    """A folder that may not be searched, one that can't be, one that leads to itself, one that is none."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").touch()
    if request.param == "locked":
        plain = os.stat

        def stat(path, *args, **more):  # root may search any
            if str(path).startswith("locked/"):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *args, **more)

        monkeypatch.setattr(os, "stat", stat)
        monkeypatch.setattr(os, "mkdir", lambda path, *_: stat(f"{path}/"))
        plain_open = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path=".": stat(f"{path}/") and plain_open(path))
    return request.param


@pytest.mark.parametrize(("tool", "arguments"), CALLS, ids=lambda part: " ".join(part) if type(part) is list else "")
def test_a_path_that_cannot_be_followed_is_one_line(tool, arguments, place, capsys):
    given = [part.replace("PLACE", place) for part in arguments]
    try:
        status = program.run(tool.main, given)
    except SystemExit as stop:
        status = stop.code
    said = errors(capsys)
    assert status == 2 and place in said
    assert place != "locked" or "Permission denied" in said
