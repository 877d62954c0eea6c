"""JPEG: PIL decodes what the header says of the pixels; EXIF, XMP, profile and the rest are read apart."""

from __future__ import annotations

import struct

from dereflect.util.formats import exif
from dereflect.util.formats.picture import About, PilPicture
from dereflect.util.formats.source import Part, RefusedError, Source, splice

MOST_IN_SEGMENT = 65533
"""Bytes that a segment can hold."""

EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frames, less those of tables
_DECODED = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the frames that libjpeg decodes: Huffman or arithmetic, progressive or not
_SCAN, _END, _COMMENT = 0xDA, 0xD9, 0xFE
_TAIL, _NEAR_END = 4096, 64  # bytes at a file's end that are looked at, and in how many its end mark must be
_MOST_SEGMENTS = 10_000
_MOST_METADATA = 2**25  # bytes


def open_jpeg(source: Source) -> PilPicture:
    """A JPEG, by its header.

    Raises:
        RefusedError: it is damaged, or of a kind that isn't decoded.
    """
    kept, told, scan = _header(source)
    parts: list[Part] = [b"\xff\xd8", *kept, (scan, source.size)]
    file = splice(source, parts)
    return PilPicture("JPEG", source, file, lambda: _ends_well(source), lambda brief: _about(source, told, brief))


def _header(source: Source) -> tuple[list[bytes], list[tuple[int, int, int]], int]:
    """The segments that decoding needs; (marker, first byte, last) of those that tell something; the first scan."""
    kept, told = [], []
    place, frame = 2, False
    for _ in range(_MOST_SEGMENTS):
        place, marker = _marker(source, place)
        if marker == _SCAN:
            if not frame:
                raise RefusedError("damaged: a JPEG without a frame")
            return kept, told, place
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
            frame = True
            _check_frame(marker, source.at(content[0], min(6, length - 2)))
        if 0xE0 <= marker <= 0xEF:
            told.append((marker, *content))
        if _decides_pixels(source, marker, content):
            kept.append(source.at(place, length + 2))
        place += 2 + length
    raise RefusedError("truncated: a JPEG without pixels")


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
    return b"\xff\xd9" in source.upto(max(0, source.size - _TAIL), _TAIL)[-_NEAR_END:]


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
