"""Fetching, unpacking, converting and checking the data."""

import hashlib
import io
import re
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dereflect.data.folders import LAYERS, PHOTOGRAPHS
from dereflect.tools import prepare_data
from dereflect.tools.preparation import kinds
from dereflect.util import program
from dereflect.util.images import read_image, write_image
from dereflect.util.published import REAL20
from tests.helpers import contents, errors, flipped, make_tar, make_zip


def picture(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def put(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image)
    return path


# ---- check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path) -> Path:
    """Four photographs, a training pair, two test sets of two pairs."""
    folder = tmp_path / "base"
    for i in range(4):
        put(folder / PHOTOGRAPHS / f"{i}.png", picture(i))
    for place, names in (("train/real", ["a"]), ("test/real20_420", ["3", "4"]), ("test/mine", ["x", "y"])):
        for name in names:
            for layer in ("blended", "transmission_layer"):
                seed = int.from_bytes(hashlib.sha256(f"{place}{name}{layer}".encode()).digest()[:4], "big")
                put(folder / place / layer / f"{name}.png", picture(seed))
    return folder


def test_check_counts_and_is_content(base, capsys):
    assert prepare_data.main(["check", str(base)]) == 0
    told = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in told.splitlines() if line}
    assert re.search(r"photographs +training +4 +15287 +48x32 +0", rows["photographs"])
    assert re.search(r"real20_420 +test +2 pairs +20 +48x32 +0", rows["real20_420"])
    assert "0 pairs" in rows["nature"] and "none of 200 there" in told
    assert "real20_420: 2 of 20 there" in told and f"missing: {' '.join(REAL20[2:])}" in told
    assert "no test image is among" in told
    assert prepare_data.main(["check", str(base), "--published"]) == 1, "it is not what was published"


def test_check_accepts_the_published_names(base, capsys):
    for i, name in enumerate(REAL20):
        for layer in ("blended", "transmission_layer"):
            put(base / "test/real20_420" / layer / f"{name}.png", picture(1000 + i + 100 * len(layer)))
    assert prepare_data.main(["check", str(base)]) == 0
    told = capsys.readouterr().out
    assert "real20_420:" not in told


def test_check_finds_test_images_among_the_trainings(base, capsys):
    test = base / "test/mine/transmission_layer/x.png"
    copy = base / PHOTOGRAPHS / "copy.bmp"
    Image.open(test).save(copy)
    mirrored = picture(5)
    put(base / "test/mine/transmission_layer/y.png", mirrored)
    put(base / PHOTOGRAPHS / "5.png", mirrored.reshape(48, 32, 3))  # the same bytes, but another picture
    assert prepare_data.main(["check", str(base)]) == 1
    told = capsys.readouterr().out
    assert f"{copy}: the same picture as the test's {test}" in told and "trouble (1)" in told


def test_check_finds_what_cannot_be_used(base, capsys):
    (base / PHOTOGRAPHS / "broken.png").write_bytes(b"no image")
    whole = (base / "test/mine/blended/x.png").read_bytes()
    # The header and the end are right; only decoding shows it.
    (base / "test/mine/blended/x.png").write_bytes(whole[:400] + bytes(len(whole) - 500) + whole[-100:])
    put(base / "test/mine/blended/alone.png", picture(9))
    put(base / "test/mine/blended/y.png", picture(9, 40, 48))
    assert prepare_data.main(["check", str(base)]) == 1
    told = capsys.readouterr().out
    for part in ("broken.png", "blended/x.png", "alone.png: no image of that name", "48x32 pixels, but", "trouble (4)"):
        assert part in told


def test_check_of_nothing(tmp_path, capsys):
    assert program.run(prepare_data.main, ["check", str(tmp_path / "none")]) == 2
    assert "none" in errors(capsys)


# ---- unpack -----------------------------------------------------------------------------------------------------

FILES = {"sirs/train/real/blended/1.png": b"one" * 1000, "sirs/test/readme.txt": b"", "sirs/test/ü ö/2.png": b"two"}


@pytest.mark.parametrize(("make", "name"), [(make_zip, "a.zip"), (make_tar, "a.tar.gz")])
def test_unpack_gives_what_is_in_it(make, name, tmp_path, capsys):
    archive = make(tmp_path / name, FILES)
    assert prepare_data.main(["unpack", str(archive), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == FILES
    assert f"--base_dir {tmp_path / 'out/sirs'}\n" in capsys.readouterr().out
    status = program.run(prepare_data.main, ["unpack", str(archive), str(tmp_path / "out")])
    assert status == 2, "nothing is overwritten"
    assert "is there already" in errors(capsys)


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil_of_a_test", "..\\evil", "C:evil", "a/..", "./../evil"]
)
def test_unpack_lets_nothing_out(make, name, tmp_path, capsys):
    archive = make(tmp_path / "archive", {"good": b"1", name: b"evil"})
    before = contents(tmp_path)
    assert program.run(prepare_data.main, ["unpack", str(archive), str(tmp_path / "deep/out")]) == 2
    assert "name within a folder" in errors(capsys)
    assert contents(tmp_path) == before and not Path("/tmp/evil_of_a_test").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_unpack_refuses_links_and_devices(kind, tmp_path, capsys):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = kind, "/etc"
    archive = make_tar(tmp_path / "a.tar.gz", {"good": b"1"}, link)
    assert program.run(prepare_data.main, ["unpack", str(archive), str(tmp_path / "out")]) == 2
    assert "'link' is a" in errors(capsys) and not (tmp_path / "out").exists()


def test_unpack_refuses_a_zips_links(tmp_path, capsys):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    assert program.run(prepare_data.main, ["unpack", str(tmp_path / "a.zip"), str(tmp_path / "out")]) == 2
    assert "'link' is a link" in errors(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_unpack_refuses_bombs(make, tmp_path, capsys, monkeypatch):
    archive = make(tmp_path / "archive", {str(i): bytes(2_000_000) for i in range(3)})
    assert archive.stat().st_size < 100_000
    from dereflect.tools.preparation.archive import unpack
    from dereflect.util.errors import UserError

    with pytest.raises(UserError, match="--max_gb"):
        unpack(archive, tmp_path / "out", 5_000_000)
    assert not (tmp_path / "out").exists()
    unpack(archive, tmp_path / "out", 6_000_000)
    assert len(contents(tmp_path / "out")) == 3
    capsys.readouterr()


def test_unpack_gives_no_rights(tmp_path, capsys):
    info = tarfile.TarInfo("tool")
    info.mode = 0o6777
    archive = make_tar(tmp_path / "a.tar.gz", {}, info)
    assert program.run(prepare_data.main, ["unpack", str(archive), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/tool").stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH) == 0


def test_unpack_tells_damage(tmp_path, capsys):
    whole = make_zip(tmp_path / "a.zip", {"x": np.random.default_rng(0).bytes(5000)}).read_bytes()
    (tmp_path / "bent.zip").write_bytes(whole[:2000] + b"\0\0\0\0" + whole[2004:])
    (tmp_path / "short.zip").write_bytes(whole[:3000])
    (tmp_path / "text.zip").write_text("no archive")
    tar = make_tar(tmp_path / "a.tar.gz", {"x": np.random.default_rng(0).bytes(5000)}).read_bytes()
    (tmp_path / "short.tar.gz").write_bytes(tar[:3000])
    for name in ("bent.zip", "short.zip", "text.zip", "short.tar.gz", "none.zip"):
        assert program.run(prepare_data.main, ["unpack", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert name in errors(capsys)
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_unpack_notices_a_turned_bit_of_a_compressed_tar(tmp_path, capsys):
    """In its content, its headers and its end; those in the head of gzip that mean nothing may pass."""
    whole = make_tar(tmp_path / "a.tar.gz", {"x": np.random.default_rng(0).bytes(3000), "y": b"1" * 600}).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(whole)
    for number, bit in enumerate(range(8 * 20, 8 * (len(whole) - 4), 397)):
        (tmp_path / "b.tar.gz").write_bytes(flipped(whole, bit))
        out = tmp_path / f"out{number}"
        assert program.run(prepare_data.main, ["unpack", str(tmp_path / "b.tar.gz"), str(out)]) == 2, bit
        assert "b.tar.gz" in errors(capsys) and not out.exists(), bit


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_unpack_of_damaged_archives_is_told_in_a_line(kind, tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(__file__, "x")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if program.run(prepare_data.main, ["unpack", str(path), str(tmp_path / "out")]):
            errors(capsys)
        else:
            assert contents(tmp_path / "out") == {"x": Path(__file__).read_bytes()}


def test_a_tar_with_a_damaged_header_or_no_end_is_not_taken_for_a_shorter_one(tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("x", "y"):
            info = tarfile.TarInfo(name)
            info.size = 512
            archive.addfile(info, io.BytesIO(bytes(512)))
    whole = path.read_bytes()
    for damaged in (whole[:1024] + b"z" + whole[1025:], whole[:1024], whole[:2048], whole + b"more"):
        path.write_bytes(damaged)
        assert program.run(prepare_data.main, ["unpack", str(path), str(tmp_path / "out")]) == 2
        assert "a.tar: " in errors(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_unpack_leaves_out_what_macos_adds_and_takes_backslashes_for_slashes(make, tmp_path, capsys):
    made = {"sirs\\train\\real\\1.jpg": b"1", "sirs/test/2.jpg": b"2", "sirs/test/._2.jpg": b"no"}
    archive = make(tmp_path / "a", made | {"__MACOSX/sirs/test/._2.jpg": b"no", "sirs/.DS_Store": b"no"})
    assert prepare_data.main(["unpack", str(archive), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == {"sirs/train/real/1.jpg": b"1", "sirs/test/2.jpg": b"2"}
    assert capsys.readouterr().out.count("--base_dir") == 1


def test_unpack_replaces_no_link(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").symlink_to("gone")
    archive = make_zip(tmp_path / "a.zip", {"x": b"1"})
    assert program.run(prepare_data.main, ["unpack", str(archive), str(tmp_path / "out")]) == 2
    assert "is there already" in errors(capsys) and (tmp_path / "out/x").is_symlink()


# ---- voc and real20 ---------------------------------------------------------------------------------------------


def test_voc_crops_the_middle(tmp_path, capsys):
    y, x = np.indices((300, 401))
    image = np.stack([x // 2, y // 2, 0 * x], -1).astype(np.uint8)
    put(tmp_path / "JPEGImages/2007_1.png", image)
    put(tmp_path / "JPEGImages/small.jpg", picture(0, 223, 300))
    assert prepare_data.main(["voc", str(tmp_path / "JPEGImages"), "--base_dir", str(tmp_path / "base")]) == 0
    told = capsys.readouterr().out
    assert "1 files written, 0 were there" in told and "1 photographs have a side below 224" in told
    (made,) = (tmp_path / "base" / PHOTOGRAPHS).iterdir()
    assert made.name == "2007_1.png"
    assert np.array_equal(np.asarray(Image.open(made)), image[38 : 38 + 224, 88 : 88 + 224])
    stamp = made.stat().st_mtime_ns
    assert prepare_data.main(["voc", str(tmp_path / "JPEGImages"), "--base_dir", str(tmp_path / "base")]) == 0
    assert "0 files written, 1 were there" in capsys.readouterr().out and made.stat().st_mtime_ns == stamp


def test_voc_names_what_it_cannot_read_and_converts_the_rest(tmp_path, capsys):
    put(tmp_path / "in/good.png", picture(0, 224, 224))
    (tmp_path / "in/bad.jpg").write_bytes(b"no image")
    assert program.run(prepare_data.main, ["voc", str(tmp_path / "in"), "--base_dir", str(tmp_path / "base")]) == 2
    assert "bad.jpg" in errors(capsys)
    assert [path.name for path in (tmp_path / "base" / PHOTOGRAPHS).iterdir()] == ["good.png"]
    assert program.run(prepare_data.main, ["voc", str(tmp_path / "none"), "--base_dir", str(tmp_path / "base")]) == 2
    assert "none" in errors(capsys)


def test_real20_has_a_short_side_of_420(tmp_path, capsys):
    sizes = {"3": (840, 1001), "107": (500, 400)}  # height, width
    for name, size in sizes.items():
        put(tmp_path / f"in/blended/{name}.jpg", picture(1, *size))
        put(tmp_path / f"in/transmission_layer/{name}.png", picture(2, *size))
    assert prepare_data.main(["real20", str(tmp_path / "in"), "--base_dir", str(tmp_path / "base")]) == 0
    for layer in ("blended", "transmission_layer"):
        made = {path.name: Image.open(path).size for path in (tmp_path / "base/test/real20_420" / layer).iterdir()}
        assert made == {"3.png": (500, 420), "107.png": (420, 525)}
    expected = Image.fromarray(picture(2, 500, 400)).resize((420, 525), Image.Resampling.BICUBIC)
    got = read_image(tmp_path / "base/test/real20_420/transmission_layer/107.png") * 255
    assert np.abs(got - np.asarray(expected, np.float32)).max() < 0.5
    (tmp_path / "in/blended/3.jpg").unlink()
    capsys.readouterr()
    assert program.run(prepare_data.main, ["real20", str(tmp_path / "in"), "--base_dir", str(tmp_path / "other")]) == 2
    assert "3.png" in errors(capsys) and not (tmp_path / "other").exists()


# ---- kinds ------------------------------------------------------------------------------------------------------


def test_kinds_are_sets_of_one_reflection_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kinds, "SIDE", 64)
    for seed in range(3):
        put(tmp_path / f"in/{seed}.png", picture(seed, 80, 120) // 2)
    arguments = ["kinds", str(tmp_path / "in"), "--base_dir", str(tmp_path / "one")]
    assert program.run(prepare_data.main, arguments) == 0
    assert program.run(prepare_data.main, [*arguments[:-1], str(tmp_path / "two")]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two"), "the same every time"
    for kind in kinds.KINDS:
        folder = tmp_path / "one/test" / kind
        added = []
        for name in [f"{seed}_{turn}.png" for seed in range(3) for turn in range(kinds.EACH)]:
            mixture, t, _ = (read_image(folder / layer / name) for layer in LAYERS)
            assert mixture.shape == (64, 64, 3) and (mixture >= t - 0.01).all(), "light only adds"
            added.append(mixture - t)
        assert np.mean(added) > 0.02
        if kind in {"half", "half_soft", "pane"}:
            assert all((each < 0.01).mean() > 0.1 for each in added), "a part has no reflection"
    assert program.run(prepare_data.main, arguments) == 2
    assert "sharp: exists already" in errors(capsys)


@pytest.mark.parametrize(("count", "height", "told"), [(1, 500, "two are needed"), (2, 100, "sides must have 320")])
def test_photographs_that_cannot_be_mixed_are_told(tmp_path, capsys, count, height, told):
    for seed in range(count):
        put(tmp_path / f"in/{seed}.png", picture(seed, height, 500))
    assert program.run(prepare_data.main, ["kinds", str(tmp_path / "in"), "--base_dir", str(tmp_path / "out")]) == 2
    assert told in errors(capsys) and not (tmp_path / "out").exists()
