"""No length in a picture file is believed before it is held against the file, and a check holds no picture whole."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dereflect.util.errors import UserError
from dereflect.util.formats.png import SIGNATURE
from dereflect.util.images import check_image
from tests.faults.pictures import chunk, picture
from tests.faults.test_images import MIB, READERS, fails, peak_while

WIDTH, HEIGHT = 14_000, 12_000  # 168 megapixels


def png_that_claims(length: int, bits: int, colours: int, kind: bytes = b"IDAT", rest: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", 16, 16, bits, colours, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + struct.pack(">I", length) + kind + rest


@pytest.mark.parametrize("kind", [b"IDAT", b"iCCP", b"zTXt", b"tRNS", b"prVt"])
@pytest.mark.parametrize("length", [0xFFFFFFF0, 0x7FFFFFFF, 1000])
@pytest.mark.parametrize(("bits", "colours"), [(8, 2), (16, 2), (16, 0), (16, 6)])
def test_a_chunk_longer_than_the_file(tmp_path, bits, colours, length, kind):
    path = tmp_path / "a.png"
    path.write_bytes(png_that_claims(length, bits, colours, kind))
    assert path.stat().st_size < 50
    for reader in READERS:
        assert "truncated" in fails(reader, path)
        assert peak_while(lambda reader=reader: fails(reader, path)) < 10 * MIB


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows", [0, 1, 15])
def test_pixels_that_end_too_soon(tmp_path, bits, rows):
    """In a file whose chunks are all whole."""
    content = zlib.compress(bytes(rows * (1 + 16 * 3 * bits // 8)))
    header = struct.pack(">IIBBBBB", 16, 16, bits, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b""))
    for reader in (READERS[1], READERS[2], READERS[4], lambda path: check_image(path, decoded=True)):
        assert "truncated" in fails(reader, path)


def test_damage_of_sixteen_bits_says_nothing_on_stderr(tmp_path, capfd):
    content = bytearray(picture("PNG", "I;16"))
    content[len(content) // 2] ^= 16
    (tmp_path / "a.png").write_bytes(content)
    for reader in (READERS[1], READERS[2], READERS[4]):
        fails(reader, tmp_path / "a.png")
    assert capfd.readouterr().err == ""


def flat_png(bits: int) -> bytes:
    deflate = zlib.compressobj(9)
    row = bytes(1 + WIDTH * 3 * bits // 8)
    pixels = b"".join(deflate.compress(row) for _ in range(HEIGHT)) + deflate.flush()
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 2, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flat(form: str, **how) -> bytes:
    file = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT)).save(file, form, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("png", lambda: flat_png(8)),
        ("deep.png", lambda: flat_png(16)),
        ("jpg", lambda: flat("JPEG", quality=30)),
        ("lzw.tif", lambda: flat("TIFF", compression="tiff_lzw")),
        ("deflate.tif", lambda: flat("TIFF", compression="tiff_adobe_deflate")),
    ],
)
def test_a_check_holds_no_picture_whole(tmp_path, name, make):
    path = tmp_path / f"large.{name}"
    path.write_bytes(make())
    check_image(path)
    for decoded in (False, True):
        assert peak_while(lambda decoded=decoded: check_image(path, decoded)) < 100 * MIB


def tiff_with(**wrong: tuple[int, int, int]) -> bytes:
    """A grey TIFF of 40 x 30 pixels in one strip, some entries of whose directory are others: type, count, value."""
    right = {256: (4, 1, 40), 257: (4, 1, 30), 258: (4, 1, 8), 259: (4, 1, 1), 262: (4, 1, 1), 273: (4, 1, 8),
             277: (4, 1, 1), 278: (4, 1, 30), 279: (4, 1, 1200)}  # fmt: skip
    entries = {**right, **{int(tag[1:]): entry for tag, entry in wrong.items()}}
    directory = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return struct.pack("<2sHI", b"II", 42, 1208) + bytes(1200) + struct.pack("<H", len(entries)) + directory + bytes(4)


LARGEST = 2**32 - 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"t279": (4, 1, LARGEST)},
        {"t273": (4, 1, LARGEST)},
        {"t273": (4, LARGEST, 8)},
        {"t279": (4, 2**28, 8)},
        {"t258": (3, 2**30, 8)},
        {"t278": (4, 1, 0), "t279": (4, 1, 100)},
        {"t277": (4, 1, LARGEST)},
        {"t258": (4, 1, LARGEST)},
        {"t322": (4, 1, LARGEST), "t323": (4, 1, LARGEST), "t324": (4, 1, 8), "t325": (4, 1, 1200)},
        {"t322": (4, 1, 2**20), "t323": (4, 1, 2**20), "t324": (4, 1, 8), "t325": (4, 1, 1200)},
        {"t259": (4, 1, 8), "t322": (4, 1, 2**20), "t323": (4, 1, 2**20), "t324": (4, 1, 8), "t325": (4, 1, 1200)},
        {"t330": (4, LARGEST, 8)},
        {"t262": (4, 1, 3), "t320": (3, LARGEST, 8)},
        {"t259": (4, 1, 5)},
        {"t259": (4, 1, 8)},
        {"t259": (4, 1, 7)},
        {"t259": (4, 1, 4)},
        {"t34675": (7, LARGEST, 8)},
        {"t700": (1, LARGEST, 8)},
        {"t34665": (4, 1, 1208)},
    ],
)
def test_wild_numbers_in_a_tiff(tmp_path, wrong):
    """Read with the right pixels, where they don't matter, or refused, in little memory."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_with(**wrong))
    for reader in READERS:

        def use(reader=reader):
            try:
                return reader(path)
            except UserError as error:
                assert str(path) in str(error)
                return None

        use()
        assert peak_while(use) < 20 * MIB
        found = use()
        if reader is READERS[4] and found is not None:
            assert found.pixels.shape == (30, 40, 3) and not found.pixels.any()


def test_directories_in_a_circle(tmp_path):
    content = tiff_with(t330=(4, 1, 1208), t34665=(4, 1, 1208), t34853=(4, 1, 1208))
    (tmp_path / "a.tif").write_bytes(content[:-4] + struct.pack("<I", 1208))
    assert check_image(tmp_path / "a.tif") == (40, 30)
    assert np.all(READERS[4](tmp_path / "a.tif").pixels == 0)


def test_exif_that_says_the_same_again_and_again_takes_no_memory(tmp_path):
    """A thousand tags whose values all are the same sixty thousand bytes."""
    count = 1000
    directory = b"".join(struct.pack("<HHII", tag, 7, 60_000, 0) for tag in range(40_000, 40_000 + count))
    main = struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 26) + bytes(4)
    block = b"II*\0\x08\0\0\0" + main + struct.pack("<H", count) + directory + bytes(4)
    block += bytes(64_000 - len(block))
    path = tmp_path / "a.png"
    plain = picture("PNG")
    path.write_bytes(plain[:33] + chunk(b"eXIf", block) + plain[33:])
    READERS[4](path)
    assert peak_while(lambda: READERS[4](path)) < 100 * MIB
    assert "too large" in " ".join(READERS[4](path).notes)


def test_a_million_chunks_are_no_photograph(tmp_path):
    plain = picture("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(plain[:33] + chunk(b"prVt", b"") * (2**20 + 5) + plain[33:])
    assert "chunks; no photograph" in fails(check_image, path)
