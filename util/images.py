"""Image files: any of them into RGB, and back."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
JPEG_QUALITY = 95

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
        deep = _read_deep(path) if is_deep(image) else None
        return np.asarray(to_rgb(image), np.float32) / 255 if deep is None else deep


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
        deep = _read_deep(path) if is_deep(image) else None
        return to_rgb(image) if deep is None else Image.fromarray(_to_bytes(deep))


def write_image(path: Path, array: np.ndarray) -> None:
    """Write an RGB image in the format that the file's suffix names.

    Args:
        path: the file; its folder must exist.
        array: (H, W, 3), uint8, or floating point in 0..1 (clipped to that, then rounded to 8 bits).

    Raises:
        UserError: the file cannot be written, or no format has that suffix.
    """
    try:
        Image.fromarray(array if array.dtype == np.uint8 else _to_bytes(array)).save(path, quality=JPEG_QUALITY)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def check_image(path: Path) -> tuple[int, int]:
    """Check at the cost of a glance that an image is whole.

    Reads the header and the file's end; only where the end is not the usual one is the image decoded.

    Returns:
        Width and height in pixels, after EXIF orientation.

    Raises:
        UserError: as `read_image`; a truncated file included.
    """
    with opened(path) as image:
        if not _ends_well(path, image.format):
            return ImageOps.exif_transpose(image).size
        # The base class's getexif: the PNG reader's own decodes the whole image to look for EXIF behind it.
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by PIL, whatever goes wrong within becoming a UserError that names the file."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise UserError(f"{path}: floating-point images are not supported; convert it to 16 bits")
            if image.format == "TIFF":
                image.filename = ""  # else PIL maps a plain RGBA file into memory, and some versions don't turn it then
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image, or damaged") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from error
    except Exception as error:  # on a damaged file PIL's readers raise nearly anything
        raise UserError(f"{path}: cannot be read: {error}") from error


def _ends_well(path: Path, kind: str | None) -> bool:
    """Whether the file's last bytes hold its format's end mark (and, of a PNG, no late EXIF)."""
    if kind not in _ENDINGS:
        return False
    with Path(path).open("rb") as file:
        file.seek(-min(_TAIL, file.seek(0, 2)), 2)
        tail = file.read()
    return _ENDINGS[kind] in tail[-_END:] and b"eXIf" not in tail


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet decoded image has more than 8 bits a channel."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)


def _read_deep(path: Path) -> np.ndarray | None:
    """A 16-bit file by OpenCV, as PIL would cut its colours to 8 bits; None where OpenCV cannot read it."""
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
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
    return image.convert("RGB")


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """0..1 to 0..255, rounded."""
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
