"""JPEG: PIL decodes what the header says of the pixels; EXIF, XMP, profile and the rest are read apart.

libjpeg fills what is missing of a file that was cut with grey, or leaves it blurred, without an error. So data are put
behind those of a file that may be cut: they change the picture only if something was missing.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field

from PIL import Image, ImageChops

from dereflect.util.formats import exif
from dereflect.util.formats.picture import About, PilPicture
from dereflect.util.formats.source import Part, RefusedError, Source, splice

MOST_IN_SEGMENT = 65533
"""Bytes that a segment can hold."""

EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frames, less those of tables
_DECODED = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the frames that libjpeg decodes: Huffman or arithmetic, progressive or not
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, {0xC9, 0xCA}
_SCAN, _END, _COMMENT = 0xDA, 0xD9, 0xFE
_EOI = b"\xff\xd9"
_BEHIND_PIXELS = re.compile(rb"\xff[^\x00\xff\xd0-\xd8\x01]")  # a marker that isn't one of those within data
_LETTERS = bytes(number * 167 % 255 for number in range(4096))  # of pixels, whatever they mean
_FILLING = _LETTERS + b"".join(bytes([0xFF, 0xD0 + number % 8]) + _LETTERS[:512] for number in range(16))
_BLOCK = 2**20  # bytes that are looked through at a time
_TAIL, _NEAR_END = 4096, 64  # bytes at a file's end that are looked at, and in how many its end mark must be
_MOST_SEGMENTS = 10_000
_MOST_METADATA = 2**25  # bytes


@dataclass
class _Header:
    """What stands before the pixels.

    Attributes:
        kept: the segments that decoding needs.
        told: (marker, first byte, last) of those that tell something.
        frame: the marker of the pixels' frame.
        scan: where the first scan begins.
    """

    kept: list[bytes] = field(default_factory=list)
    told: list[tuple[int, int, int]] = field(default_factory=list)
    frame: int = 0
    scan: int = 0


def open_jpeg(source: Source) -> PilPicture:
    """A JPEG, by its header.

    Raises:
        RefusedError: it is damaged, or of a kind that isn't decoded.
    """
    return _Jpeg(source, _header(source))


class _Jpeg(PilPicture):
    """What PIL decodes, once it has been seen that all of it is there.

    Args:
        source: the file.
        header: what stands before its pixels.
    """

    def __init__(self, source: Source, header: _Header) -> None:
        self._source, self._header = source, header
        super().__init__("JPEG", source, self._file(source.size), lambda: _ends_well(source),
                         lambda brief: _about(source, header.told, brief))  # fmt: skip

    def check(self) -> None:
        self.image.draft(None, self._reduced())
        self._load()
        self._see_whether_all_is_there(thorough=True)

    def rgb(self, draft: tuple[int, int] | None = None) -> Image.Image:
        image = super().rgb(draft)
        self._see_whether_all_is_there(thorough=draft is None)
        return image

    def _file(self, end: int, filling: bytes = b"") -> io.BufferedReader:
        """The file without what doesn't decide on the pixels, up to a place, and what is to stand behind that."""
        parts: list[Part] = [b"\xff\xd8", *self._header.kept, (self._header.scan, end), filling + _EOI]
        return splice(self._source, parts)

    def _reduced(self) -> tuple[int, int]:
        """A size at which all that is coded still shows: in a progressive one, a scan may hold but fine detail."""
        factor = 2 if self._header.frame in _PROGRESSIVE else 8
        return max(1, self.width // factor), max(1, self.height // factor)

    def _see_whether_all_is_there(self, thorough: bool) -> None:
        """Refuse what is cut, once it is decoded.

        Args:
            thorough: look into a progressive one, too, whatever it ends in, which takes some times as long as to decode
                it. The pixels that others lack are grey.
        """
        frame = self._header.frame
        last = self.image.getpixel((self.image.width - 1, self.image.height - 1))
        is_grey = all(126 <= value <= 129 for value in (last if isinstance(last, tuple) else (last,)))
        is_suspicious = is_grey or (thorough and frame in _PROGRESSIVE)
        if not is_suspicious and _ends_well(self._source):
            return
        end = _end(self._source, self._header.scan)
        if end is None and frame in _PROGRESSIVE | _ARITHMETIC:
            is_cut = True  # whole scans may be missing
        elif frame in _ARITHMETIC or not (is_suspicious or end is None):
            is_cut = False  # the last of arithmetic's bytes may be left out, and others would change the picture
        else:
            is_cut = self._is_cut(self._source.size if end is None else end)
        if is_cut:
            raise RefusedError("truncated: its pixels are not all there")

    def _is_cut(self, end: int) -> bool:
        """Whether data behind those up to `end` change the picture."""
        pictures = []
        for filling in (b"", _FILLING):
            image = Image.open(self._file(end, filling), formats=["JPEG"])
            image.draft(None, self._reduced())
            image.load()
            pictures.append(image)
        return ImageChops.difference(*pictures).getbbox() is not None


def _header(source: Source) -> _Header:
    """Go through the segments up to the first scan.

    Raises:
        RefusedError: there is none, or they are damaged.
    """
    header = _Header()
    place = 2
    for _ in range(_MOST_SEGMENTS):
        place, marker = _marker(source, place)
        if marker == _SCAN:
            if not header.frame:
                raise RefusedError("damaged: a JPEG without a frame")
            header.scan = place
            return header
        if marker == _END:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            place += 2
            continue
        length = int.from_bytes(source.at(place + 2, 2), "big")
        if length < 2:
            raise RefusedError(f"damaged: a segment of {length} bytes")
        content = (place + 4, place + 2 + length)
        if marker in _FRAMES:
            header.frame = marker
            _check_frame(marker, source.at(content[0], min(6, length - 2)))
        if 0xE0 <= marker <= 0xEF:
            header.told.append((marker, *content))
        if _decides_pixels(source, marker, content):
            header.kept.append(source.at(place, length + 2))
        place += 2 + length
    raise RefusedError("truncated: a JPEG without pixels")


def _end(source: Source, scan: int) -> int | None:
    """Where the end mark stands behind the scans, the first of which begins at `scan`; None without one."""
    place = scan
    while place < source.size:
        content = source.upto(place, _BLOCK)
        found = _BEHIND_PIXELS.search(content)
        if not found:
            place += max(1, len(content) - 1)  # the next may begin with the last byte
        elif content[found.end() - 1] == _END:
            return place + found.start()
        else:
            place += found.start() + 2
            place += int.from_bytes(source.upto(place, 2), "big")
    return None


def _marker(source: Source, place: int) -> tuple[int, int]:
    """The next marker from a place on, and where it is; libjpeg skips what is before it, too."""
    content = source.upto(place, 2)
    if content[:1] == b"\xff" and content[1:] not in (b"", b"\0", b"\xff"):
        return place, content[1]
    while True:
        content = source.upto(place, _TAIL)
        if len(content) < 2:
            raise RefusedError("truncated: a JPEG that ends in its header")
        found = content.find(b"\xff")
        while 0 <= found < len(content) - 1:
            if content[found + 1] not in (0, 0xFF):
                return place + found, content[found + 1]
            found = content.find(b"\xff", found + 1)
        place += found if found > 0 else max(1, len(content) - 1)


def _check_frame(marker: int, content: bytes) -> None:
    if len(content) < 6:
        raise RefusedError("damaged: a JPEG without a size")
    bits, _, width, components = struct.unpack(">BHHB", content)
    kind = None
    if marker not in _DECODED:
        kind = "a lossless or hierarchical JPEG"
    elif bits != 8:
        kind = f"a JPEG of {bits} bits a channel"
    elif components not in (1, 3, 4):
        kind = f"a JPEG of {components} channels"
    if kind:
        raise RefusedError(f"{kind}, which is not supported; convert it to PNG or TIFF")
    if not width:
        raise RefusedError("not an image, or damaged")


def _decides_pixels(source: Source, marker: int, content: tuple[int, int]) -> bool:
    """Whether a segment says how to decode: tables, frames, and JFIF's and Adobe's kind of colours."""
    if marker == 0xE0:
        return content[1] - content[0] >= 14 and source.at(content[0], 5) == b"JFIF\0"
    if marker == 0xEE:
        return content[1] - content[0] >= 12 and source.at(content[0], 5) == b"Adobe"
    return marker != _COMMENT and not 0xE1 <= marker <= 0xEF


def _ends_well(source: Source) -> bool:
    return _EOI in source.upto(max(0, source.size - _TAIL), _TAIL)[-_NEAR_END:]


def _about(source: Source, told: list[tuple[int, int, int]], brief: bool) -> About:
    about, pieces, block = About(), {}, b""
    for marker, start, end in told:
        if sum(map(len, pieces.values())) + len(block) > _MOST_METADATA:
            break
        head = source.upto(start, min(end - start, len(XMP)))
        if marker == 0xE0 and head.startswith(b"JFIF\0") and end - start >= 12:
            about.dpi = _dpi(source.at(start, 12))
        elif marker == 0xE1 and head.startswith(EXIF):
            block += source.at(start + len(EXIF), end - start - len(EXIF))  # a large one goes on in more segments
        elif marker == 0xE1 and head == XMP:
            about.xmp = source.at(start + len(XMP), end - start - len(XMP))
        elif marker == 0xE2 and not brief and head.startswith(ICC) and end - start > 14:
            content = source.at(start + len(ICC), end - start - len(ICC))
            pieces[content[0]] = content[2:]
    if block:
        about.exif = exif.parse(block, about.notes, brief)
    about.icc = b"".join(pieces[number] for number in sorted(pieces)) or None
    return about


def _dpi(jfif: bytes) -> tuple[float, float] | None:
    unit, across, down = struct.unpack(">BHH", jfif[7:12])
    scale = {1: 1.0, 2: 2.54}.get(unit)
    return (across * scale, down * scale) if scale and across and down else None


def xmp_segment(xmp: bytes) -> bytes | None:
    """XMP as a JPEG holds it, None if it is too long."""
    if len(XMP) + len(xmp) > MOST_IN_SEGMENT:
        return None
    return b"\xff\xe1" + struct.pack(">H", 2 + len(XMP) + len(xmp)) + XMP + xmp
