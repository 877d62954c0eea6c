"""TIFF: which of its directories is the photograph, and of what kind it is; what is of no known kind is named."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import islice

import numpy as np

from dereflect.util.formats import exif, ifd
from dereflect.util.formats.ifd import Directory, Layout
from dereflect.util.formats.jpeg import open_jpeg
from dereflect.util.formats.picture import About, Picture, PilPicture, check_size
from dereflect.util.formats.source import RefusedError, Source, splice
from dereflect.util.formats.tiff_pixels import CMYK, COLOURS, LAB, PACKED, PALETTE, YCBCR, Page, TiffPicture

RAW = "a camera's raw file; develop it first, into a TIFF or PNG"
_PREVIEW, _MASK = 1, 4  # of NewSubfileType
_CFA, _LINEAR_RAW = 32803, 34892  # photometric interpretations: a sensor's pixels
_MOST_PAGES = 64  # that are looked at
_SUBIFDS, _DNG_VERSION, _ICC, _XMP, _JPEG_TABLES = 330, 50706, 34675, 700, 347
_MOST_SEGMENTS = 2**20  # strips or tiles

_PHOTOMETRIC = {4: "a mask", 9: "ICC Lab", 10: "ITU Lab", 32844: "LogL", 32845: "LogLuv"}
_JPEG = 7
_BY_LIBTIFF = {2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", _JPEG: "JPEG"}
_COMPRESSIONS = {
    6: "old-style JPEG", 34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 34887: "LERC", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL", 32771: "CCITT RLE with words", 34892: "lossy JPEG",
}  # fmt: skip


class Tags:
    """A directory's values."""

    def __init__(self, source: Source, layout: Layout, directory: Directory) -> None:
        self.source, self.layout, self.directory = source, layout, directory

    def all(self, tag: int, most: int = _MOST_SEGMENTS) -> tuple[int, ...]:
        """The whole numbers of a tag, none if it isn't there."""
        entry = self.directory.get(tag)
        if entry and entry.count > most:
            raise RefusedError(f"damaged: the tag {tag} has {entry.count:,} values")
        return ifd.whole_numbers(self.source, self.layout, entry)

    def one(self, tag: int, default: int = 0) -> int:
        """The first of them."""
        values = ifd.whole_numbers(self.source, self.layout, self.directory.get(tag), 1)
        return values[0] if values else default

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.one(256), self.one(257)


def open_tiff(source: Source) -> Picture:
    """The photograph in a TIFF.

    Raises:
        RefusedError: it is damaged, a camera's raw file, or of a kind that isn't read.
    """
    layout, first = ifd.layout_of(source)
    if source.upto(8, 2) == b"CR":
        raise RefusedError(RAW)
    main, tags = _photograph(source, layout, first)
    check_size(*tags.size, source)
    page = _page(tags)

    def about(brief: bool) -> About:
        return _about(source, layout, main, tags, brief)

    if page.compression in PACKED:
        return TiffPicture(source, layout.order, page, about)
    return _by_libtiff(source, tags, page, about)


def _photograph(source: Source, layout: Layout, first: int) -> tuple[Directory, Tags]:
    """The first directory, which describes, and the one whose pixels are the photograph's."""
    pages = [Tags(source, layout, page) for page in islice(ifd.directories(source, layout, first), _MOST_PAGES)]
    if not pages:
        raise RefusedError("not an image, or damaged")
    children = []
    for place in (place for page in pages[:8] for place in page.all(_SUBIFDS, 64)):
        try:
            children.append(Tags(source, layout, ifd.directory_at(source, layout, place)[0]))
        except RefusedError:
            continue
    if any(tags.one(262, -1) in (_CFA, _LINEAR_RAW) or _DNG_VERSION in tags.directory for tags in (*pages, *children)):
        raise RefusedError(RAW)
    candidates = [tags for tags in (*pages, *children) if not _is_preview(tags) and min(tags.size) > 0]
    if not candidates:
        return pages[0].directory, pages[0]
    if _is_preview(pages[0]) or min(pages[0].size) < 1:
        return pages[0].directory, max(candidates, key=lambda tags: tags.size[0] * tags.size[1])
    larger = [tags for tags in candidates if _is_larger(tags, pages[0], tags in children)]
    return pages[0].directory, max([pages[0], *larger], key=lambda tags: tags.size[0] * tags.size[1])


def _is_preview(tags: Tags) -> bool:
    return bool(tags.one(254) & (_PREVIEW | _MASK)) or tags.one(255, 1) == 2


def _is_larger(tags: Tags, first: Tags, is_child: bool) -> bool:
    """Whether the first directory is but a preview of this one, although it doesn't say so.

    A directory below another is one's preview by right, so a larger one there has the photograph; and so has another
    page that has the first one's shape, but at least twice its sides.
    """
    (width, height), (small_width, small_height) = tags.size, first.size
    if is_child:
        return width > small_width and height > small_height
    same_shape = abs(width * small_height - height * small_width) <= 0.02 * width * small_height
    return same_shape and width >= 2 * small_width and height >= 2 * small_height


def _page(tags: Tags) -> Page:
    """What the directory says of its pixels.

    Raises:
        RefusedError: they are of a kind that isn't read, or it contradicts itself.
    """
    width, height = tags.size
    samples = tags.one(277, 1)
    depths = tags.all(258, 64) or (1,)
    photometric, compression = tags.one(262, -1), tags.one(259, 1)
    _check_kind(tags, samples, depths, photometric, compression)
    colours = COLOURS[photometric]
    extras = tags.all(338, 64)[: samples - colours]
    if samples > colours and not extras:
        extras = (2,)  # nothing is said: four channels of RGB are taken for RGB and alpha by all programs
    alpha = next((colours + n for n, kind in enumerate(extras) if kind in (1, 2)), None)
    planar = tags.one(284, 1) == 2 and samples > 1
    tiled = 322 in tags.directory
    tile = (tags.one(322), tags.one(323)) if tiled else (width, min(tags.one(278, height) or height, height))
    if min(tile) < 1 or max(tile) > 2**20:
        raise RefusedError("damaged: strips or tiles without a size")
    across, down = -(-width // tile[0]), -(-height // tile[1])
    return Page(
        width, height, depths[0], samples, colours, alpha,
        multiplied=alpha is not None and extras[alpha - colours] == 1,
        photometric=photometric, compression=compression, predictor=tags.one(317, 1), planar=planar,
        reversed_bits=tags.one(266, 1) == 2, tiled=tiled, tile=tile,
        segments=_segments(tags, tiled, across * down * (samples if planar else 1)),
        palette=tags.all(320, 3 * 2**16) if photometric == PALETTE else (),
    )  # fmt: skip


def _check_kind(tags: Tags, samples: int, depths: tuple[int, ...], photometric: int, compression: int) -> None:
    """Raise what the pixels are if they can't be read."""
    bits = depths[0]
    formats = set(tags.all(339, 64)) or {1}
    kind = None
    if formats & {3, 6} or photometric in (32844, 32845):
        raise RefusedError("floating-point images are not supported; convert it to 16 bits")
    if photometric in _PHOTOMETRIC or photometric not in COLOURS:
        kind = f"of {_PHOTOMETRIC.get(photometric, f'the photometric interpretation {photometric}')}"
    elif formats & {2, 5}:
        kind = f"of signed numbers of {bits} bits"
    elif len(set(depths)) > 1:
        kind = f"of channels of {', '.join(map(str, depths))} bits"
    elif not 1 <= bits <= 16:
        kind = f"of {bits} bits a channel"
    elif not COLOURS[photometric] <= samples <= 64:
        kind = f"of {samples} channels, too few or many for its colours"
    elif photometric == CMYK and tags.one(332, 1) != 1:
        kind = "of other inks than cyan, magenta, yellow and black"
    elif compression not in PACKED and compression not in _BY_LIBTIFF:
        kind = f"compressed as {_COMPRESSIONS.get(compression, f'number {compression}')}"
    elif compression in _BY_LIBTIFF and bits not in (1, 8):
        kind = f"of {bits} bits a channel compressed as {_BY_LIBTIFF[compression]}"
    elif photometric == LAB and bits != 8:
        kind = f"of Lab colours of {bits} bits a channel"
    elif photometric == CMYK and not _has_all_of_the_inks(tags, bits):
        kind = "of inks that don't reach from nothing to all"
    elif photometric == YCBCR and (compression != _JPEG and not _is_simple_ycbcr(tags, bits)):
        kind = "of YCbCr with fewer colours than brightness, or of a narrow range"
    elif tags.one(317, 1) not in (1, 2) or (tags.one(317, 1) == 2 and bits not in (8, 16)):
        kind = f"with the predictor {tags.one(317)} at {bits} bits"
    if kind:
        raise RefusedError(f"a TIFF {kind}, which is not supported; convert it to RGB of 8 or 16 bits")


def _has_all_of_the_inks(tags: Tags, bits: int) -> bool:
    """Whether 0 is no ink, and the largest number all of it."""
    dots = tags.all(336, 64)
    return all(pair == (0, 2**bits - 1) for pair in zip(dots[::2], dots[1::2], strict=False))


def _is_simple_ycbcr(tags: Tags, bits: int) -> bool:
    reference = tags.directory.get(532)
    full = True
    if reference is not None and reference.type == ifd.RATIONAL and reference.count == 6:
        content = tags.source.at(reference.place, 48)
        numbers = np.frombuffer(content, f"{tags.layout.order}u4").reshape(6, 2)
        full = (numbers[:, 0].astype(np.int64) == numbers[:, 1] * np.int64([0, 255, 128, 255, 128, 255])).all()
    return bits == 8 and bool(full) and tags.all(530, 2) == (1, 1)


def _segments(tags: Tags, tiled: bool, count: int) -> tuple[tuple[int, int], ...]:
    """First byte and number of bytes of each strip or tile, all within the file."""
    places, lengths = (tags.all(tag) for tag in ((324, 325) if tiled else (273, 279)))
    size = tags.source.size
    if len(places) < count:
        raise RefusedError(f"truncated: {len(places):,} strips or tiles of {count:,}")
    if len(lengths) < count:  # some old programs leave out how long an only one is
        lengths = (size - places[0],) if count == 1 else ()
    if len(lengths) < count:
        raise RefusedError("damaged: strips or tiles without a length")
    segments = tuple(zip(places[:count], lengths[:count], strict=True))
    for place, length in segments:
        if place + length > size:
            raise RefusedError(
                f"truncated: {length:,} bytes of pixels are to stand at {place:,}, the file has {size:,}"
            )
    return segments


def _by_libtiff(source: Source, tags: Tags, page: Page, about: Callable[[bool], About]) -> Picture:
    """What PIL and libtiff decode, to 8 bits, from a directory without what doesn't matter to the pixels."""
    if tags.layout.big:
        raise RefusedError("a BigTIFF of this compression is not supported; convert it")
    told = {}
    for tag in (254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 322, 323, 324, 325, 338,
                339, _JPEG_TABLES, 529, 530, 531, 532):  # fmt: skip
        if tag != 254 and (entry := tags.directory.get(tag)):
            told[tag] = exif.Tag(entry.type, entry.count, source.at(entry.place, entry.length))
    order = tags.layout.order
    start = source.size + source.size % 2
    directory = exif.directories(exif.Exif(order), 0, 0, start, told)
    head = exif.header(order)[:4] + int(start).to_bytes(4, "little" if order == "<" else "big")
    file = splice(source, [head, (8, source.size), bytes(start - source.size), directory])
    picture = (
        _JpegTiff(source, file, about, tags, page)
        if page.compression == _JPEG
        else PilPicture("TIFF", source, file, lambda: True, about)
    )
    if picture.size != (page.width, page.height):
        raise RefusedError("damaged")
    return picture


class _JpegTiff(PilPicture):
    """What libtiff decodes once each strip or tile, a JPEG, has been seen to be whole; it says nothing of its own."""

    def __init__(
        self, source: Source, file: io.BufferedReader, about: Callable[[bool], About], tags: Tags, page: Page
    ) -> None:
        super().__init__("TIFF", source, file, lambda: False, about)
        self._source, self._segments = source, page.segments
        self._tables = _content(source, tags.directory.get(_JPEG_TABLES)) or b""

    def _load(self) -> None:
        for segment in self._segments:
            content = self._source.at(*segment)
            open_jpeg(Source.of(self._tables[:-2] + content[2:] if self._tables else content)).check()
        super()._load()


def _about(source: Source, layout: Layout, main: Directory, tags: Tags, brief: bool) -> About:
    """What the first directory says; the photograph's own has the last word on which way up it is."""
    about = About()
    own = exif.orientation_of(source, layout, tags.directory)
    if brief:
        about.exif.orientation = own or exif.orientation_of(source, layout, main)
    else:
        about.exif = exif.collect(source, layout, main, about.notes)
        about.exif.orientation = own or about.exif.orientation
        about.icc = _content(source, tags.directory.get(_ICC) or main.get(_ICC))
    about.xmp = _content(source, main.get(_XMP))
    return about


def _content(source: Source, entry: ifd.Entry | None) -> bytes | None:
    return source.at(entry.place, entry.length) if entry and entry.length <= 2**24 else None
