"""What others have made to do harm: it does none."""

import io
import os
import stat
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from dereflect.options import parse_train
from dereflect.tools.page.work import Work
from dereflect.tools.preparation import archive
from dereflect.util import scratch
from dereflect.util.errors import UserError
from dereflect.util.images import write_image
from dereflect.util.run.record import Record
from tests.helpers import COMMENT, contents, embedded, make_page, make_tar, make_zip
from tests.page import separated

ROOT = Path(__file__).resolve().parents[2]
SET = "<script>alert(2)</script>"


# Archives; tests/test_prepare_data.py has paths that get out, links, devices, doubled names, damage and large contents.


@pytest.mark.parametrize("make_archive", [make_zip, make_tar])
def test_an_archive_of_very_many_files(make_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_FILES", 50)
    many = make_archive(tmp_path / "a", {f"{number}": b"" for number in range(51)})
    with pytest.raises(UserError, match="50 files"):
        archive.unpack(many, tmp_path / "out", 10**9)
    assert not (tmp_path / "out").exists()


def test_a_zip_that_lies_about_a_size(tmp_path):
    """100 MB that say they are 100 bytes."""
    path = make_zip(tmp_path / "a.zip", {"bomb": bytes(100_000_000)})
    data = path.read_bytes()
    size = (100_000_000).to_bytes(4, "little")
    assert data.count(size) == 2, "in the file's own header, and in the archive's"
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(UserError, match="damaged"):
        archive.unpack(path, tmp_path / "out", 10**9)
    assert sum(map(len, contents(tmp_path / "out").values())) == 0


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_tar_whose_names_would_fill_the_memory(kind, tmp_path):
    """Half a gigabyte of a name, in few megabytes of an archive: tarfile would read it before anybody looks at it."""
    size = 2**29
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as file:
        info = tarfile.TarInfo("name")
        info.type, info.size = kind, size
        file.addfile(info, Zeros(size))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a header of 536,870,912 bytes"):
            archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out", 10**12)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


class Zeros(io.RawIOBase):
    """A file of so many of them."""

    def __init__(self, size: int):
        self.left = size

    def read(self, size: int = -1) -> bytes:
        part = min(size, self.left)
        self.left -= part
        return bytes(part)


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_a_zips_devices(kind, tmp_path):
    info = zipfile.ZipInfo("device")
    info.external_attr = (kind | 0o666) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, b"")
    with pytest.raises(UserError, match="'device' is a special file"):
        archive.unpack(tmp_path / "a.zip", tmp_path / "out", 10**9)


@pytest.mark.parametrize("make_archive", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "-rf", "x" * 5000, "a/" * 2000 + "b", "CON", "ü" * 200])
def test_an_archive_with_odd_names(make_archive, name, tmp_path):
    path = make_archive(tmp_path / "a", {name: b"1"})
    try:
        archive.unpack(path, tmp_path / "out", 10**9)
    except UserError:
        assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}
    else:
        assert list(contents(tmp_path / "out").values()) == [b"1"]


# The report page, TensorBoard; tests/test_report.py has names of images and a comment.


def test_names_of_sets_and_options_become_text(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data/test" / SET.replace("/", "\u2215")
    for layer in ("blended", "transmission_layer"):
        (data / layer).mkdir(parents=True)
        write_image(data / layer / "a.png", np.zeros((16, 16, 3), np.uint8))
    name = data.name
    hostile = ["--comment", COMMENT, "--base_dir", str(tmp_path / "data"), "--name", "run", "--weight_path", __file__]
    record = Record(
        run, parse_train([*hostile, "--inet", "<script>alert(3)</script>", "--vgg_weights", "random"]), 0, 0
    )
    scores = dict.fromkeys(("PSNR", "SSIM", "LMSE", "NCC"), 0.5)
    record.evaluation(1, 1, name, [{"name": "a", "model": scores, "input": scores}], 1.0)
    record.averages(1, 1)
    record.close()
    page = make_page(run, tmp_path / "page.html", "--pictures", "none")
    assert "<script>alert" not in page and page.count("<script") == page.count("</script") == 2
    series = [entry["name"] for chart in embedded(page, "data")["charts"] for entry in chart["series"]]
    assert name in series

    events = EventAccumulator(str(run)).Reload()
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0]
    shown = markdown_to_safe_html(text)
    assert b"alert(1)" in text and "<script" not in shown and "onerror" not in shown


# The app; tests/test_page_doors.py attacks its page.


def test_too_little_memory_for_an_upload_is_told(tmp_path):
    def greedy(*_):
        return np.empty(2**60, np.uint8)

    write_image(tmp_path / "photograph.png", np.zeros((16, 16, 3), np.uint8))
    sent = separated(Work(tmp_path, greedy, 1), tmp_path / "photograph.png")
    assert sent.about == {"error": "too large for the memory that is free here; scale it down"}


def test_what_a_killed_app_has_left_goes_when_the_next_one_starts(tmp_path):
    mine, killed, others = (tmp_path / f"sirr-app-{name}" for name in ("mine", "killed", "others"))
    for folder in (mine, killed, others):
        folder.mkdir()
        (folder / "photograph.png").touch()
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom dereflect.util import scratch\n"
        "with scratch.claimed(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(killed)], cwd=ROOT, timeout=60)
    assert (killed / ".lock").exists()
    with scratch.claimed(mine):
        scratch.delete_orphans(tmp_path, "sirr-app-")
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["sirr-app-mine", "sirr-app-others"]
    scratch.delete_orphans(tmp_path, "sirr-app-")
    assert [folder.name for folder in tmp_path.iterdir()] == ["sirr-app-others"], "it may just be being made"
    os.utime(others, (0, 0))  # its lock went first when a program was killed that deleted it
    scratch.delete_orphans(tmp_path, "sirr-app-")
    assert not list(tmp_path.iterdir())


def test_what_another_user_has_planted_is_not_touched(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "sirr-app-x").mkdir()
    (tmp_path / "sirr-app-x/.lock").symlink_to(victim)
    monkeypatch.setattr(scratch.os, "getuid", lambda: 12345)
    scratch.delete_orphans(tmp_path, "sirr-app-")
    assert victim.read_text() == "precious" and (tmp_path / "sirr-app-x/.lock").is_symlink()
