"""Photographs as files: pixels at their own depth, and the metadata that an edit must keep.

The ICC profile, which defines the meaning of the colours, is copied to the edited file, not applied to the pixels.
"""

import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from util import disk
from util.errors import UserError
from util.images import JPEG_QUALITY, SUFFIXES, decode, is_deep, opened, to_rgb

FORMATS = {"jpeg": ".jpg", "png": ".png", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp", "heic": ".heic"}
"""The formats that can be written, with their usual suffixes."""

READABLE = SUFFIXES | {".heic", ".heif"}
"""Suffixes of the files that count as photographs."""

_BY_SUFFIX = {suffix: name for name, suffix in FORMATS.items()} | {".jpeg": "jpeg", ".tiff": "tiff", ".heif": "heic"}
_WITH_ALPHA = {"png", "webp", "tiff", "heic"}
_DEEP = {"png", "tiff"}

_ORIENTATION, _EXIF, _GPS = 0x0112, 0x8769, 0x8825
# Tags of the main directory that describe the photograph, not the file: description, make, model, resolution,
# software, date, artist, host, copyright, and those of Windows.
_DESCRIBING = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, *range(0x9C9B, 0x9CA0))
_LONG, _UNDEFINED = 4, 7  # types of TIFF's values
_INTEROPERABILITY, _EXIF_WIDTH, _EXIF_HEIGHT = 0xA005, 0xA002, 0xA003

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""How each EXIF orientation is turned upright."""


@dataclass(frozen=True)
class Photograph:
    """A decoded file, upright.

    Attributes:
        pixels: RGB, uint8 or uint16, (H, W, 3).
        alpha: (H, W) of the same type, or None for a file without.
        icc: the profile of an RGB file.
        exif: the block as it is in a JPEG, with an upright orientation and without a thumbnail.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None


def format_of(path: Path) -> str:
    """The format, of FORMATS, that a file's suffix names; PNG for formats that can't be written."""
    return _BY_SUFFIX.get(path.suffix.lower(), "png")


def suffix_for(path: Path, form: str) -> str:
    """The suffix for a result in a format of FORMATS: the suffix of the source file, if it names this format."""
    return path.suffix if _BY_SUFFIX.get(path.suffix.lower()) == form else FORMATS[form]


def depth_of(photograph: Photograph, form: str) -> np.dtype:
    """The type of pixels in which a format of FORMATS can hold a photograph: its own type, or uint8."""
    return photograph.pixels.dtype if form in _DEEP else np.dtype(np.uint8)


def as_type(values: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Convert integers of 8 or 16 bits to `wanted`, rounded; row by row, which needs no further memory."""
    if values.dtype == wanted:
        return values
    result = np.empty(values.shape, wanted)
    for row, given in zip(result, values, strict=True):
        wide = given.astype(np.uint32)
        row[:] = wide * 257 if wanted == np.uint16 else (wide + 128) // 257
    return result


def read_photograph(path: Path) -> Photograph:
    """Read any image file at its own depth, upright, with its metadata.

    Raises:
        UserError: the file is missing, damaged, not an image, or a HEIC file while pillow-heif isn't installed.
    """
    _prepare_heic(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with opened(path) as image:
            deep = _read_deep(image) if is_deep(image) else None
            if image.format == "PNG":
                image.load()  # EXIF may follow the pixels; of a TIFF, EXIF can't be read after the pixels
            orientation, exif = image.getexif().get(_ORIENTATION, 1), _cleaned(image.getexif())
            icc = image.info.get("icc_profile")
            mode, is_tiff = image.mode, image.format == "TIFF"
            if deep is None:
                pixels, alpha = _split(image)
            else:
                turn = _UPRIGHT.get(1 if is_tiff else orientation, lambda a: a)  # OpenCV itself turns a TIFF
                pixels, alpha = (part if part is None else np.ascontiguousarray(turn(part)) for part in deep)
            fits = icc and mode != "CMYK" and icc[16:20] == b"RGB "  # the colour space, in a profile's header
            return Photograph(pixels, alpha, icc if fits else None, _written(exif, pixels.shape))


def write_photograph(path: Path, pixels: np.ndarray, like: Photograph, form: str) -> None:
    """Write pixels as an edit of a photograph, with its profile, EXIF and alpha if the format can hold them.

    The file appears under its name only when it is complete.

    Args:
        path: the file; its folder must exist.
        pixels: RGB (H, W, 3), of the type that `depth_of` returns.
        like: the photograph. Its alpha is used if it has the size of the pixels.
        form: of FORMATS.

    Raises:
        UserError: the file can't be written, or the format can't hold an image of this size.
    """
    alpha = like.alpha
    if alpha is not None and alpha.shape == pixels.shape[:2] and form in _WITH_ALPHA:
        pixels = np.dstack([pixels, as_type(alpha, pixels.dtype)])
    try:
        with disk.replacing(path) as temporary, temporary.open("wb") as file:
            _encode(file, pixels, like, form)
    except UserError:
        raise
    except Exception as error:  # what an encoder raises for what it can't hold is anybody's guess
        raise UserError(f"{path}: cannot be written: {error}") from error


def _prepare_heic(path: Path) -> None:
    """Register PIL's reader of HEIC, if the suffix needs it."""
    if path.suffix.lower() not in {".heic", ".heif"}:
        return
    try:
        import pillow_heif
    except ImportError:
        raise UserError(f"{path}: HEIC needs a package: pip install pillow-heif; or convert the file") from None
    pillow_heif.register_heif_opener()


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours and alpha of an 8-bit image, upright."""
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))
    return np.asarray(to_rgb(image)), alpha


def _read_deep(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Colours and alpha of a 16-bit file, as stored; None if OpenCV doesn't find 16 bits."""
    pixels = decode(image, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        return None
    if pixels.ndim == 2:
        return np.dstack([pixels] * 3), None
    return pixels[:, :, 2::-1], pixels[:, :, 3] if pixels.shape[2] == 4 else None


def _cleaned(exif: Image.Exif) -> dict[int, object]:
    """The tags that describe the photograph; the EXIF and GPS directories are dicts."""
    clean: dict[int, object] = {tag: exif[tag] for tag in _DESCRIBING if tag in exif}
    if _ORIENTATION in exif:
        clean[_ORIENTATION] = 1
    for directory in (_EXIF, _GPS):
        content = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != _INTEROPERABILITY}
        if content:
            clean[directory] = content
    return clean


def _written(tags: dict[int, object], shape: tuple[int, ...]) -> bytes | None:
    """The EXIF block with these tags, for pixels of this shape."""
    if not tags:
        return None
    details = tags.get(_EXIF, {})
    if _EXIF_WIDTH in details:
        details |= {_EXIF_WIDTH: shape[1], _EXIF_HEIGHT: shape[0]}
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes()


def _encode(file: BinaryIO, pixels: np.ndarray, like: Photograph, form: str) -> None:
    about = {key: value for key, value in (("icc_profile", like.icc), ("exif", like.exif)) if value}
    if form == "tiff":
        _write_tiff(file, pixels, like)
    elif form == "png" and pixels.dtype == np.uint16:
        _write_deep_png(file, pixels, like)
    elif form == "png":
        Image.fromarray(pixels).save(file, "PNG", **about)
    elif form == "jpeg":
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, **about)
    elif form == "webp":
        Image.fromarray(pixels).save(file, "WEBP", quality=JPEG_QUALITY, **about)
    elif form == "heic":
        _prepare_heic(Path("x.heic"))
        Image.fromarray(pixels).save(file, "HEIF", quality=JPEG_QUALITY, **about)
    else:
        Image.fromarray(pixels).save(file, "BMP")


def _write_deep_png(file: BinaryIO, pixels: np.ndarray, like: Photograph) -> None:
    """Write 16 bits a channel, which PIL can't: the PNG of OpenCV, with chunks inserted after its header."""
    turned = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    plain = cv2.imencode(".png", turned)[1].tobytes()
    header = 33  # bytes: signature and IHDR
    file.write(plain[:header])
    if like.icc:
        file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(like.icc)))
    if like.exif:
        file.write(_chunk(b"eXIf", like.exif.removeprefix(b"Exif\0\0")))
    file.write(memoryview(plain)[header:])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _write_tiff(file: BinaryIO, pixels: np.ndarray, like: Photograph) -> None:
    """Write an uncompressed TIFF of any depth: the directory, which includes EXIF, then the pixels."""
    height, width, channels = pixels.shape
    if pixels.nbytes >= 2**32 - 2**24:  # with room for the directory
        raise ValueError("a TIFF can hold at most 4 GiB of pixels")
    directory = ImageFileDirectory_v2(ifh=b"II*\0\0\0\0\0")
    if like.exif:
        exif = Image.Exif()
        exif.load(like.exif)
        for tag, value in exif.items():
            directory[tag] = exif.get_ifd(tag) if tag in (_EXIF, _GPS) else value
    directory[256], directory[257] = width, height
    directory[258] = (8 * pixels.itemsize,) * channels
    directory[259], directory[262], directory[277], directory[284] = 1, 2, channels, 1  # plain RGB, interleaved
    directory[273], directory[278], directory[279] = 0, height, pixels.nbytes  # pixels right behind the directory
    directory.tagtype[273] = directory.tagtype[279] = _LONG
    if channels == 4:
        directory[338] = 2  # alpha, not multiplied in
    if like.icc:
        directory.tagtype[34675] = _UNDEFINED
        directory[34675] = like.icc
    header = b"II*\0" + struct.pack("<I", 8)
    file.write(header + directory.tobytes(len(header)))
    file.write(memoryview(np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))).cast("B"))
