"""Images that are damaged, monstrous or no images at all, under names that no record can hold."""

import os
import struct
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dereflect.data import discover
from dereflect.models.separator import Separator
from dereflect.options import parse_train
from dereflect.tools import infer, prepare_data
from dereflect.util.errors import UserError
from dereflect.util.images import check_image, opened, read_image, read_rgb
from dereflect.util.photographs import read_photograph
from tests.faults.pictures import BOMBS, picture, png_of, ppm_of
from tests.helpers import PHOTOGRAPHS, Local, write_noise, write_pairs

MIB = 2**20
PAIRS = "train/real/blended"
TEST = "test/mine/blended"
READERS = (check_image, read_image, read_rgb, lambda path: read_rgb(path, least=16), read_photograph)


def memory(field: str) -> int:
    """This process's memory in bytes, as Linux counts it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_while(call) -> int:
    """Bytes by which the memory grew meanwhile, at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def fails(reader, path: Path) -> str:
    with pytest.raises(UserError) as error:
        reader(path)
    return str(error.value)


# ---- what is found before training starts -----------------------------------------------------------------------


def damage(content: bytes) -> bytes:
    """The same with a bit turned in its middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


CONTENTS = {
    "cut.png": (picture("PNG")[:-30], "truncated"),
    "half_jpeg.jpg": (picture("JPEG")[: len(picture("JPEG")) // 2], "truncated"),
    "half_bmp.bmp": (picture("BMP")[:2000], "truncated"),
    "empty.png": (b"", "an empty file"),
    "text.png": (b"This is no picture.\n" * 50, "not an image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "nothing.png": (png_of(0, 0), "not an image"),
    "nothing_ppm.ppm": (ppm_of(0, 0), "not an image"),
    **{f"bomb_{suffix}.{suffix}": (bomb(30_000, 30_000), "178,956,970 pixels") for suffix, bomb in BOMBS.items()},
    "line\nbreak.png": (picture("PNG"), "control characters"),
    "escape\x1b[2J.png": (picture("PNG"), "control characters"),
    "latin\udce9.png": (picture("PNG"), "utf-8"),
}
MAKERS = {
    "fifo.png": (os.mkfifo, "a fifo"),
    "loop.png": (lambda path: path.symlink_to(path), "symbolic links"),
    "broken.png": (lambda path: path.symlink_to(path.with_name("nowhere")), "a link to a file that isn't there"),
    "folder.png": (Path.mkdir, "directory"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "locked.jpg": (lambda path: (path.write_bytes(picture("JPEG")), path.chmod(0)), "permission denied"),
}
WORDS = {name: words for name, (_, words) in (CONTENTS | MAKERS).items()}
ODD = {"line\nbreak.png", "escape\x1b[2J.png", "latin\udce9.png"}  # all that is wrong with these is their name
if os.geteuid() == 0:  # may read everything
    del WORDS["locked.jpg"]


def escaped(name: str) -> str:
    for char, shown in (("\n", r"\n"), ("\x1b", r"\x1b"), ("\udce9", r"\udce9")):
        name = name.replace(char, shown)
    return name


@pytest.fixture
def base(tmp_path) -> Path:
    """A small data set in which nothing is wrong."""
    for i in range(6):
        write_noise(tmp_path / PHOTOGRAPHS / f"{i}.png", i, 40, 30)
    write_pairs(tmp_path / "train/real", "abcd", width=40, height=30)
    write_pairs(tmp_path / "test/mine", "xy", width=40, height=30)
    return tmp_path


def spoil(base: Path, place: str) -> list[str]:
    """Put every kind of trouble into a folder, and partners that are fine into their layer; the names."""
    for name in WORDS:
        path = base / place / name
        if name in CONTENTS:
            path.write_bytes(CONTENTS[name][0])
        else:
            MAKERS[name][0](path)
        if path.parent.name == "blended":
            (path.parents[1] / "transmission_layer" / f"{path.stem}.png").write_bytes(picture("PNG"))
    return list(WORDS)


def options_for(base: Path, *more: str):
    return parse_train(["--base_dir", str(base), "--crop_size", "16", "--nThreads", "0", "--val_split", "0", *more])


@pytest.mark.parametrize("place", [PHOTOGRAPHS, PAIRS, TEST])
@pytest.mark.timeout(120)
def test_every_trouble_is_named_in_one_list(base, place):
    names = spoil(base, place)
    lines = []

    def look() -> None:
        lines.extend(fails(discover, options_for(base)).splitlines())

    assert peak_while(look) < 100 * MIB
    partners = len(ODD) if "blended" in place else 0
    assert f"{len(names) + partners} files" in lines[0] and len(lines) == 1 + len(names) + partners
    for name, words in zip(names, WORDS.values(), strict=True):
        found = [line for line in lines if line.startswith(f"  {base / place}/{escaped(name)}: ")]
        assert len(found) == 1 and words in found[0].lower(), (name, found)
        found[0].encode()


@pytest.mark.parametrize("place", [PHOTOGRAPHS, PAIRS, TEST])
def test_troubles_are_left_out_where_the_option_says_so(base, place):
    whole = discover(options_for(base))
    names = spoil(base, place)
    sets = discover(options_for(base, "--skip_bad_images"))
    assert (sets.photographs, sets.pairs, sets.tests) == (whole.photographs, whole.pairs, whole.tests)
    told = "\n".join(sets.describe())
    told.encode()
    partners = len(ODD) if "blended" in place else 0
    assert f"WARNING: {len(names) + partners} files cannot be used" in told and "compare" in told
    assert all(f"{place}/{escaped(name)}: " in told for name in names)


def test_a_pair_is_left_out_as_a_whole(base):
    (base / "test/mine/transmission_layer/x.png").write_bytes(b"")
    (base / "test/mine/blended/alone.png").write_bytes(picture("PNG"))
    write_noise(base / "test/mine/blended/y.bmp", 1, 40, 30)
    write_noise(base / "train/real/transmission_layer/b.png", 1, 30, 40)
    sets = discover(options_for(base, "--skip_bad_images"))
    assert sets.tests == {} and [pair.name for pair in sets.pairs["real"]] == ["a", "c", "d"]
    assert len(sets.left_out) == 4


def test_test_images_and_held_out_ones_are_looked_through(base):
    """The others get a glance, which damage in the middle escapes."""
    for path in (base / "test/mine/blended/x.png", base / "train/real/blended/a.png", base / PHOTOGRAPHS / "3.png"):
        path.write_bytes(damage(path.read_bytes()))
    told = fails(discover, options_for(base))
    assert "1 files" in told and "mine/blended/x.png" in told
    (base / "test/mine/blended/x.png").unlink()
    (base / "test/mine/transmission_layer/x.png").unlink()
    discover(options_for(base))
    held_out = parse_train(["--base_dir", str(base), "--val_split", "0.99"])
    assert "real/blended/a.png" in fails(discover, held_out)


def test_a_name_of_a_set_that_no_record_can_hold(base):
    write_pairs(base / "test/two\nlines", "x")
    told = fails(discover, options_for(base))
    assert r"test/two\nlines/blended/x.png: a name with" in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(base):
    write_pairs(base / "test/more/hidden", "x")
    (base / "test/more").chmod(0)
    try:
        assert "more: cannot be read: Permission denied" in fails(discover, options_for(base))
    finally:
        (base / "test/more").chmod(0o755)


# ---- the readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("side", "words"), [(30_000, "178,956,970 pixels"), (13_000, "claims 13,000 x 13,000 pixels")])
@pytest.mark.parametrize("suffix", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_never_decoded(tmp_path, suffix, side, words, reader):
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(BOMBS[suffix](side, side))
    assert path.stat().st_size < 10_000
    assert words in fails(reader, path)  # and what it imports on its first call is no longer counted
    assert peak_while(lambda: fails(reader, path)) < 20 * MIB


@pytest.mark.parametrize("reader", READERS)
def test_a_file_larger_than_any_photograph_is_not_read(tmp_path, reader):
    path = tmp_path / "huge.png"
    path.write_bytes(picture("PNG"))
    os.truncate(path, 3 * 2**30)  # takes no room on the disk
    assert "larger than 2 GiB" in fails(reader, path)
    assert peak_while(lambda: fails(reader, path)) < 20 * MIB


def test_a_file_that_is_cut_short_while_it_is_read_does_no_harm(tmp_path):
    """Were it mapped into memory, as PIL does with plain files that it is given by name, SIGBUS would end us."""
    path = tmp_path / "a.bmp"
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    with opened(path) as picture:
        colours, _ = picture.samples()
        os.truncate(path, 5000)
        assert np.array_equal(colours[:, :, 0], pixels)


def patched(content: bytes, place: int, value: int, form: str) -> bytes:
    """With a number written over what is there; a PNG's header keeps a checksum that fits."""
    new = struct.pack(form, value)
    place %= max(1, len(content) - len(new))
    content = content[:place] + new + content[place + len(new) :]
    if content[:4] == b"\x89PNG" and 16 <= place < 29:
        content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
    return content


FILES = [
    *(picture(form) for form in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")),
    *(picture("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
    *(picture("JPEG", mode, progressive=True) for mode in ("L", "CMYK")),
    *(picture("TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    picture("TIFF", "I;16"),
    picture("TIFF", "RGBA"),
    picture("WEBP", "RGBA", lossless=True),
    picture("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]),
    picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    *(bomb(4000, 4000) for bomb in BOMBS.values()),  # just below what a small file may claim
    picture("PNG", pnginfo=None, icc_profile=b"no profile" * 20),
]
WILD = (0, 1, 2, 255, 256, 4000, 13_000, 30_000, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
EDITS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 2000), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 2000), st.integers(1, 500)),
    st.tuples(st.just("end"), st.integers(0, 2000)),
    st.tuples(st.just("insert"), st.integers(0, 2000), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("splice"), st.integers(0, 2000), st.integers(0, len(FILES) - 1), st.integers(0, 2000)),
    st.tuples(st.just("wild"), st.integers(0, 80), st.sampled_from(WILD), st.sampled_from(["<I", ">I", "<H", ">H"])),
    st.tuples(st.just("wild"), st.integers(0, 4000), st.sampled_from(WILD), st.sampled_from(["<I", ">I", "<H", ">H"])),
)


def edited(content: bytes, edit: tuple) -> bytes:
    kind, place, *how = edit
    place %= max(1, len(content))
    if not content and kind != "insert":
        return content
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << how[0]]) + content[place + 1 :]
    if kind == "cut":
        return content[:place] + content[place + how[0] :]
    if kind == "end":
        return content[:place]
    if kind == "insert":
        return content[:place] + how[0] + content[place:]
    if kind == "splice":
        other = FILES[how[0]]
        return content[:place] + other[how[1] % len(other) :]
    form = how[1]
    return patched(content, edit[1], how[0] % 2 ** (8 * struct.calcsize(form)), form)


def check_readers(path: Path, content: bytes) -> None:
    """Whatever is in it, each reader gives an image or says what is wrong with it, soon, in little memory."""
    path.write_bytes(content)
    for reader in READERS:

        def read(reader=reader) -> None:
            try:
                reader(path)
            except UserError as error:
                assert str(path) in str(error)

        assert peak_while(read) < 1024 * MIB


mutations = given(content=st.sampled_from(FILES), edits=st.lists(EDITS, min_size=1, max_size=5))
common = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore")
@settings(common, max_examples=200, derandomize=True)
@mutations
def test_mutated_files_are_read_or_refused(tmp_path, content, edits):
    for edit in edits:
        content = edited(content, edit)
    check_readers(tmp_path / "x.png", content)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@settings(common, max_examples=12_000, deadline=timedelta(minutes=2))
@mutations
def test_many_mutated_files_are_read_or_refused(tmp_path, content, edits):
    for edit in edits:
        content = edited(content, edit)
    check_readers(tmp_path / "x.png", content)


# ---- the tools --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_prepare_data_names_them_all(base, capsys):
    names = spoil(base, TEST)
    assert prepare_data.main(["check", str(base)]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if f"{base / TEST}" in line]
    for name in names:
        assert sum(f"/{escaped(name)}: " in line for line in told) == 1, name


@pytest.mark.timeout(120)
def test_infer_separates_what_it_can(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    names = spoil(tmp_path, "photographs")
    (folder / "good.png").write_bytes(picture("PNG"))
    monkeypatch.setattr(infer, "_load", lambda options: Separator(Local(), 64, 32))
    (tmp_path / "weights.pt").touch()
    line = ["--checkpoint", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "made"), str(folder)]
    assert infer.main(line) == 1
    told = capsys.readouterr().err
    told.encode()
    made = {path.name for path in (tmp_path / "made").iterdir()}
    readable = {"good.png"} | ODD
    assert made == {f"{Path(name).stem}_behind_glass{Path(name).suffix}" for name in readable}
    for name in names:
        if name not in readable and (folder / name).is_file():
            assert f"error: {folder}/{name}: " in told, name
