"""A file as its reader sees it: a number of bytes, of which nothing but their number is believed."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import BinaryIO

Part = bytes | tuple[int, int]
"""Bytes, or where they lie in a file: first byte, and the one behind the last."""


_HEAD = 2**15  # bytes at a file's beginning that are kept


class RefusedError(Exception):
    """Why a file isn't read, in words that go behind its name."""


class Source:
    """A file that is open for reading.

    Attributes:
        file: the file.
        size: its length in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self._head = b""

    @classmethod
    def of(cls, content: bytes) -> Source:
        """Bytes in memory as a file."""
        return cls(io.BytesIO(content), len(content))

    def at(self, place: int, count: int) -> bytes:
        """Exactly `count` bytes from `place` on.

        Raises:
            RefusedError: the file is shorter than that.
        """
        if not 0 <= place <= place + count <= self.size:
            left = max(0, self.size - place)
            raise RefusedError(f"truncated: {count:,} bytes are to stand at {place:,}, where the file has {left:,}")
        if place + count <= _HEAD:  # headers are read bit by bit
            if not self._head:
                self.file.seek(0)
                self._head = self.file.read(_HEAD)
            content = self._head[place : place + count]
        else:
            self.file.seek(place)
            content = self.file.read(count)
        if len(content) < count:
            raise RefusedError("truncated while it was read")
        return content

    def upto(self, place: int, count: int) -> bytes:
        """At most `count` bytes from `place` on."""
        return self.at(place, max(0, min(count, self.size - place))) if place < self.size else b""


def splice(source: Source, parts: Iterable[Part]) -> io.BufferedReader:
    """Parts of a file and other bytes, read as one file, without a copy.

    The decoders get this: what they need to decode, without the metadata, whose damage costs no photograph then.
    """
    return io.BufferedReader(_Spliced(source, parts), 2**16)


class _Spliced(io.RawIOBase):
    """See `splice`."""

    def __init__(self, source: Source, parts: Iterable[Part]) -> None:
        self._source = source
        self._parts = [(part, len(part) if isinstance(part, bytes) else part[1] - part[0]) for part in parts]
        self._length = sum(length for _, length in self._parts)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: bytearray | memoryview) -> int:
        target = memoryview(target).cast("B")
        filled, start = 0, 0
        for part, length in self._parts:
            offset = self._place - start
            start += length
            if filled == len(target) or offset >= length:
                continue
            wanted = min(len(target) - filled, length - offset)
            if isinstance(part, bytes):
                target[filled : filled + wanted] = part[offset : offset + wanted]
                got = wanted
            else:
                self._source.file.seek(part[0] + offset)
                got = self._source.file.readinto(target[filled : filled + wanted])
            filled += got
            self._place += got
            if got < wanted:  # cut short while it is read
                break
        return filled

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place
