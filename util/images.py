"""Image files: any of them into RGB, and back."""

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

# What PIL may take a file for, whatever its name. Its reader of PostScript, for one, runs another program.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "HEIF")
_MOST_BYTES = 2**31  # of a file, as some formats are read as a whole
_FEW_PIXELS, _MOST_PER_BYTE = 2**24, 2000  # more pixels than the first need a file with a byte for so many
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are the orientations that swap width and height
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL = 4096  # bytes at a file's end that are looked at, and in how many of them its end mark must be
_END = 64


def read_image(path: Path) -> np.ndarray:
    """Any image file as RGB, at full precision.

    Orientation (EXIF) is applied; grey, palette and CMYK become RGB; transparency is dropped; 16-bit files
    keep their 16 bits.

    Returns:
        float32 (H, W, 3) in 0..1.

    Raises:
        UserError: the file is missing, damaged, not an image or suspiciously huge; the message names it.
    """
    with opened(path) as image:
        deep = _read_deep(image) if is_deep(image) else None
        return np.divide(to_rgb(image), 255, dtype=np.float32) if deep is None else deep


def read_rgb(path: Path, least: int = 0) -> Image.Image:
    """Any image file as an 8-bit RGB PIL image: what `read_image` gives, in the form that PIL resizes.

    Args:
        path: the file.
        least: a short side, in pixels, that is enough. A JPEG that has twice that and more is decoded at the half, a
            quarter or an eighth of its size, which is some times as fast; 0 always gives the image as it is.

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
        decoded: read all of it. Without that a glance has to do: at the header and the file's end; only where the end
            is not the usual one is the image decoded. Damage in between stays unseen.

    Returns:
        Width and height in pixels, after EXIF orientation.

    Raises:
        UserError: as `read_image`; a truncated file included.
    """
    if decoded:
        return read_rgb(path).size
    with opened(path) as image:
        if not _ends_well(image):
            return ImageOps.exif_transpose(image).size
        # The base class's getexif: the PNG reader's own decodes the whole image to look for EXIF behind it.
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by PIL, whatever goes wrong within becoming a UserError that names the file.

    Nothing but a file is opened, and none is mapped into memory: one that someone cuts short would end this process.
    What claims more pixels than PIL's limit, or a great many in a few bytes, is not decoded.
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
    except OSError as error:  # its own text has the name once more
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # on a damaged file PIL's readers raise nearly anything
        raise UserError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from error


def _open_file(path: Path, name: str) -> BinaryIO:
    """A plain file that is not empty."""
    # Opening a fifo would otherwise wait for somebody who writes to it.
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
    """Those of the formats that PIL has a reader for."""
    Image.init()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _ends_well(image: Image.Image) -> bool:
    """Whether the last bytes of an opened file hold its format's end mark (and, of a PNG, no late EXIF)."""
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
    """The pixels of an opened, not yet decoded image as OpenCV reads them; None where it can't."""
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def _read_deep(image: Image.Image) -> np.ndarray | None:
    """A 16-bit file by OpenCV, as PIL would cut its colours to 8 bits; None where OpenCV cannot read it."""
    pixels = decode(image, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        return None
    return np.divide(pixels[:, :, ::-1], np.iinfo(pixels.dtype).max, dtype=np.float32)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decoded, upright and RGB."""
    if image.mode.startswith("I"):
        raise ValueError(f"pixels of kind {image.mode} are not supported")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "P":
        image = image.convert("RGBA")  # applies the palette where its transparency would only draw a warning
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """0..1 to 0..255, rounded."""
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
