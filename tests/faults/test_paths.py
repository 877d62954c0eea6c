"""Paths that can't be followed: each program says so in one line that names the path."""

import os
from pathlib import Path

import pytest

from dereflect import train_sirs
from dereflect.models import separator
from dereflect.tools import evaluate, export, infer, prepare_data, replay, report, summarize
from dereflect.util import program
from tests.helpers import errors, write_noise, write_pairs

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
    Path("locked").mkdir()
    if request.param == "locked":
        plain = os.stat

        def stat(path, *args, **more):  # root may search any
            if str(path).startswith("locked/"):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *args, **more)

        monkeypatch.setattr(os, "stat", stat)
        for name in ("mkdir", "listdir"):
            call = getattr(os, name)
            refused = lambda path=".", *more, call=call: (  # noqa: E731
                stat(f"{path}/") if str(path).startswith("locked") else call(path, *more)
            )
            monkeypatch.setattr(os, name, refused)
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


@pytest.mark.parametrize("target", ["PLACE", "PLACE/out/deeper"])
def test_where_nothing_can_be_written_is_told_before_the_work(target, place, monkeypatch, capsys):
    def work(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(separator, "load_separator", work)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("locked"))
    write_noise(Path("a.png"), 0)
    write_pairs(Path("data/test/one"), "a")
    Path("w.pt").touch()
    Path("run").mkdir()
    Path("run/options.yaml").write_text("inet: dsrnet_s\n")
    target = target.replace("PLACE", place)
    for tool, given in (
        (infer, ["a.png", "--checkpoint", "w.pt", "-o", target]),
        (evaluate, ["w.pt", "--base_dir", "data", "-o", target]),
        (report, ["run", "-o", f"{target}/page.html"]),
    ):
        assert program.run(tool.main, given) == 2
        assert f"-o {target}: cannot be written: " in errors(capsys)


def test_a_name_that_no_file_can_have(capsys):
    assert program.run(lambda _: Path("a\0b").stat()) == 2
    assert "NUL" in errors(capsys)
