"""PNG: its chunks, each held against the file; the pixels' go to a decoder, the others are read apart."""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

from dereflect.util.formats import exif
from dereflect.util.formats.picture import About, Picture, PilPicture, check_size
from dereflect.util.formats.source import Part, RefusedError, Source, splice

SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_KEYWORD = b"XML:com.adobe.xmp"
MOST_PER_BYTE = 1032
"""Bytes that deflate can make of one."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7's
_MOST_CHUNKS = 2**20
_MOST_METADATA = 2**24  # bytes of a profile or text, not compressed
_BLOCK = 2**20  # bytes that are looked through at a time
_TELLING = {b"eXIf", b"iCCP", b"iTXt", b"tEXt", b"zTXt", b"pHYs"}


@dataclass
class Chunks:
    """Where a PNG's chunks lie.

    Attributes:
        header: of the image: width, height, depth, colour type, interlaced.
        decoding: IHDR, PLTE and tRNS, as they are in the file.
        transparent: tRNS's content.
        pixels: from and to where IDAT chunks lie, with heads and checksums.
        telling: (kind, first byte, last) of what may say something about the picture.
        ended: whether the end mark is there.
    """

    header: tuple[int, int, int, int, int]
    decoding: list[bytes]
    transparent: bytes | None = None
    pixels: list[tuple[int, int]] = field(default_factory=list)
    telling: list[tuple[bytes, int, int]] = field(default_factory=list)
    ended: bool = False

    @property
    def packed(self) -> int:
        """Bytes of compressed pixels, at most."""
        return sum(end - start for start, end in self.pixels)

    def passes(self) -> list[tuple[int, int]]:
        """Bytes of a row, and rows, of every pass in which the pixels are stored."""
        width, height, depth, colours, interlaced = self.header
        bits = depth * _CHANNELS[colours]
        sizes = [(width, height)]
        if interlaced:
            sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES]
        return [(1 + -(-columns * bits // 8), rows) for columns, rows in sizes if columns > 0 and rows > 0]


def open_png(source: Source) -> Picture:
    """A PNG, by its chunks.

    Raises:
        RefusedError: it is damaged, cut short, or claims pixels that its bytes can't hold.
    """
    chunks = _read_chunks(source)
    check_size(*chunks.header[:2], source)
    needed = sum(row * rows for row, rows in chunks.passes())
    if needed > MOST_PER_BYTE * chunks.packed:
        raise RefusedError(f"truncated: {chunks.packed:,} bytes of pixels can't be {needed:,} unpacked ones")
    return _DeepPng(source, chunks) if chunks.header[2] == 16 else _Png(source, chunks)


def _read_chunks(source: Source) -> Chunks:
    """Go through all chunks up to the end mark, or to where the file is damaged behind its pixels."""
    if source.upto(12, 4) == b"CgBI":
        raise RefusedError("a PNG of Apple's own kind, made for an app; convert it to an ordinary one")
    if source.upto(12, 4) != b"IHDR":
        raise RefusedError("not an image, or damaged")
    chunks = Chunks(_header(source.at(8, 25)), [source.at(8, 25)])
    place = 33
    for _ in range(_MOST_CHUNKS):
        head = source.upto(place, 8)
        if len(head) < 8:
            return chunks
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = place + 12 + length
        if end > source.size:
            if chunks.pixels and kind != b"IDAT":
                return chunks  # nothing of the pixels is missing
            left = source.size - place - 8
            raise RefusedError(f"truncated: a chunk claims {length:,} bytes, the file has {left:,} more")
        if kind == b"IDAT":
            if chunks.pixels and chunks.pixels[-1][1] == place:
                chunks.pixels[-1] = (chunks.pixels[-1][0], end)
            else:
                chunks.pixels.append((place, end))
        elif kind == b"PLTE" and length <= 768 and not chunks.pixels:
            chunks.decoding.append(source.at(place, 12 + length))
        elif kind == b"tRNS" and length <= 256 and not chunks.pixels:
            whole = source.at(place, 12 + length)
            if zlib.crc32(whole[4:-4]).to_bytes(4, "big") == whole[-4:]:
                chunks.transparent = whole[8:-4]
                chunks.decoding.append(whole)
        elif kind in _TELLING and length <= _MOST_METADATA:
            chunks.telling.append((kind, place + 8, end - 4))
        elif kind == b"IEND":
            chunks.ended = True
            return chunks
        place = end
    raise RefusedError(f"more than {_MOST_CHUNKS:,} chunks; no photograph has that many")


def _header(content: bytes) -> tuple[int, int, int, int, int]:
    width, height, depth, colours, packing, filtering, interlaced = struct.unpack(">IIBBBBB", content[8:21])
    fits = depth in _DEPTHS.get(colours, ()) and not packing and not filtering and interlaced < 2
    if not (fits and 0 < width < 2**31 and 0 < height < 2**31):
        raise RefusedError("not an image, or damaged")
    if zlib.crc32(content[4:21]).to_bytes(4, "big") != content[21:]:
        raise RefusedError("damaged: its header's checksum is wrong")
    return width, height, depth, colours, interlaced


def _for_decoding(source: Source, chunks: Chunks) -> io.BufferedReader:
    """The file without what doesn't decide on the pixels."""
    parts: list[Part] = [SIGNATURE, *chunks.decoding, *chunks.pixels, chunk(b"IEND", b"")]
    return splice(source, parts)


def _check(source: Source, chunks: Chunks) -> None:
    """Unpack all pixels, a block at a time; raise what is wrong."""
    unpacked = _unpacked(source, chunks)
    rest = b""
    for row, rows in chunks.passes():
        while rows:
            while len(rest) < row:
                block = next(unpacked, None)
                if block is None:
                    raise RefusedError("truncated: its pixels are not all there")
                rest += block
            count = min(rows, len(rest) // row)
            if max(rest[: count * row : row]) > 4:
                raise RefusedError("damaged: its pixels are of no known filter")
            rest = rest[count * row :]
            rows -= count
    for _ in unpacked:  # up to the checksum
        pass


def _unpacked(source: Source, chunks: Chunks) -> Iterator[bytes]:
    """The pixels as they are before they are compressed, as many as the header claims and one block more."""
    inflate = zlib.decompressobj()
    left = sum(row * rows for row, rows in chunks.passes()) + _BLOCK
    try:
        for content in _packed(source, chunks):
            while content and left > 0 and not inflate.eof:
                block = inflate.decompress(content, _BLOCK)
                content = inflate.unconsumed_tail
                left -= len(block)
                yield block
    except zlib.error as error:
        raise RefusedError(f"damaged: {error}") from error


def _packed(source: Source, chunks: Chunks) -> Iterator[bytes]:
    """The content of the IDAT chunks, a block at a time."""
    for start, end in chunks.pixels:
        place = start
        while place < end:
            length = int.from_bytes(source.at(place, 4), "big")
            for offset in range(0, length, _BLOCK):
                yield source.at(place + 8 + offset, min(_BLOCK, length - offset))
            place += 12 + length


class _Png(PilPicture):
    """Up to 8 bits a channel."""

    def __init__(self, source: Source, chunks: Chunks) -> None:
        file = _for_decoding(source, chunks)
        super().__init__("PNG", source, file, lambda: chunks.ended, lambda brief: _about(source, chunks, brief))
        self._check = lambda: _check(source, chunks)

    def check(self) -> None:
        self._check()

    def _load(self) -> None:
        super()._load()
        last = self.image.crop((0, max(0, self.height - 2), *self.image.size))
        if not np.asarray(last).any(axis=(1, 2) if len(last.getbands()) > 1 else 1).all():
            self._check()  # PIL leaves rows that are missing at 0, without a word


class _DeepPng(Picture):
    """16 bits a channel, which PIL would cut to 8; decoded by OpenCV."""

    kind, deep = "PNG", True

    def __init__(self, source: Source, chunks: Chunks) -> None:
        self.width, self.height = chunks.header[:2]
        self._source, self._chunks = source, chunks

    def about(self, brief: bool = False) -> About:
        return _about(self._source, self._chunks, brief)

    def glance(self) -> bool:
        return self._chunks.ended

    def check(self) -> None:
        _check(self._source, self._chunks)

    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        self.check()  # what OpenCV thinks of damage, it says on stderr
        decoding = [content for content in self._chunks.decoding if content[4:8] != b"tRNS"]
        packed = chunk(b"IDAT", b"".join(_packed(self._source, self._chunks)))  # with a checksum that fits
        content = b"".join([SIGNATURE, *decoding, packed, chunk(b"IEND", b"")])
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != (self.height, self.width):
            raise RefusedError("a PNG of 16 bits that OpenCV can't read")
        if pixels.ndim == 2:
            return np.dstack([pixels] * 3), self._keyed(pixels[..., None], 1)
        alpha = pixels[:, :, 3] if pixels.shape[2] == 4 else self._keyed(pixels[:, :, 2::-1], 3)
        return pixels[:, :, 2::-1], alpha

    def _keyed(self, colours: np.ndarray, channels: int) -> np.ndarray | None:
        """Alpha of a picture of which one colour is transparent."""
        key = self._chunks.transparent
        if key is None or len(key) != 2 * channels:
            return None
        return np.where(np.all(colours == np.frombuffer(key, ">u2"), axis=2), 0, 65535).astype(np.uint16)


def _about(source: Source, chunks: Chunks, brief: bool) -> About:
    about = About()
    raw = b""
    for kind, start, end in chunks.telling:
        if kind == b"eXIf" and not about.exif:
            about.exif = exif.parse(source.at(start, end - start), about.notes, brief)
        elif kind == b"iCCP" and not brief:
            about.icc = _profile(source.at(start, end - start), about.notes)
        elif kind == b"iTXt" and source.upto(start, len(XMP_KEYWORD) + 1) == XMP_KEYWORD + b"\0":
            about.xmp = _xmp(source.at(start, end - start), about.notes)
        elif kind == b"pHYs" and end - start == 9:
            across, down, unit = struct.unpack(">IIB", source.at(start, 9))
            about.dpi = (across * 0.0254, down * 0.0254) if unit == 1 and across and down else None
        elif kind in (b"tEXt", b"zTXt") and source.upto(start, 22) == b"Raw profile type exif\0":
            content = source.at(start + 22, end - start - 22)
            raw = content if kind == b"tEXt" else _inflated(content[1:]) or b""
    if raw and not about.exif:  # as ImageMagick writes EXIF: a name, a length, and hexadecimal digits
        digits = re.sub(rb"\s", b"", b"".join(raw.strip().split(b"\n")[2:]))
        if re.fullmatch(rb"(?:[0-9a-fA-F]{2})+", digits):
            about.exif = exif.parse(bytes.fromhex(digits.decode()), about.notes, brief)
    return about


def _profile(content: bytes, notes: list[str]) -> bytes | None:
    name, _, packed = content.partition(b"\0")
    profile = _inflated(packed[1:]) if len(name) < 80 and packed[:1] == b"\0" else None
    if profile is None:
        notes.append("its colour profile is damaged or too large, and is left out")
    return profile


def _xmp(content: bytes, notes: list[str]) -> bytes | None:
    """The text of an iTXt chunk: keyword, 0, whether compressed, how, language, 0, translated keyword, 0, text."""
    compressed = content[len(XMP_KEYWORD) + 1 : len(XMP_KEYWORD) + 2] == b"\1"
    text: bytes | None = content[len(XMP_KEYWORD) + 3 :].split(b"\0", 2)[-1]
    if compressed:
        text = _inflated(text)
    if text is None:
        notes.append("its XMP is damaged or too large, and is left out")
    return text or None


def _inflated(content: bytes) -> bytes | None:
    """What was deflated, whole; None if it is damaged or too large."""
    inflate = zlib.decompressobj()
    try:
        result = inflate.decompress(content, _MOST_METADATA)
    except zlib.error:
        return None
    return result if inflate.eof else None


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pixels_per_metre(dpi: tuple[float, float]) -> tuple[int, int]:
    """Of a density in pixels an inch."""
    across, down = (min(2**31 - 1, math.floor(value / 0.0254 + 0.5)) for value in dpi)
    return across, down
