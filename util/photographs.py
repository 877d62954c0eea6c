"""Photographs as files: pixels at their depth, and what else a file says that must outlast an edit.

Colours are taken as they are: the ICC profile that says what they mean is handed on, not applied. What a file says that
is damaged, or that the new file's format can't hold, is left out, with a line; it never costs the photograph.
"""

import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.formats import NO_HEIC, SUFFIXES, exif, ifd, png, prepare_heic
from dereflect.util.formats import jpeg as jpegs
from dereflect.util.formats.picture import as_type, upright
from dereflect.util.images import JPEG_QUALITY, opened

FORMATS = {"jpeg": ".jpg", "png": ".png", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp", "heic": ".heic"}
"""What can be written, and the usual suffix."""

READABLE = SUFFIXES
"""Suffixes of what is taken for a photograph."""

LARGEST = {"jpeg": 65500, "webp": 16383, "heic": 16384}
"""Pixels of a side that a format can hold."""

_BY_SUFFIX = {suffix: name for name, suffix in FORMATS.items()} | {
    ".jpeg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".tiff": "tiff", ".heif": "heic", ".dib": "bmp",
}  # fmt: skip
_WITH_ALPHA = {"png", "webp", "tiff", "heic"}
_DEEP = {"png", "tiff"}
_PNG_EFFORT = 4  # 3 % larger than with the usual 6, in two fifths of the time
_MOST_ICC = 2**24 - 2**18  # bytes of a profile that a JPEG can hold, in 255 segments


@dataclass(frozen=True)
class Photograph:
    """A decoded file, upright.

    Attributes:
        pixels: RGB, uint8 or uint16, (H, W, 3).
        alpha: (H, W) of the same type, or None for a file without.
        icc: the profile of an RGB file.
        exif: the block as JPEG holds it, without an orientation that still asks for a turn and without a thumbnail.
        xmp: the XMP packet, without an orientation that still asks for a turn.
        dpi: pixels an inch, across and down, where the file has them outside of EXIF.
        notes: a line for everything that the file says and that is left out.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def format_of(path: str | Path) -> str:
    """The format, of FORMATS, in which something with this file's name is written; PNG for those not written."""
    return _BY_SUFFIX.get(Path(path).suffix.lower(), "png")


def suffix_for(path: str | Path, form: str) -> str:
    """The suffix of what is made of a file in a format of FORMATS: the file's own where it is of that format."""
    suffix = Path(path).suffix
    return suffix if _BY_SUFFIX.get(suffix.lower()) == form else FORMATS[form]


def depth_of(photograph: Photograph, form: str) -> np.dtype:
    """The type in which a format of FORMATS can hold a photograph's pixels: its own, or uint8."""
    return photograph.pixels.dtype if form in _DEEP else np.dtype(np.uint8)


def check_format(form: str) -> None:
    """See whether a format of FORMATS can be written here.

    Raises:
        UserError: it needs a package that isn't there.
    """
    if form == "heic" and not prepare_heic():
        raise UserError(f"--format heic: {NO_HEIC.replace('convert the file', 'choose another --format')}")


def check_fits(path: str | Path, width: int, height: int, form: str) -> None:
    """See whether a format of FORMATS can hold an image of that size.

    Raises:
        UserError: it can't.
    """
    most = LARGEST.get(form, 2**31 - 1)
    if max(width, height) > most:
        raise UserError(f"{path}: {width:,} x {height:,} pixels, but {form.upper()} holds at most {most:,} a side; "
                        "--format png")  # fmt: skip


def read_photograph(path: str | Path) -> Photograph:
    """Any image file at its own depth, upright, with what it says about itself.

    Raises:
        UserError: the file is missing, damaged, no image, of a kind that isn't read, or a HEIC one and the package
            pillow-heif isn't there.
    """
    with opened(path) as picture:
        colours, alpha = picture.samples()
        about = picture.about()
        orientation, xmp = about.orientation, about.upright_xmp()
        about.exif.orientation = min(about.exif.orientation, 1)  # as it is from here on, where it was told at all
        pixels = np.ascontiguousarray(upright(colours, orientation))
        if alpha is not None:
            alpha = np.ascontiguousarray(upright(alpha, orientation))
        icc = about.icc
        if icc and (icc[16:20] != b"RGB " or picture.inks):  # the colour space, in a profile's header
            icc = None
        if icc and 128 <= int.from_bytes(icc[:4], "big") < len(icc):
            icc = icc[: int.from_bytes(icc[:4], "big")]  # what follows is no part of it
        height, width = pixels.shape[:2]
        block, _ = exif.block(about.exif, width, height)
        return Photograph(pixels, alpha, icc, block, xmp, about.dpi, tuple(about.notes))


def write_photograph(path: str | Path, pixels: np.ndarray, like: Photograph, form: str) -> list[str]:
    """Write pixels as an edit of a photograph: with its profile, EXIF, XMP and alpha as far as the format holds them.

    The file appears under its name only when it is whole.

    Args:
        path: the file; its folder must exist.
        pixels: RGB (H, W, 3), of the type that `depth_of` says.
        like: the photograph. Its alpha is used if it is of the pixels' size.
        form: of FORMATS.

    Returns:
        A line for everything that the format has no room for, and that is left out.

    Raises:
        UserError: the file can't be written, or the format can't hold an image of that size.
    """
    check_fits(path, pixels.shape[1], pixels.shape[0], form)
    has_alpha = like.alpha is not None and like.alpha.shape == pixels.shape[:2]
    if has_alpha and form in _WITH_ALPHA:
        pixels = np.dstack([pixels, as_type(like.alpha, pixels.dtype)])
    with disk.replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                notes = _encode(file, pixels, like, form)
                lost = "its transparency is left out, as the format has none"
                return [*notes, lost] if has_alpha and form not in _WITH_ALPHA else notes
        except OSError:
            raise
        except Exception as error:  # what an encoder raises for what it can't hold is anybody's guess
            raise UserError(f"{path}: cannot be written: {error}") from error


def _encode(file: BinaryIO, pixels: np.ndarray, like: Photograph, form: str) -> list[str]:
    """Write it; lines about what is left out."""
    about, notes = _fitting(pixels, like, form)
    if form == "tiff":
        _write_tiff(file, pixels, like)
    elif form == "png" and pixels.dtype == np.uint16:
        _write_deep_png(file, pixels, like)
    elif form == "png":
        told = PngInfo()
        if like.xmp:
            told.add(b"iTXt", _xmp_text(like.xmp))
        Image.fromarray(pixels).save(file, "PNG", pnginfo=told, compress_level=_PNG_EFFORT, **about)
    elif form == "jpeg":
        xmp = jpegs.xmp_segment(like.xmp) if like.xmp else None
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, extra=xmp or b"", **about)
    elif form in ("webp", "heic"):
        if form == "heic":
            check_format(form)
        xmp = {"xmp": like.xmp} if like.xmp else {}
        Image.fromarray(pixels).save(file, {"heic": "HEIF"}.get(form, "WEBP"), quality=JPEG_QUALITY, **about, **xmp)
    else:
        Image.fromarray(pixels).save(file, "BMP", **about)
    return notes


def _fitting(pixels: np.ndarray, like: Photograph, form: str) -> tuple[dict, list[str]]:
    """Profile, EXIF and density as PIL takes them, as far as a format holds them; lines about the rest."""
    about, notes = {}, []
    block = like.exif
    if form == "bmp":
        lost = {"colour profile": like.icc, "EXIF": like.exif, "XMP": like.xmp}
        notes += [f"its {what} is left out, as a BMP has no room for it" for what, there in lost.items() if there]
        return ({"dpi": like.dpi} if like.dpi else {}), notes
    if form == "jpeg":
        if block and len(block) > jpegs.MOST_IN_SEGMENT:
            tags = exif.parse(block, notes)
            block, left_out = exif.block(tags, pixels.shape[1], pixels.shape[0], jpegs.MOST_IN_SEGMENT)
            notes += left_out
        if like.xmp and jpegs.xmp_segment(like.xmp) is None:
            notes.append(f"its XMP of {len(like.xmp):,} bytes is left out, as a JPEG has no room for it")
    if like.icc and form == "jpeg" and len(like.icc) > _MOST_ICC:
        notes.append(f"its colour profile of {len(like.icc):,} bytes is left out, as a JPEG has no room for it")
    elif like.icc:
        about["icc_profile"] = like.icc
    if block:
        about["exif"] = block
    if like.dpi and form in ("jpeg", "png") and max(like.dpi) < 65535:
        about["dpi"] = like.dpi
    return about, notes


def _xmp_text(xmp: bytes) -> bytes:
    """XMP as the content of a PNG's iTXt chunk."""
    return png.XMP_KEYWORD + bytes(5) + xmp


def _write_deep_png(file: BinaryIO, pixels: np.ndarray, like: Photograph) -> None:
    """16 bits a channel, which PIL can't write: OpenCV's PNG, with chunks put behind its header."""
    turned = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    plain = cv2.imencode(".png", turned)[1].tobytes()
    header = 33  # bytes: signature and IHDR
    file.write(plain[:header])
    if like.icc:
        file.write(png.chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(like.icc)))
    if like.dpi:
        file.write(png.chunk(b"pHYs", struct.pack(">IIB", *png.pixels_per_metre(like.dpi), 1)))
    if like.exif:
        file.write(png.chunk(b"eXIf", like.exif.removeprefix(b"Exif\0\0")))
    if like.xmp:
        file.write(png.chunk(b"iTXt", _xmp_text(like.xmp)))
    file.write(memoryview(plain)[header:])


def _write_tiff(file: BinaryIO, pixels: np.ndarray, like: Photograph) -> None:
    """A TIFF of any depth, uncompressed: the directories, EXIF's within, then the pixels."""
    height, width, channels = pixels.shape
    if pixels.nbytes >= 2**32 - 2**26:  # with room for the directories
        raise ValueError("a TIFF holds no more than 4 GiB of pixels")
    about = exif.parse(like.exif, []) if like.exif else exif.Exif()
    order = about.order

    def shorts(*values: int) -> exif.Tag:
        return exif.number(order, ifd.SHORT, *values)

    def longs(*values: int) -> exif.Tag:
        return exif.number(order, ifd.LONG, *values)

    tags = {
        256: longs(width), 257: longs(height), 258: shorts(*[8 * pixels.itemsize] * channels),
        259: shorts(1), 262: shorts(2), 273: longs(0), 277: shorts(channels), 278: longs(height),
        279: longs(pixels.nbytes), 284: shorts(1),  # plain RGB, interleaved, in one strip
    }  # fmt: skip
    if channels == 4:
        tags[338] = shorts(2)  # alpha, not multiplied in
    if like.icc:
        tags[34675] = exif.Tag(ifd.UNDEFINED, len(like.icc), like.icc)
    if like.xmp:
        tags[700] = exif.Tag(ifd.BYTE, len(like.xmp), like.xmp)
    if like.dpi and 282 not in about.main:
        ratios = [Fraction(value).limit_denominator(10_000) for value in like.dpi]
        for tag, ratio in zip((282, 283), ratios, strict=True):
            content = struct.pack(f"{order}II", ratio.numerator, ratio.denominator)
            tags[tag] = exif.Tag(ifd.RATIONAL, 1, content)
        tags[296] = shorts(2)
    head = exif.header(order)
    behind = len(head) + len(exif.directories(about, width, height, len(head), tags))
    tags[273] = longs(behind)
    file.write(head + exif.directories(about, width, height, len(head), tags))
    file.write(memoryview(np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(order))).cast("B"))
