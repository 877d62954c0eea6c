"""Every kind of picture file is read with the pixels it holds, or refused by name; its own name says nothing."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dereflect.util.errors import UserError
from dereflect.util.formats.png import SIGNATURE, chunk
from dereflect.util.images import check_image, read_image, read_rgb
from dereflect.util.photographs import read_photograph
from tests.formats import CASES, HEIGHT, OPAQUE, RAMP, WIDTH, by_pil, grey, netpbm, packed, pam, png, tiff, whole

RGB8, RGB16 = whole(RAMP, 255), whole(RAMP, 65535)


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_file(tmp_path, name, capfd):
    make, expected, tolerance = CASES[name]
    path = tmp_path / "picture.png"  # whatever it is
    path.write_bytes(make())
    read = read_image(path)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, atol=tolerance + 1e-7, rtol=0)
    photograph = read_photograph(path)
    peak = np.iinfo(photograph.pixels.dtype).max
    np.testing.assert_allclose(photograph.pixels / peak, read, atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.asarray(read_rgb(path)) / 255, read, atol=0.51 / 255, rtol=0)
    assert check_image(path) == check_image(path, decoded=True) == (WIDTH, HEIGHT)
    has_alpha = any(word in name for word in ("RGBA", "and alpha", "and two", "transparen"))
    assert (photograph.alpha is not None) == has_alpha
    if has_alpha and "transparen" not in name and not name.endswith(" to 1"):
        np.testing.assert_allclose(photograph.alpha / peak, OPAQUE, atol=0.08 if "PAM" in name else 0.51 / peak)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", CASES)
def test_a_file_cut_short_is_refused(tmp_path, name):
    make, *_ = CASES[name]
    content = make()
    path = tmp_path / "picture.png"
    path.write_bytes(content[: len(content) * 2 // 3])
    if name in ("MPO", "WebP animated", "PNG animated"):
        path.write_bytes(content[: len(content) // 4])  # within the first picture
    for use in (read_image, read_photograph, lambda path: check_image(path, decoded=True)):
        with pytest.raises(UserError, match=r"picture\.png: "):
            use(path)


FLOAT = "floating-point images are not supported; convert it to 16 bits"
RAW = "a camera's raw file; develop it first"
REFUSED = {
    "float": (lambda: tiff(RAMP.astype(np.float32), "rgb"), FLOAT),
    "grey float": (lambda: tiff(RAMP[..., 1].astype(np.float32), "minisblack"), FLOAT),
    "half float": (lambda: tiff(RAMP.astype(np.float16), "rgb"), FLOAT),
    "double": (lambda: tiff(RAMP, "rgb"), FLOAT),
    "planar float": (lambda: tiff(RAMP.astype(np.float32), "rgb", planar=True), FLOAT),
    "32 bits": (lambda: tiff(RGB16.astype(np.uint32) * 65537, "rgb"), "32 bits a channel"),
    "grey of 32 bits": (lambda: tiff(RGB16[..., 1].astype(np.uint32) * 65537, "minisblack"), "32 bits a channel"),
    "signed": (lambda: tiff((RGB16[..., 1] // 2).astype(np.int16), "minisblack"), "signed numbers of 16 bits"),
    "signed bytes": (lambda: tiff((RGB8 // 2).astype(np.int8), "rgb"), "signed numbers of 8 bits"),
    "PFM": (lambda: b"PF\n2 2\n-1.0\n" + bytes(48), FLOAT),
    "grey PFM": (lambda: b"Pf\n2 2\n-1.0\n" + bytes(16), FLOAT),
    "OpenEXR": (lambda: b"\x76\x2f\x31\x01" + bytes(100), FLOAT),
    "above maxval": (lambda: netpbm("P5", whole(RAMP[..., 1], 4095), 1023), "above its maxval of 1023"),
    "letters above maxval": (lambda: netpbm("P3", RGB8, 100), "above its maxval of 100"),
    "maxval 0": (lambda: netpbm("P5", RGB8[..., 1], 0), "maxval of 0"),
    "maxval 70000": (lambda: netpbm("P5", RGB8[..., 1], 70000), "maxval of 70000"),
    "PAM of five": (lambda: pam(np.dstack([RGB8, RGB8[..., :2]]), 255, "SPECTRUM"), "a PAM of 5 channels"),
    "JPEG 2000": (lambda: by_pil(Image.fromarray(RGB8), "JPEG2000"), "a JPEG 2000 file"),
    "JPEG XL": (lambda: b"\xff\x0a" + bytes(50), "a JPEG XL file"),
    "Photoshop": (lambda: b"8BPS\0\1" + bytes(50), "a Photoshop file"),
    "PDF": (lambda: b"%PDF-1.7\n" + bytes(50), "a PDF"),
    "SVG": (lambda: b"<?xml version='1.0'?>\n<svg width='9'/>" + bytes(50), "an SVG drawing"),
    "web page": (lambda: b"<!DOCTYPE html><html>" + bytes(50), "a web page"),
    "video": (lambda: b"\0\0\0\x18ftypisom" + bytes(50), "a video"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    "Canon's CR3": (lambda: b"\0\0\0\x18ftypcrx " + bytes(50), RAW),
    "Canon's CR2": (lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(50), RAW),
    "Fujifilm's": (lambda: b"FUJIFILMCCD-RAW 0201" + bytes(50), RAW),
    "Panasonic's": (lambda: b"IIU\0\x18\0\0\0" + bytes(50), RAW),
    "Olympus's": (lambda: b"IIRO\x08\0\0\0" + bytes(50), RAW),
    "a sensor's TIFF": (lambda: packed(RGB16[..., 1:2].astype(np.uint32), 16, 32803, "<"), RAW),
    "lossless JPEG": (lambda: jpeg_of_frame(0xC3), "a lossless or hierarchical JPEG"),
    "JPEG of 12 bits": (lambda: jpeg_of_frame(0xC1, bits=12), "a JPEG of 12 bits a channel"),
    "64 bits": (lambda: tiff(RGB16.astype(np.uint64), "rgb"), "a TIFF of 64 bits a channel"),
    "Lab of 16 bits": (lambda: tiff(RGB16, "cielab"), "Lab colours of 16 bits a channel"),
    "inks the other way round": (lambda: inked(255, 0), "inks that don't reach from nothing to all"),
    "Apple's PNG": (lambda: SIGNATURE + chunk(b"CgBI", bytes(4)) + png(RGB8, 2)[8:], "a PNG of Apple's own kind"),
    "text": (lambda: b"no picture at all", "not an image, or damaged"),
}


def jpeg_of_frame(marker: int, bits: int = 8) -> bytes:
    """A JPEG whose header says that it is of another kind."""
    content = bytearray(by_pil(Image.fromarray(RGB8), "JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 1], content[place + 4] = marker, bits
    return bytes(content)


def inked(*dots: int) -> bytes:
    """A CMYK TIFF that says what is no ink, and all of it."""
    four = np.dstack([255 - RGB8, np.zeros_like(RGB8[..., :1])])
    return tiff(four, "separated", extratags=[(336, 1, 2, dots, True)])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(tmp_path, name, capfd):
    make, words = REFUSED[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(make())
    for use in (read_image, read_rgb, read_photograph, check_image):
        with pytest.raises(UserError, match=r"picture\.jpg: ") as error:
            use(path)
            check_image(path, decoded=True)
        assert words in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_range_of_inks_from_nothing_to_all(tmp_path):
    (tmp_path / "a.tif").write_bytes(inked(0, 255))
    np.testing.assert_array_equal(read_photograph(tmp_path / "a.tif").pixels, RGB8)


def test_a_wrong_checksum_alone_costs_no_pixels(tmp_path, capfd):
    """Deflate has one of its own."""
    for samples in (RGB8, RGB16):
        whole_file = png(samples, 2)
        (tmp_path / "a.png").write_bytes(whole_file[:-16] + b"oops" + whole_file[-12:])
        np.testing.assert_array_equal(read_photograph(tmp_path / "a.png").pixels, samples)
    assert capfd.readouterr().err == ""


def raw(tmp_path, **first):
    """A camera's raw file: a preview, and the sensor's pixels in a directory below it."""
    path = tmp_path / "photo.tif"
    with tifffile.TiffWriter(path) as file:
        small, full = RGB8[::4, ::4], RGB16[..., 1]
        file.write(small, photometric="rgb", subfiletype=1, subifds=1, **first)
        file.write(full, photometric=32803, subfiletype=0)
    return path


@pytest.mark.parametrize("first", [{}, {"extratags": [(50706, 1, 4, b"\1\4\0\0", True)]}])
def test_a_raw_file_is_not_taken_for_its_preview(tmp_path, first):
    path = raw(tmp_path, **first)
    for use in (read_image, read_rgb, read_photograph, check_image):
        with pytest.raises(UserError, match="a camera's raw file; develop it first"):
            use(path)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("form", [{}, {"compression": "zlib"}])
def test_the_photograph_is_not_always_the_first_of_a_tiff(tmp_path, marked, below, form):
    """A preview that says so or not, and the photograph behind or below it."""
    path = tmp_path / "photo.tif"
    with tifffile.TiffWriter(path) as file:
        preview = {"subfiletype": 1} if marked else {}
        file.write(255 - RGB8[::2, ::2], photometric="rgb", **preview, **({"subifds": 1} if below else {}))
        file.write(RGB8, photometric="rgb", **form)
    np.testing.assert_array_equal(read_photograph(path).pixels, RGB8)
    assert check_image(path) == (WIDTH, HEIGHT)


def test_the_first_page_of_several_is_read(tmp_path):
    path = tmp_path / "scan.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(RGB8, photometric="rgb")
        file.write(255 - RGB8, photometric="rgb")
        file.write(np.zeros((500, 20, 3), np.uint8), photometric="rgb")
        file.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_photograph(path).pixels, RGB8)


@pytest.mark.parametrize("bits", [8, 16])
def test_orientation_of_a_tiff_of_any_depth(tmp_path, bits):
    samples = RGB8 if bits == 8 else RGB16
    path = tmp_path / "turned.tif"
    path.write_bytes(tiff(samples, "rgb", planar=True, extratags=[(274, 3, 1, 6, True)]))
    np.testing.assert_array_equal(read_photograph(path).pixels, np.rot90(samples, -1))
    assert check_image(path) == (HEIGHT, WIDTH)


def test_subsampled_ycbcr_without_jpeg_is_named(tmp_path):
    path = tmp_path / "video.tif"
    content = by_pil(Image.fromarray(RGB8).convert("YCbCr"), "TIFF")
    told = struct.pack("<HHIHH", 530, 3, 2, 1, 1)
    assert content.count(told) == 1
    path.write_bytes(content.replace(told, struct.pack("<HHIHH", 530, 3, 2, 2, 2)))
    with pytest.raises(UserError, match="YCbCr"):
        read_image(path)


def test_heic_and_avif_by_their_content(tmp_path, monkeypatch):
    head = b"\0\0\0\x1cftyp%b\0\0\0\0mif1%b" + bytes(100)
    (tmp_path / "renamed.jpg").write_bytes(head % (b"heic", b"heic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"renamed\.jpg: HEIC needs a package: pip install pillow-heif"):
        read_photograph(tmp_path / "renamed.jpg")
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "renamed.png").write_bytes(head % (b"avif", b"avif"))
    with pytest.raises(UserError, match=r"renamed\.png: AVIF needs Pillow"):
        read_photograph(tmp_path / "renamed.png")


@pytest.mark.parametrize("name", ["photo.avif", "photo.jpg"])
def test_avif_is_read(tmp_path, name):
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("Pillow without AVIF")
    (tmp_path / name).write_bytes(by_pil(Image.fromarray(RGB8), "AVIF", quality=95, subsampling="4:4:4"))
    np.testing.assert_allclose(read_image(tmp_path / name), RAMP, atol=0.05)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_heic_is_read(tmp_path, name):
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(RGB8)).save(file, quality=95)
    (tmp_path / name).write_bytes(file.getvalue())
    np.testing.assert_allclose(read_image(tmp_path / name), RAMP, atol=0.08)


def test_a_palette_of_eight_bits_in_an_old_tiff(tmp_path):
    """Colours that all are below 256 are of 8 bits, as libtiff takes them."""
    indices = (np.arange(WIDTH * HEIGHT) % 16).astype(np.uint8).reshape(HEIGHT, WIDTH)
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :16] = np.arange(16) * 17
    path = tmp_path / "old.tif"
    path.write_bytes(tiff(indices, "palette", colormap=colours))
    np.testing.assert_array_equal(read_photograph(path).pixels, np.repeat(indices[..., None] * 17, 3, 2))


@pytest.mark.parametrize("interlaced", [0, 1])
def test_sixteen_bits_interlaced_and_filtered(tmp_path, interlaced):
    """By PIL's own writer for 16-bit grey, with all kinds of filters; and Adam7 written by hand."""
    path = tmp_path / "a.png"
    path.write_bytes(by_pil(Image.fromarray(RGB16[..., 1]), "PNG"))
    if interlaced:
        path.write_bytes(adam7(RGB16[..., 1:2]))
    np.testing.assert_array_equal(read_photograph(path).pixels, np.repeat(RGB16[..., 1:2], 3, 2))
    assert check_image(path, decoded=True) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(read_image(path), grey(), atol=1e-5)


def adam7(samples: np.ndarray) -> bytes:
    """16-bit grey as an interlaced PNG."""
    rows = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples[y::dy, x::dx])
    plain = png(samples, 0)
    header = plain[16:28] + b"\1"
    check = zlib.crc32(b"IHDR" + header)
    content = zlib.compress(rows)
    idat = struct.pack(">I", len(content)) + b"IDAT" + content + struct.pack(">I", zlib.crc32(b"IDAT" + content))
    return plain[:16] + header + struct.pack(">I", check) + idat + b"\0\0\0\0IEND\xaeB`\x82"
