"""The directories of a TIFF, and of EXIF, which is a small TIFF without pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dereflect.util.formats.source import RefusedError, Source

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, IFD = 1, 2, 3, 4, 5, 7, 13
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value of each type."""

_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}  # of the struct module
_MOST_ENTRIES = 4096  # of a directory
_MOST_DIRECTORIES = 4096  # of a file


class Entry(NamedTuple):
    """What a directory says of a tag: a type, a number of values, and where they stand."""

    type: int
    count: int
    place: int

    @property
    def length(self) -> int:
        """Bytes of all values."""
        return SIZES[self.type] * self.count


@dataclass(frozen=True)
class Layout:
    """How the numbers of a file are written: `order` is "<" or ">", `big` is BigTIFF."""

    order: str
    big: bool


class Directory(dict[int, Entry]):
    """Entries by tag; `lost` tells whether there were some that make no sense."""

    lost = False


def layout_of(source: Source) -> tuple[Layout, int]:
    """A TIFF's layout, and where its first directory stands.

    Raises:
        RefusedError: it is none.
    """
    head = source.upto(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise RefusedError("not an image, or damaged")
    version = struct.unpack_from(f"{order}H", head, 2)[0]
    if version == 42:
        return Layout(order, False), struct.unpack_from(f"{order}I", head, 4)[0]
    if version == 43 and len(head) == 16:
        return Layout(order, True), struct.unpack_from(f"{order}Q", head, 8)[0]
    raise RefusedError("not an image, or damaged")


def directory_at(source: Source, layout: Layout, place: int) -> tuple[Directory, int]:
    """A directory, and the place of the next one (0 for none).

    Entries of unknown types, and those that stand outside of the file, or whose values do, are lost.

    Raises:
        RefusedError: there is no directory.
    """
    order, big = layout.order, layout.big
    counted, width, room = (8, 20, 8) if big else (2, 12, 4)
    (count,) = struct.unpack(f"{order}{'Q' if big else 'H'}", source.at(place, counted))
    content = source.upto(place + counted, min(count, _MOST_ENTRIES) * width)
    if len(content) < width:
        raise RefusedError("damaged: a directory without entries")
    entries = Directory()
    entries.lost = len(content) < count * width
    for start in range(0, len(content) - width + 1, width):
        tag, kind, number = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", content, start)
        if kind not in SIZES or tag in entries:
            entries.lost = True
            continue
        length = SIZES[kind] * number
        if length <= room:
            at = place + counted + start + width - room
        else:
            (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", content, start + width - room)
        if number and at + length <= source.size:
            entries[tag] = Entry(kind, number, at)
        else:
            entries.lost = True
    end = place + counted + count * width
    link = source.upto(end, 8 if big else 4)
    following = struct.unpack(f"{order}{'Q' if big else 'I'}", link)[0] if len(link) == (8 if big else 4) else 0
    return entries, following


def directories(source: Source, layout: Layout, first: int) -> Iterator[Directory]:
    """The chain of directories that begins at a place; what is damaged behind the first ends it.

    Raises:
        RefusedError: there isn't even one.
    """
    seen: set[int] = set()
    place = first
    while place and place not in seen and len(seen) < _MOST_DIRECTORIES:
        try:
            entries, following = directory_at(source, layout, place)
        except RefusedError:
            if not seen:
                raise
            return
        seen.add(place)
        yield entries
        place = following


def whole_numbers(source: Source, layout: Layout, entry: Entry | None, most: int | None = None) -> tuple[int, ...]:
    """The values of an entry that has whole numbers, at most so many; none for any other entry."""
    if entry is None or entry.type not in _WHOLE:
        return ()
    count = entry.count if most is None else min(entry.count, most)
    content = source.at(entry.place, count * SIZES[entry.type])
    return struct.unpack(f"{layout.order}{count}{_WHOLE[entry.type]}", content)
