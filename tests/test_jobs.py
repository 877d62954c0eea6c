"""What tools/infer.py makes of which photograph, under which name, and what it says of what it passes over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dereflect.models.separator import Separator
from dereflect.tools import infer
from dereflect.util import program
from dereflect.util.photographs import Photograph, write_photograph
from tests.helpers import Local

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stand_in(monkeypatch) -> Local:
    """tools/infer.py with a stand-in for the network; T is then the photograph."""
    model = Local()
    with torch.no_grad():
        model.kernel.zero_()[:, :, 2, 2] = 1
    monkeypatch.setattr(infer, "_load", lambda options: Separator(model, options.tile or 512, options.overlap))
    return model


def separate(tmp_path: Path, *arguments: object) -> int:
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    return program.run(infer.main, ["--checkpoint", str(weights), *map(str, arguments)])


def draw(path: Path, form: str = "PNG", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path, form)
    return path


def made_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pattern", ["day*/**/*.png", "{}/day*/**/*.png", "{}/day[12]/*.png"])
def test_patterns_keep_their_folders(tmp_path, stand_in, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for day in ("day1", "day2"):
        draw(tmp_path / day / "IMG_1.png")
    assert separate(tmp_path, pattern.format(tmp_path), "-o", tmp_path / "out") == 0
    assert made_in(tmp_path / "out") == {"day1/IMG_1_behind_glass.png", "day2/IMG_1_behind_glass.png"}


def test_folders_and_files_of_one_name_are_kept_apart(tmp_path, stand_in):
    for day in ("day1", "day2"):
        draw(tmp_path / day / "IMG_1.png")
    assert separate(tmp_path, tmp_path / "day1", tmp_path / "day2", "-o", tmp_path / "folders") == 0
    files = [tmp_path / day / "IMG_1.png" for day in ("day1", "day2")]
    assert separate(tmp_path, *files, "-o", tmp_path / "files") == 0
    for out in ("folders", "files"):
        assert made_in(tmp_path / out) == {"day1/IMG_1_behind_glass.png", "day2/IMG_1_behind_glass.png"}
    assert separate(tmp_path, *files, "-o", tmp_path / "files", "--resume") == 0
    assert len(stand_in.seen) == 4, "the second is not taken for done because the first is"


@pytest.mark.parametrize("resume", [False, True])
def test_files_of_one_stem_become_two(tmp_path, stand_in, resume):
    names = ["a.gif", "a.png", "b.gif"]
    for name in names:
        draw(tmp_path / "in" / name, name[-3:].upper())
    if resume:  # one after the other: the name of one doesn't depend on what else is named
        for name in names:
            assert separate(tmp_path, tmp_path / "in" / name, "-o", tmp_path / "out", "--resume") == 0
    else:
        assert separate(tmp_path, tmp_path / "in", "-o", tmp_path / "out") == 0
    assert (
        made_in(tmp_path / "out") == {f"{name}_behind_glass.png" for name in ("a", "a_gif", "b")}
        and len(stand_in.seen) == 3
    )


@pytest.mark.parametrize("name", ["t.jfif", "u.JPE", "v.jpeg"])
def test_other_names_of_jpeg(tmp_path, stand_in, name):
    draw(tmp_path / "in" / name, "JPEG")
    assert separate(tmp_path, tmp_path / "in") == 0
    stem, suffix = name.split(".")
    made = tmp_path / "in" / f"{stem}_behind_glass.{suffix}"
    assert Image.open(made).format == "JPEG"


@pytest.mark.parametrize("new", [False, True])
def test_what_is_passed_over_is_counted(tmp_path, stand_in, capsys, new):
    """The names of results that older versions have made count, too."""
    made = ("x_r.jpg", "x_t.jpg", "x_behind_glass.jpg", "x_reflection.jpg", "x_residue.jpg")
    for name in ("x.jpg", *made[: 2 + 3 * new], "y.jpg"):
        draw(tmp_path / "day3" / name, "JPEG")
    (tmp_path / "day3/raw.NEF").write_bytes(b"II*\0")
    assert separate(tmp_path, tmp_path / "day3", *["--overwrite"] * new) == 0
    told = capsys.readouterr().out
    assert "2 separated" in told and "x_r.jpg" in told and "raw.NEF" in told
    assert (
        f"{5 if new else 2} left out as made by an earlier call" in told
        and "1 left out as of formats that are not read" in told
    )
    assert separate(tmp_path, tmp_path / "day3/x_r.jpg", "-o", tmp_path / "out") == 0, "it can be named itself"


def test_results_in_the_folder_itself_are_no_photographs(tmp_path, stand_in, capsys):
    for name in ("I.jpg", "sub/K.jpg"):
        draw(tmp_path / "day3" / name, "JPEG")
    assert separate(tmp_path, tmp_path / "day3", "-o", tmp_path / "day3/out1") == 0
    assert separate(tmp_path, tmp_path / "day3", "-o", tmp_path / "out2") == 0
    assert made_in(tmp_path / "out2") == {"I_behind_glass.jpg", "sub/K_behind_glass.jpg"}
    assert "2 left out as made by an earlier call" in capsys.readouterr().out


def test_names_as_long_as_the_disk_allows(tmp_path, stand_in, capfd):
    for letter, length in (("x", 220), ("y", 245), ("z", 238)):
        draw(tmp_path / "a" / f"{letter * length}.png")
    draw(tmp_path / "a/plain.png")
    assert separate(tmp_path, tmp_path / "a") == 1
    told = capfd.readouterr()
    assert made_in(tmp_path / "a") >= {
        "plain_behind_glass.png",
        f"{'x' * 220}_behind_glass.png",
        f"{'z' * 238}_behind_glass.png",
    }
    assert (told.out + told.err).count("File name too long") == 1 and "Traceback" not in told.err
    assert "3 separated" in told.out and "1 failed" in told.out
    assert not [name for name in made_in(tmp_path / "a") if name.startswith(".")]


@pytest.mark.parametrize("argument", ["x" * 300, "", "a/b\0c.png", "x" * 5000])
def test_names_that_no_file_can_have(tmp_path, stand_in, capfd, argument):
    assert separate(tmp_path, argument) == 2
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1 and told.startswith("error: ")


def test_a_folder_of_raw_files_alone(tmp_path, stand_in, capfd):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/DSC_0001.NEF").touch()
    assert separate(tmp_path, tmp_path / "raw") == 2
    assert "only pictures of formats that are not read, such as DSC_0001.NEF" in capfd.readouterr().err


@pytest.mark.parametrize(("form", "width"), [("webp", 4200), ("jpeg", 16_500)])
def test_what_is_too_wide_is_refused_before_the_work(tmp_path, stand_in, capfd, form, width):
    path = draw(tmp_path / f"wide.{form}", form.upper(), (width, 8))
    arguments = (path, "--save", "t", "sidebyside", "-o", tmp_path / "out")
    assert separate(tmp_path, *arguments) == 1
    told = capfd.readouterr()
    assert "--format png" in told.err and f"{4 * width:,} x 8 pixels" in told.err and "1 separated" in told.out
    assert [Path(name).stem for name in made_in(tmp_path / "out")] == ["wide_behind_glass"]
    stand_in.seen.clear()
    assert separate(tmp_path, *arguments, "--resume") == 1 and not stand_in.seen


def test_damaged_metadata_is_noted(tmp_path, stand_in, capsys):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x02\0\x07\0\0\0\x1a\0\0\0\0\0\0\x0072 dpi\0\0"
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert separate(tmp_path, tmp_path / "a.jpg") == 0
    assert "note: " in (told := capsys.readouterr().out) and "a.jpg: the resolution in its EXIF" in told
    like = Photograph(None, None, None, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    write_photograph(tmp_path / "b.png", torch.zeros(9, 9, 3, dtype=torch.uint8).numpy(), like, "png")


# ---- folders that may not be searched ---------------------------------------------------------------------------


WITHOUT = "-dac_override,-dac_read_search"
UNPRIVILEGED = ["setpriv", f"--bounding-set={WITHOUT}", f"--inh-caps={WITHOUT}", "--"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(UNPRIVILEGED) and not shutil.which("setpriv"), reason="root may search everything")
@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["tools/infer.py", "{}/locked/photo.jpg"], "locked/photo.jpg"),
        (["tools/infer.py", "{}/locked"], "locked"),
        (["tools/infer.py", "{}/photo.jpg", "--checkpoint", "{}/locked/x.pt"], "locked/x.pt"),
        (["tools/summarize.py", "{}/locked/runs"], "locked/runs"),
        (["tools/report.py", "{}/locked/runs"], "locked/runs"),
        (["tools/prepare_data.py", "check", "{}/locked/x"], "locked/x"),
    ],
)
def test_a_folder_that_may_not_be_searched(tmp_path, arguments, path):
    draw(tmp_path / "locked/photo.jpg", "JPEG")
    draw(tmp_path / "photo.jpg", "JPEG")
    (tmp_path / "locked").chmod(0)
    command = [*UNPRIVILEGED, sys.executable, *(text.format(tmp_path) for text in arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert done.returncode == 2, done
    assert "Permission denied" in done.stderr and str(tmp_path / path) in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
