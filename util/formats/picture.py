"""What every format gives: a picture that is open, not yet decoded."""

from __future__ import annotations

import abc
import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError

from dereflect.util.formats.exif import Exif, parse
from dereflect.util.formats.source import RefusedError, Source

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` knows better

_FEW_PIXELS, _MOST_PER_BYTE = 2**24, 2000  # more pixels than the first need a file with a byte for so many
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=[\"']|>)([1-8])")

# What each EXIF orientation asks a viewer to do.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


Box = tuple[float, float, float, float]


@dataclass
class About:
    """What a file says about its picture.

    Attributes:
        icc: the colour profile.
        exif: EXIF's tags.
        xmp: the XMP packet.
        dpi: pixels an inch, across and down, where the format has them outside of EXIF.
        notes: a line for everything that is damaged and left out.
    """

    icc: bytes | None = None
    exif: Exif = field(default_factory=Exif)
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def orientation(self) -> int:
        """1 to 8, as EXIF has it, or else XMP."""
        if not self.exif.orientation and self.xmp and (found := _XMP_ORIENTATION.search(self.xmp)):
            return int(found[2])
        return self.exif.orientation or 1

    def upright_xmp(self) -> bytes | None:
        """XMP of the picture once it has been turned."""
        return self.xmp and _XMP_ORIENTATION.sub(rb"tiff:Orientation\g<1>1", self.xmp)


class Picture(abc.ABC):
    """A file whose header has been read. Colours and sizes are as stored, not turned.

    Attributes:
        kind: the format.
        width, height: in pixels.
        deep: whether `samples` gives 16 bits.
        inks: whether the colours are stored as inks, CMYK.
    """

    kind: str
    width: int
    height: int
    deep: bool = False
    inks: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def orientation(self) -> int:
        """The EXIF orientation."""
        return self.about(brief=True).orientation

    @abc.abstractmethod
    def about(self, brief: bool = False) -> About:
        """What else the file says; a brief look is for the orientation alone. Nothing wrong with it is raised."""

    @abc.abstractmethod
    def glance(self) -> bool:
        """Whether the file looks whole by its header, lengths and end. Nothing is decoded."""

    def check(self) -> None:
        """Go through all pixels, holding as few of them as the format allows; what is wrong is raised."""
        self.rgb()

    def rgb(self, draft: tuple[int, int] | None = None) -> Image.Image:
        """8-bit RGB, decoded at a half, a quarter or an eighth where that is not smaller than `draft`.

        Then `info["extent"]` is the box of the whole picture, in pixels of the small one.
        """
        colours, _ = self.samples()
        return Image.fromarray(to_bytes(colours))

    @abc.abstractmethod
    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Colours (H, W, 3), uint8 or uint16, and alpha (H, W) of the same type, if the file has one."""


class PilPicture(Picture):
    """What PIL decodes, to 8 bits.

    Args:
        kind: PIL's name of the format; it takes the file for no other.
        source: the whole file.
        file: what PIL is to read.
        whole: tells whether the file looks whole.
        about: gives what the file says; without it, that is what PIL found.
    """

    def __init__(
        self,
        kind: str,
        source: Source,
        file: object,
        whole: Callable[[], bool],
        about: Callable[[bool], About] | None = None,
    ) -> None:
        self.kind = kind
        self.image = _open(kind, file)
        self.width, self.height = self.image.size
        check_size(self.width, self.height, source)
        self.inks = self.image.mode == "CMYK"
        self._whole = whole
        self._about = about
        if self.image.mode.startswith(("I", "F")):
            raise RefusedError(f"a {kind} file with pixels of kind {self.image.mode} is not supported; convert it")

    def about(self, brief: bool = False) -> About:
        return self._about(brief) if self._about else _about_of(self.image.info, brief)

    def glance(self) -> bool:
        return self._whole()

    def check(self) -> None:
        self._load()

    def rgb(self, draft: tuple[int, int] | None = None) -> Image.Image:
        drafted = self.image.draft("RGB", draft) if draft and self.kind == "JPEG" else None
        self._load()
        image = self.image
        if image.mode == "P":
            image = image.convert("RGBA")  # applies the palette where its transparency would only draw a warning
        if image.mode != "RGB":  # to convert it would copy it
            image = image.convert("RGB")
        if drafted and image.size != self.size:
            image.info["extent"] = drafted[1]
        return image

    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        alpha = None
        if self.image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in self.image.info:
            self._load()
            alpha = np.asarray(self.image.convert("RGBA").getchannel("A"))
        return np.asarray(self.rgb()), alpha

    def _load(self) -> None:
        """Decode."""
        self.image.load()


def _open(kind: str, file: object) -> Image.Image:
    """A file of a format, whose size `check_size` is still to look at."""
    try:
        return Image.open(file, formats=[kind])
    except Image.DecompressionBombError as error:
        raise RefusedError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise RefusedError("not an image, or damaged") from error


def check_size(width: int, height: int, source: Source) -> None:
    """Refuse what claims more pixels than PIL's limit, or a great many in a few bytes, and what has none.

    Raises:
        RefusedError: it does.
    """
    if width < 1 or height < 1:
        raise RefusedError("not an image, or damaged")
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise RefusedError(f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; scale it down")
    if width * height > max(_FEW_PIXELS, _MOST_PER_BYTE * source.size):
        raise RefusedError(f"claims {width:,} x {height:,} pixels in {source.size:,} bytes; no photograph has that")


def _about_of(info: dict, brief: bool) -> About:
    """What PIL found beside the pixels."""
    about = About(icc=info.get("icc_profile"), xmp=info.get("xmp"))
    if exif := info.get("exif"):
        about.exif = parse(exif, about.notes, brief)
    with contextlib.suppress(TypeError, ValueError):
        across, down = info.get("dpi", ())
        about.dpi = float(across), float(down)
    return about


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) turned as an EXIF orientation asks; a view."""
    return _UPRIGHT.get(orientation, lambda a: a)(pixels)


def turned_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A box (left, top, right, bottom) in an image of that size, once that is turned as an orientation asks."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """uint8 or uint16 as uint8, rounded; row by row, to take no memory beside."""
    return as_type(values, np.dtype(np.uint8))


def as_type(values: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Whole numbers of 8 or 16 bits as those of the other depth, rounded; row by row, to take no memory beside."""
    if values.dtype == wanted:
        return values
    result = np.empty(values.shape, wanted)
    for row, given in zip(result, values, strict=True):
        wide = given.astype(np.uint32)
        row[:] = wide * 257 if wanted == np.uint16 else (wide + 128) // 257
    return result
