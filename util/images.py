"""Image files: read any of them as RGB, check them, write them."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util import disk
from util.errors import UserError, printable

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
JPEG_QUALITY = 95

# The only formats that PIL may recognise, whatever a file's name. Its PostScript reader, for example, runs another
# program.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "HEIF")
_MOST_BYTES = 2**31  # of a file, because some formats are read as a whole
_FEW_PIXELS, _MOST_PER_BYTE = 2**24, 2000  # a larger image than the first has at most the second per byte of file
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are the orientations that swap width and height
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL = 4096  # bytes at a file's end that are read
_END = 64  # bytes at its end that must contain the end mark


def read_image(path: Path) -> np.ndarray:
    """Read any image file as RGB, at full precision.

    Orientation (EXIF) is applied; grey, palette and CMYK become RGB; transparency is dropped; 16-bit files
    keep their 16 bits.

    Returns:
        float32 (H, W, 3) in 0..1.

    Raises:
        UserError: the file is missing, damaged, not an image or far too large; the message names it.
    """
    with opened(path) as image:
        deep = _read_deep(image) if is_deep(image) else None
        return np.divide(to_rgb(image), 255, dtype=np.float32) if deep is None else deep


def read_rgb(path: Path, least: int = 0) -> Image.Image:
    """Read any image file as an 8-bit RGB image of PIL, which can be resized.

    Args:
        path: the file.
        least: short side, in pixels, that is enough. A JPEG whose short side is at least twice as long is decoded at a
            half, a quarter or an eighth of its size, which is several times as fast. 0 keeps the size.

    Raises:
        UserError: as `read_image`.
    """
    with opened(path) as image:
        if least and image.format == "JPEG":
            scale = least / min(image.size)
            image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
        deep = _read_deep(image) if is_deep(image) else None
        return to_rgb(image) if deep is None else Image.fromarray(_to_bytes(deep))


def write_image(path: Path, array: np.ndarray) -> None:
    """Write an RGB image in the format that the file's suffix names.

    Args:
        path: the file; its folder must exist.
        array: (H, W, 3), uint8, or floating point in 0..1 (clipped to that, then rounded to 8 bits).

    Raises:
        UserError: the file cannot be written, or no format has that suffix.
    """
    image = Image.fromarray(array if array.dtype == np.uint8 else _to_bytes(array))
    with disk.replacing(path) as temporary:
        try:
            image.save(temporary, quality=JPEG_QUALITY)
        except ValueError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error


def check_image(path: Path, decoded: bool = False) -> tuple[int, int]:
    """Check that an image is whole.

    Args:
        path: the file.
        decoded: decode the whole image. Otherwise only the header and the end of the file are checked, and the image is
            decoded only if the end isn't the usual one; damage in between stays undetected.

    Returns:
        Width and height in pixels, after EXIF orientation.

    Raises:
        UserError: as `read_image`, and for a truncated file.
    """
    if decoded:
        return read_rgb(path).size
    with opened(path) as image:
        if not _ends_well(image):
            return ImageOps.exif_transpose(image).size
        # The base class's getexif, because that of PNG decodes the whole image to look for EXIF after the pixels.
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image by PIL; every error in this block becomes a UserError that names the file.

    Only regular files are opened. They are not mapped into memory: if another program truncated a mapped file, this
    process would be killed. An image that claims more pixels than PIL's limit, or very many in a few bytes, is not
    decoded.
    """
    name = printable(path)
    try:
        with _open_file(path, name) as file, Image.open(file, formats=_readable()) as image:
            size = os.fstat(file.fileno()).st_size
            if math.prod(image.size) > max(_FEW_PIXELS, _MOST_PER_BYTE * size):
                width, height = image.size
                raise UserError(
                    f"{name}: claims {width:,} x {height:,} pixels in {size:,} bytes; no photograph has that"
                )
            if image.mode == "F":
                raise UserError(f"{name}: floating-point images are not supported; convert it to 16 bits")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        what = "a link to a file that isn't there" if Path(path).is_symlink() else "there is no such file"
        raise UserError(f"{name}: {what}") from None
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image, or damaged") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from error
    except OSError as error:  # its own text would repeat the name
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # PIL's readers raise many kinds of errors for damaged files
        raise UserError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from error


def _open_file(path: Path, name: str) -> BinaryIO:
    """Open a regular file that is neither empty nor too large."""
    # Without O_NONBLOCK, opening a fifo would wait until another process writes to it.
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    status = os.fstat(file.fileno())
    wrong = None
    if not stat.S_ISREG(status.st_mode):
        wrong = "a fifo, socket or device, not a file"
    elif not status.st_size:
        wrong = "an empty file"
    elif status.st_size > _MOST_BYTES:
        wrong = f"larger than {_MOST_BYTES / 2**30:g} GiB"
    if wrong:
        file.close()
        raise UserError(f"{name}: {wrong}")
    return file


def _readable() -> list[str]:
    """The formats, of `_FORMATS`, that this PIL can read."""
    Image.init()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _ends_well(image: Image.Image) -> bool:
    """Whether the last bytes of an opened file contain its format's end mark, and no EXIF after a PNG's pixels."""
    if image.format not in _ENDINGS:
        return False
    place = image.fp.tell()
    image.fp.seek(-min(_TAIL, image.fp.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = image.fp.read()
    image.fp.seek(place)
    return _ENDINGS[image.format] in tail[-_END:] and b"eXIf" not in tail


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet decoded image has more than 8 bits a channel."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)


def decode(image: Image.Image, flags: int) -> np.ndarray | None:
    """The pixels of an opened, not yet decoded image as OpenCV reads them; None if it can't."""
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def _read_deep(image: Image.Image) -> np.ndarray | None:
    """Read a 16-bit file by OpenCV, because PIL would reduce it to 8 bits; None if OpenCV can't read it."""
    pixels = decode(image, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        return None
    return np.divide(pixels[:, :, ::-1], np.iinfo(pixels.dtype).max, dtype=np.float32)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image; turn it upright; convert it to RGB."""
    if image.mode.startswith("I"):
        raise ValueError(f"pixels of kind {image.mode} are not supported")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "P":
        image = image.convert("RGBA")  # applies the palette; a direct conversion warns about its transparency
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """0..1 to 0..255, rounded."""
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
