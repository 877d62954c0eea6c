"""Run folders with odd things under a run's names: none is waited for, none eats the memory, each is one line."""

import contextlib
import os
import subprocess
import sys

import pytest

from dereflect.options import PRETRAINED
from dereflect.tools import report, summarize
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run.folder import _check_files
from tests.helpers import ROOT, errors, make_page


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["options.yaml", "metrics.jsonl", "starts.jsonl", "events.out.tfevents.1.x"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_pipes_and_devices_under_a_runs_names_are_not_read(tmp_path, capsys, name, kind):
    run = tmp_path / "run"
    run.mkdir()
    (run / "options.yaml").write_text("inet: dsrnet_s\n")
    (run / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    (run / "best.pt").touch()
    assert "regular file" in make_page(run, tmp_path / "page.html", "--pictures", "none")
    assert program.run(summarize.main, [str(tmp_path)]) == 0
    with pytest.raises(UserError, match="move it away"):
        _check_files(run)


@pytest.mark.parametrize(
    "line",
    ["base_dir: [1, 2]", "optimizer: 3", "precision: odd", "if_align: maybe", "nEpochs: {a: 1}", "inet: 3", "mix: 7",
     "max_dataset_size: x", "eval_batch: -1", "vgg_weights: [x]", "seed: 1.5e99", "gpu_ids: x", "dataset: none", "{}",
     "a: &a [*a]", "inet: 2020-01-01"],
)  # fmt: skip
def test_odd_options_of_a_run_are_one_line(tmp_path, capsys, line):
    run = tmp_path / "run"
    run.mkdir()
    (run / "options.yaml").write_text(f"{line}\n")
    (run / "best.pt").write_bytes(b"")
    (run / "images").mkdir()
    with contextlib.suppress(SystemExit):
        assert program.run(report.main, [str(run), "-o", str(tmp_path / "page.html")]) == 2
    errors(capsys)


def test_export_works_without_docstrings(tmp_path):
    """`python -OO`."""
    target = tmp_path / "a.safetensors"
    given = [sys.executable, "-OO", "tools/export.py", str(PRETRAINED), "-o", str(target)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and target.exists(), done.stderr
