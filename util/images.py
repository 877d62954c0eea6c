"""Image files: any of them into RGB, and back. What a file is, `util.formats` finds in it; its name says nothing."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dereflect.util import disk
from dereflect.util.errors import UserError, printable
from dereflect.util.formats import SUFFIXES, Picture, RefusedError, Source, open_picture
from dereflect.util.formats.picture import TURNS, turned_box, upright

JPEG_QUALITY = 95

_MOST_BYTES = 2**31  # of a file, as some formats are read as a whole

__all__ = ["JPEG_QUALITY", "SUFFIXES", "check_image", "opened", "read_image", "read_rgb", "write_image"]


def read_image(path: str | Path) -> np.ndarray:
    """Any image file as RGB, at full precision.

    Orientation (EXIF) is applied; grey, palette and CMYK become RGB; transparency is dropped; 16-bit files
    keep their 16 bits.

    Returns:
        float32 (H, W, 3) in 0..1.

    Raises:
        UserError: the file is missing, damaged, not an image, of a kind that isn't read, or suspiciously huge; the
            message names it.
    """
    with opened(path) as picture:
        if not picture.deep:
            return np.divide(_turned(picture, picture.rgb()), 255, dtype=np.float32)
        colours, _ = picture.samples()
        return np.divide(upright(colours, picture.orientation()), 65535, dtype=np.float32)


def read_rgb(path: str | Path, least: int = 0) -> Image.Image:
    """Any image file as an 8-bit RGB PIL image: what `read_image` gives, in the form that PIL resizes.

    Args:
        path: the file.
        least: a short side, in pixels, that is enough. A JPEG that has twice that and more is decoded at the half, a
            quarter or an eighth of its size, which is some times as fast; 0 always gives the image as it is. Of one
            that was made smaller, `info` has the full "size", and as "extent" the box (left, top, right, bottom), in
            pixels of the small one, that the full one fills: it ends within the last pixels where the size can't be
            divided.

    Raises:
        UserError: as `read_image`.
    """
    with opened(path) as picture:
        scale = least / min(picture.size)
        return _turned(picture, picture.rgb(tuple(math.ceil(side * scale) for side in picture.size) if least else None))


def write_image(path: str | Path, array: np.ndarray) -> None:
    """Write an RGB image in the format that the file's suffix names.

    Args:
        path: the file; its folder must exist.
        array: (H, W, 3), uint8, or floating point in 0..1 (clipped to that, then rounded to 8 bits).

    Raises:
        UserError: the file cannot be written, or no format has that suffix.
    """
    image = Image.fromarray(array if array.dtype == np.uint8 else (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8))
    with disk.replacing(Path(path)) as temporary:
        try:
            image.save(temporary, quality=JPEG_QUALITY)
        except ValueError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error


def check_image(path: str | Path, decoded: bool = False) -> tuple[int, int]:
    """Check that an image is whole.

    Args:
        path: the file.
        decoded: go through all of it, holding as little of it as its format allows. Without that a glance has to do:
            at the header, the lengths and the file's end; only where that doesn't tell is the image decoded. Damage in
            between stays unseen.

    Returns:
        Width and height in pixels, after EXIF orientation.

    Raises:
        UserError: as `read_image`; a truncated file included.
    """
    with opened(path) as picture:
        if decoded or not picture.glance():
            picture.check()
        return picture.size[::-1] if picture.orientation() >= 5 else picture.size


@contextmanager
def opened(path: str | Path) -> Iterator[Picture]:
    """The picture in a file, whatever goes wrong within becoming a UserError that names the file.

    Nothing but a file is opened, and none is mapped into memory: one that someone cuts short would end this process.
    What claims more pixels than PIL's limit, or a great many in a few bytes, is not decoded.
    """
    name = printable(path)
    try:
        with _open_file(path, name) as file:
            yield open_picture(Source(file, os.fstat(file.fileno()).st_size))
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"{name}: {error}") from error
    except FileNotFoundError:
        what = "a link to a file that isn't there" if Path(path).is_symlink() else "there is no such file"
        raise UserError(f"{name}: {what}") from None
    except OSError as error:  # its own text has the name once more
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # on a damaged file PIL's readers raise nearly anything
        raise UserError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from error


def _open_file(path: str | Path, name: str) -> BinaryIO:
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


def _turned(picture: Picture, image: Image.Image) -> Image.Image:
    """Upright; of what was decoded at a smaller size, with its full size and the box that it fills."""
    extent, orientation = image.info.get("extent"), picture.orientation()
    turned = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    turned.info = {}
    if extent:
        size = picture.size[::-1] if orientation >= 5 else picture.size
        turned.info = {"size": size, "extent": turned_box(extent, image.size, orientation)}
    return turned
