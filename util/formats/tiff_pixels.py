"""The pixels of a TIFF whose segments are packed bytes: any depth, order, planes, colours and alpha.

PIL cuts 16 bits to 8, and OpenCV takes planes, photometric interpretation and alpha for what they aren't; so only the
unpacking is left to libraries here, and what the bytes mean is done by these few lines of NumPy.
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin

from dereflect.util.formats import exif, ifd
from dereflect.util.formats.picture import About, Picture
from dereflect.util.formats.source import RefusedError, Source

MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
COLOURS = {MIN_IS_WHITE: 1, MIN_IS_BLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, LAB: 3}
"""Channels of colours in each photometric interpretation that is read."""
NONE, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD = 1, 5, 8, 32773, 32946, 34925, 50000
PACKED = frozenset({NONE, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD})
"""Compressions of bytes, whatever these mean."""

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_TOGETHER = 2**24  # bytes of segments that libtiff unpacks in one go
_BLOCK = 2**20  # samples, or bytes, that are worked on at a time
_MOST_PER_BYTE = 5000  # bytes that are unpacked of one: deflate can do 1032, LZW some 2700


@dataclass(frozen=True)
class Page:
    """What a directory says of its pixels.

    Attributes:
        bits: of a sample.
        colours: channels of colours; the others are `extras`, of which `alpha` is the place of the one that is alpha.
        multiplied: whether the colours are multiplied by alpha.
        planar: whether each channel is stored by itself.
        tiled: whether the segments are tiles, all of one size; strips end with the picture.
        tile: width and height of the segments.
        segments: first byte and number of bytes of each.
    """

    width: int
    height: int
    bits: int
    samples: int
    colours: int
    alpha: int | None
    multiplied: bool
    photometric: int
    compression: int
    predictor: int
    planar: bool
    reversed_bits: bool
    tiled: bool
    tile: tuple[int, int]
    segments: tuple[tuple[int, int], ...]
    palette: tuple[int, ...]


class TiffPicture(Picture):
    """A page of a TIFF.

    Args:
        source: the file.
        order: of the bytes, "<" or ">".
        page: what its directory says.
        about: gives what the file says about the picture.
    """

    kind = "TIFF"

    def __init__(self, source: Source, order: str, page: Page, about: Callable[[bool], About]) -> None:
        self._source, self._order, self._page, self._about = source, order, page, about
        self.width, self.height = page.width, page.height
        self.deep = page.bits > 8 and page.photometric != PALETTE
        self.inks = page.photometric == CMYK
        self._channels = 1 if page.planar else page.samples
        self._row = -(-page.tile[0] * self._channels * page.bits // 8)  # bytes of a segment's
        needed = self._row * sum(rows for *_, rows in self._places())
        if page.compression != NONE and needed > 2**24 + _MOST_PER_BYTE * source.size:
            raise RefusedError(f"claims {needed:,} bytes of pixels in {source.size:,} bytes; no photograph has that")

    def about(self, brief: bool = False) -> About:
        return self._about(brief)

    def glance(self) -> bool:
        return True  # all segments lie within the file

    def check(self) -> None:
        if self._page.compression in (DEFLATE, OLD_DEFLATE, LZMA):
            for number, (*_, rows) in enumerate(self._places()):
                for _ in self._inflated(number, rows * self._row):
                    pass
        else:
            for _ in self._segments():
                pass

    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        page = self._page
        stored = np.empty((self.height, self.width, page.samples), np.uint16 if page.bits > 8 else np.uint8)
        for (plane, top, left, rows), content in zip(self._places(), self._segments(), strict=True):
            target = stored[top : top + rows, left : left + page.tile[0]]
            self._put(content, target[:, :, plane : plane + 1] if page.planar else target)
        return self._colours(stored)

    def _places(self) -> Iterator[tuple[int, int, int, int]]:
        """Plane, first row and column, and number of rows of every segment, in order."""
        page, (width, height) = self._page, self._page.tile
        for plane in range(page.samples if page.planar else 1):
            for top in range(0, page.height, height):
                for left in range(0, page.width, width):
                    yield plane, top, left, height if page.tiled else min(height, page.height - top)

    def _segments(self) -> Iterator[bytes | memoryview]:
        """The segments' bytes, unpacked."""
        if self._page.compression in (LZW, PACKBITS, ZSTD):
            yield from self._by_libtiff()
            return
        for number, (*_, rows) in enumerate(self._places()):
            length = rows * self._row
            if self._page.compression == NONE:
                content = self._packed(number)[:length]
                if len(content) < length:
                    raise RefusedError("truncated: its pixels are not all there")
                yield content
            else:
                yield b"".join(self._inflated(number, length))

    def _packed(self, number: int) -> bytes:
        content = self._source.at(*self._page.segments[number])
        return content.translate(_REVERSED) if self._page.reversed_bits else content

    def _inflated(self, number: int, length: int) -> Iterator[bytes]:
        """So many bytes of a segment packed by deflate or LZMA, in blocks."""
        content = self._packed(number)
        is_lzma = self._page.compression == LZMA
        unpack = lzma.LZMADecompressor(memlimit=2**27) if is_lzma else zlib.decompressobj()
        while length:
            try:
                block = unpack.decompress(content, min(length, _BLOCK))
            except (zlib.error, lzma.LZMAError) as error:
                raise RefusedError(f"damaged: {error}") from error
            content = b"" if is_lzma else unpack.unconsumed_tail
            if not block:
                raise RefusedError("truncated: its pixels are not all there")
            length -= len(block)
            yield block

    def _by_libtiff(self) -> Iterator[memoryview]:
        """Segments that libtiff unpacks, some at a time, as if they were strips of grey bytes."""
        together: list[tuple[int, int]] = []  # number and rows
        planes: list[int] = []
        for number, (plane, *_, rows) in enumerate(self._places()):
            full = sum(count for _, count in together) * self._row >= _TOGETHER
            if together and (full or plane != planes[-1]):
                yield from self._unpacked(together)
                together = []
            together.append((number, rows))
            planes.append(plane)
        yield from self._unpacked(together)

    def _unpacked(self, together: list[tuple[int, int]]) -> Iterator[memoryview]:
        contents = [self._packed(number) for number, _ in together]
        lengths = [len(content) for content in contents]
        places = [8, *(8 + np.cumsum(lengths[:-1], dtype=int)).tolist()]
        height = sum(rows for _, rows in together)
        start = 8 + sum(lengths)
        start += start % 2
        told = {256: (self._row,), 257: (height,), 258: (8,), 259: (self._page.compression,), 262: (1,),
                273: places, 277: (1,), 278: (together[0][1],), 279: lengths}  # fmt: skip
        tags = {tag: exif.number("<", ifd.LONG, *values) for tag, values in told.items()}
        head = exif.header("<")[:4] + start.to_bytes(4, "little")
        file = b"".join([head, *contents]).ljust(start, b"\0") + exif.directories(exif.Exif(), 0, 0, start, tags)
        pixels = np.asarray(TiffImagePlugin.TiffImageFile(io.BytesIO(file)))
        if pixels.shape != (height, self._row):
            raise RefusedError("damaged: its pixels can't be unpacked")
        top = 0
        for _, rows in together:
            yield memoryview(np.ascontiguousarray(pixels[top : top + rows])).cast("B")
            top += rows

    def _put(self, content: bytes | memoryview, target: np.ndarray) -> None:
        """A segment's bytes as samples into (rows, columns, channels), scaled to all of 8 or 16 bits."""
        page = self._page
        packed = np.frombuffer(content, np.uint8).reshape(-1, self._row)
        columns = page.tile[0]
        step = max(1, _BLOCK // (columns * self._channels))
        for top in range(0, len(target), step):
            rows = packed[top : min(top + step, len(target))]
            if page.bits in (8, 16):
                values = np.ascontiguousarray(rows).view(f"{self._order}u{page.bits // 8}")
                values = values.reshape(len(rows), columns, self._channels)
                if page.predictor == 2:
                    values = np.cumsum(values, axis=1, dtype=target.dtype)
            else:
                values = self._from_bits(rows).reshape(len(rows), columns, self._channels)
            target[top : top + len(rows)] = values[:, : target.shape[1]]

    def _from_bits(self, rows: np.ndarray) -> np.ndarray:
        """Samples of other sizes than bytes, which stand without gaps, from the left to the right of each row."""
        page = self._page
        count = page.tile[0] * self._channels
        bits = np.unpackbits(rows, axis=1, count=count * page.bits).reshape(len(rows), count, page.bits)
        values = np.zeros((len(rows), count), np.uint32)
        for place in range(page.bits):
            values = values << 1 | bits[:, :, place]
        if page.photometric == PALETTE:
            return values
        peak, most = (65535 if page.bits > 8 else 255), 2**page.bits - 1
        return (values * peak + most // 2) // most

    def _colours(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What the samples mean: RGB and alpha, of all of 8 or 16 bits."""
        page = self._page
        peak = np.iinfo(stored.dtype).max
        alpha = None if page.alpha is None else np.ascontiguousarray(stored[:, :, page.alpha])
        colours = stored[:, :, : page.colours]
        if page.photometric == PALETTE:
            return self._from_palette(stored[:, :, 0]), alpha
        if page.photometric == MIN_IS_WHITE:
            np.subtract(peak, colours, out=colours)
        elif page.photometric == CMYK:
            for row in colours:
                light = peak - row.astype(np.uint32)
                row[:, :3] = (light[:, :3] * light[:, 3:] + peak // 2) // peak
            colours = colours[:, :, :3]
        elif page.photometric in (YCBCR, LAB):
            mode = "YCbCr" if page.photometric == YCBCR else "LAB"
            colours = np.asarray(Image.frombytes(mode, self.size, colours.tobytes()).convert("RGB"))
        if page.multiplied:
            for row, opaque in zip(colours, alpha.astype(np.uint32), strict=True):
                divisor = np.maximum(opaque, 1)[:, None]
                row[:] = np.minimum((row.astype(np.uint32) * peak + divisor // 2) // divisor, peak)
        if colours.shape[2] == 1:
            colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
        return colours, alpha

    def _from_palette(self, places: np.ndarray) -> np.ndarray:
        count = 2**self._page.bits
        if len(self._page.palette) < 3 * count:
            raise RefusedError("damaged: its palette is not all there")
        palette = np.array(self._page.palette[: 3 * count], np.uint16).reshape(3, count).T
        if palette.max() > 255:  # else it is an old program's, of 8 bits
            palette = palette >> 8
        return palette.astype(np.uint8)[places]
