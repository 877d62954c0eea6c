"""What a photograph says about itself reaches the edited file, byte by byte; what is damaged costs no photograph."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dereflect.util.formats.png import chunk
from dereflect.util.images import check_image, read_image, read_rgb
from dereflect.util.photographs import Photograph, as_type, depth_of, read_photograph, suffix_for, write_photograph
from tests.formats import RAMP, by_pil, png, whole

RGB8, RGB16 = whole(RAMP, 255), whole(RAMP, 65535)
ARTIST, COPYRIGHT, DESCRIPTION = "Jürgen Müller".encode(), "© 2020 Łukasz".encode(), "夜の窓".encode()
XMP = b"<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'/><?xpacket end='w'?>"
FORMATS = ("jpeg", "png", "webp", "tiff")


def exif_of(*directories: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """EXIF's block: a main directory of (tag, type, count, content), and EXIF's own, which tag 0x8769 points at."""
    main, details = (*directories, [])[:2]
    if details:
        main = sorted([*main, (0x8769, 4, 1, b"")])
    start = 8 + 2 + 12 * len(main) + 4 + sum(len(content) for *_, content in main if len(content) > 4)

    def directory(entries, place):
        behind, values, content = place + 2 + 12 * len(entries) + 4, b"", struct.pack(f"{order}H", len(entries))
        for tag, kind, count, value in entries:
            value = struct.pack(f"{order}I", start) if tag == 0x8769 and not value else value
            if len(value) > 4:
                value, values = struct.pack(f"{order}I", behind + len(values)), values + value
            content += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
        return content + bytes(4) + values

    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return b"Exif\0\0" + head + directory(main, 8) + (directory(details, start) if details else b"")


def text(tag: int, value: bytes) -> tuple[int, int, int, bytes]:
    return tag, 2, len(value) + 1, value + b"\0"


MAKE = text(271, b"A camera")
TEXTS = sorted([MAKE, text(270, DESCRIPTION), text(315, ARTIST), text(0x8298, COPYRIGHT)])


def photograph_with(tmp_path, suffix: str, exif: bytes) -> Photograph:
    """What is read of a file of a format with an EXIF block as it is."""
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(RGB8)
    if suffix == "deep.png":
        path.write_bytes(png(RGB16, 2, chunk(b"eXIf", exif[6:])))
    elif suffix == "late.png":
        plain = by_pil(image, "PNG")
        path.write_bytes(plain[:-12] + chunk(b"eXIf", exif[6:]) + plain[-12:])
    elif suffix == "raw.png":
        told = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
        path.write_bytes(png(RGB8, 2, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(told))))
    else:
        image.save(path, quality=95, exif=exif)
    assert check_image(path) in ((64, 48), (48, 64))
    read_image(path)
    read_rgb(path)
    return read_photograph(path)


def rewritten(tmp_path, photograph: Photograph, form: str) -> tuple[Image.Image, list[str]]:
    path = tmp_path / f"b{suffix_for(tmp_path / 'a.x', form)}"
    pixels = as_type(photograph.pixels, depth_of(photograph, form))
    notes = write_photograph(path, pixels, photograph, form)
    return Image.open(path), notes


HOLDERS = ("jpg", "png", "deep.png", "late.png", "raw.png", "webp")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("suffix", HOLDERS)
def test_texts_are_the_very_bytes(tmp_path, suffix, form, order):
    photograph = photograph_with(tmp_path, suffix, exif_of(TEXTS, order=order))
    made, _ = rewritten(tmp_path, photograph, form)
    content = (tmp_path / made.filename).read_bytes()
    for value in (ARTIST, COPYRIGHT, DESCRIPTION):
        assert value + b"\0" in content
    assert made.getexif()[271] == "A camera" and photograph.notes == ()


INFINITE = struct.pack("<II", 1, 0)
DAMAGED = {  # entries of the main directory, of EXIF's, and what is said of them
    "resolution in letters": ([MAKE, text(282, b"72 dpi")], [], "resolution"),
    "resolution's unit of 32 bits": ([MAKE, (296, 4, 1, struct.pack("<I", 100_000))], [], "unit"),
    "a pointer that is a fraction": ([MAKE, (0x8769, 5, 1, struct.pack("<II", 5, 6))], [], "settings"),
    "a place that is a text": ([MAKE, text(0x8825, b"hello")], [], "place"),
    "a pointer into nowhere": ([MAKE, (0x8769, 4, 1, struct.pack("<I", 2**31))], [], "settings"),
    "a value outside": ([MAKE, (305, 2, 2**31, struct.pack("<I", 40))], [], "damaged"),
    "an unknown type": ([MAKE, (305, 99, 1, b"abcd")], [], "damaged"),
    "an orientation in letters": ([MAKE, text(274, b"6")], [], "orientation"),
    "an orientation of bytes": ([MAKE, (274, 1, 1, b"\6")], [], "orientation"),
    "an orientation of 77": ([MAKE, (274, 3, 1, struct.pack("<H", 77))], [], "orientation"),
    "an infinite exposure": ([MAKE], [(0x829A, 5, 1, INFINITE), (0x9204, 10, 1, INFINITE)], None),
    "a negative count": ([MAKE, (306, 2, 2**32 - 1, b"\0\0\0\0")], [], "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("suffix", HOLDERS)
def test_damaged_tags_cost_no_photograph(tmp_path, suffix, name):
    main, details, word = DAMAGED[name]
    photograph = photograph_with(tmp_path, suffix, exif_of(main, details))
    assert photograph.pixels.shape == (48, 64, 3)
    assert np.abs(as_type(photograph.pixels, np.dtype(np.uint8)).astype(int) - RGB8).max() <= 24
    for form in (*FORMATS, "bmp"):
        made, _ = rewritten(tmp_path, photograph, form)
        made.load()
        assert form == "bmp" or made.getexif()[271] == "A camera"
    assert any(word in note for note in photograph.notes) if word else photograph.notes == ()


@pytest.mark.parametrize("cut", [0, 3, 8, 10, 15, 30, 45])
@pytest.mark.parametrize("suffix", ["jpg", "png", "deep.png", "webp"])
def test_a_block_cut_short_costs_no_photograph(tmp_path, suffix, cut):
    photograph = photograph_with(tmp_path, suffix, exif_of(TEXTS)[: 6 + cut])
    assert photograph.pixels.shape == (48, 64, 3)
    for form in FORMATS:
        rewritten(tmp_path, photograph, form)[0].load()


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("suffix", HOLDERS)
def test_orientation_of_either_type(tmp_path, suffix, kind):
    value = struct.pack("<H" if kind == 3 else "<I", 6)
    photograph = photograph_with(tmp_path, suffix, exif_of([MAKE, (274, kind, 1, value)]))
    assert photograph.pixels.shape == (64, 48, 3)
    for form in FORMATS:
        made, _ = rewritten(tmp_path, photograph, form)
        assert made.getexif()[274] == 1 and made.size == (48, 64)


def test_interoperability_is_kept(tmp_path):
    """DCF's mark for Adobe RGB without a profile."""
    exif = Image.Exif()
    exif[271] = "A camera"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    photograph = photograph_with(tmp_path, "jpg", exif.tobytes())
    for form in FORMATS:
        made, _ = rewritten(tmp_path, photograph, form)
        assert made.getexif().get_ifd(0xA005)[1] == "R03"


def test_exif_too_long_for_a_jpeg_loses_its_largest_tags_only(tmp_path):
    notes = (0x927C, 7, 50_000, bytes(50_000))
    large = exif_of(TEXTS, [(0x9003, 2, 20, b"2024:05:06 07:08:09\0"), notes, (0x9286, 7, 30_000, bytes(30_000))])
    photograph = photograph_with(tmp_path, "deep.png", large)
    made, said = rewritten(tmp_path, photograph, "jpeg")
    details = made.getexif().get_ifd(0x8769)
    assert made.getexif()[271] == "A camera" and details[0x9003] == "2024:05:06 07:08:09"
    assert 0x927C not in details and len(details[0x9286]) == 30_000 and len(said) == 1 and "50,000 bytes" in said[0]
    made, said = rewritten(tmp_path, photograph, "png")
    assert len(made.getexif().get_ifd(0x8769)[0x927C]) == 50_000 and not said


@pytest.mark.parametrize("form", ["jpeg", "png", "tiff", "bmp"])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "BMP", "deep"])
def test_density_is_kept(tmp_path, source, form):
    path = tmp_path / "a.png"
    if source == "deep":
        path.write_bytes(png(RGB16, 2, chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1))))
    else:
        path.write_bytes(by_pil(Image.fromarray(RGB8), source, dpi=(300, 300)))
    made, _ = rewritten(tmp_path, read_photograph(path), form)
    assert made.info["dpi"] == pytest.approx((300, 300), abs=0.01)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", ["JPEG", "PNG", "deep", "WEBP", "TIFF"])
def test_xmp_is_kept(tmp_path, source, form):
    path = tmp_path / "a.png"
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))
    if source in ("PNG", "deep"):
        path.write_bytes(png(RGB8 if source == "PNG" else RGB16, 2, text))
    elif source == "TIFF":
        write_photograph(path, RGB8, Photograph(RGB8, xmp=XMP), "tiff")
    else:
        path.write_bytes(by_pil(Image.fromarray(RGB8), source, xmp=XMP))
    made, _ = rewritten(tmp_path, read_photograph(path), form)
    made.load()
    found = made.info.get("xmp") or made.tag_v2[700]
    assert (found.encode() if isinstance(found, str) else found) == XMP


def test_an_orientation_in_xmp_is_done_and_told_as_done(tmp_path):
    xmp = XMP.replace(b"<x:", b"<rdf tiff:Orientation='6'/><x:")
    (tmp_path / "a.jpg").write_bytes(by_pil(Image.fromarray(RGB8), "JPEG", xmp=xmp))
    photograph = read_photograph(tmp_path / "a.jpg")
    assert photograph.pixels.shape == (64, 48, 3) and photograph.xmp == xmp.replace(b"='6'", b"='1'")
    assert check_image(tmp_path / "a.jpg") == (48, 64)


@functools.cache
def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


LARGE = b"0123456789abcdef" * 200_000
CHUNKS = {
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
    "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile() + bytes(2_000_000))),
    "broken iCCP": chunk(b"iCCP", b"icc\0\0garbage"),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-4] + b"oops",
    "many": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
    "unknown": chunk(b"prVt", bytes(1000)) + chunk(b"caBX", bytes(100_000)),
}


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("deep", [False, True])
def test_large_and_broken_chunks_cost_no_photograph(tmp_path, name, deep):
    path, samples = tmp_path / "a.png", RGB16 if deep else RGB8
    path.write_bytes(png(samples, 2, CHUNKS[name]))
    np.testing.assert_array_equal(read_photograph(path).pixels, samples)
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), RGB8 if not deep else as_type(samples, np.dtype("u1")))
    np.testing.assert_allclose(read_image(path), RAMP, atol=0.002)
    assert check_image(path) == check_image(path, decoded=True) == (64, 48)
    photograph = read_photograph(path)
    assert photograph.icc == (profile() if name == "iCCP" else None), "what follows a profile is no part of it"
    assert bool(photograph.notes) == (name == "broken iCCP")
    for form in FORMATS:
        rewritten(tmp_path, photograph, form)[0].load()


def test_what_a_format_has_no_room_for_is_said(tmp_path):
    alpha = np.full((48, 64), 99, np.uint8)
    like = Photograph(RGB8, alpha, profile(), exif_of(TEXTS), b" " * 70_000)
    assert len(write_photograph(tmp_path / "a.bmp", RGB8, like, "bmp")) == 4
    said = write_photograph(tmp_path / "a.jpg", RGB8, like, "jpeg")
    assert len(said) == 2 and "XMP of 70,000 bytes" in said[0] and "transparency" in said[1]
    assert write_photograph(tmp_path / "a.png", RGB8, like, "png") == []


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xEE, 0xE0, 0xFE])
@pytest.mark.parametrize(
    "content", [b"", b"Exif\0\0", b"MPF\0II*\0\xff\xff\xff\xff", b"ICC_PROFILE\0", b"JFIF\0", b"Adobe"]
)
def test_odd_segments_of_a_jpeg_cost_no_photograph(tmp_path, marker, content):
    plain = by_pil(Image.fromarray(RGB8), "JPEG", quality=98)
    segment = bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content
    (tmp_path / "plain.jpg").write_bytes(plain)
    (tmp_path / "odd.jpg").write_bytes(plain[:2] + b"\xff\xff" + segment + plain[2:])
    odd, expected = read_photograph(tmp_path / "odd.jpg"), read_photograph(tmp_path / "plain.jpg")
    np.testing.assert_array_equal(odd.pixels, expected.pixels)
    rewritten(tmp_path, odd, "jpeg")[0].load()


def test_a_profile_in_many_segments(tmp_path):
    large = struct.pack(">I", 200_000) + bytes(12) + b"RGB " + bytes(200_000 - 20)
    path = tmp_path / "a.jpg"
    write_photograph(path, RGB8, Photograph(RGB8, icc=large), "jpeg")
    assert read_photograph(path).icc == large == Image.open(io.BytesIO(path.read_bytes())).info["icc_profile"]
