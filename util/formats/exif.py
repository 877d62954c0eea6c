"""EXIF as it is: tags are carried over byte by byte, never understood, so that no value is in the way of another."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from dereflect.util.formats import ifd
from dereflect.util.formats.ifd import Directory, Layout
from dereflect.util.formats.source import RefusedError, Source

ORIENTATION, DETAILS, GPS, INTEROPERABILITY = 0x0112, 0x8769, 0x8825, 0xA005
_MAKER_NOTE, _WIDTH, _HEIGHT = 0x927C, 0xA002, 0xA003

# Tags of the main directory that describe the photograph, not the file: description, make, model, resolution,
# software, date, artist, host, copyright, and those of Windows.
DESCRIBING = frozenset({270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, *range(0x9C9B, 0x9CA0)})
# Types that the main directory's other tags must have, as programs stumble over any other.
_TYPES = {282: (ifd.RATIONAL,), 283: (ifd.RATIONAL,), 296: (ifd.SHORT,), ORIENTATION: (3, 4, 8, 9)}
_NAMES = {
    282: "the resolution", 283: "the resolution", 296: "the resolution's unit", DETAILS: "the camera's settings",
    GPS: "the place", INTEROPERABILITY: "the interoperability index",
}  # fmt: skip
_MOST_BYTES = 2**24  # of all values
_CLASSIC = 13  # the last type that EXIF's own, classic TIFF knows


class Tag(NamedTuple):
    """A tag's type, number of values, and the values' bytes."""

    type: int
    count: int
    content: bytes


Tags = dict[int, Tag]


@dataclass
class Exif:
    """The directories of a photograph's EXIF.

    Attributes:
        order: of the bytes, "<" or ">".
        orientation: 1 to 8, or 0 where none is given.
        main, details, place, interoperability: the tags that describe the photograph, and EXIF's, GPS's and DCF's.
    """

    order: str = "<"
    orientation: int = 0
    main: Tags = field(default_factory=dict)
    details: Tags = field(default_factory=dict)
    place: Tags = field(default_factory=dict)
    interoperability: Tags = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.main or self.details or self.place or self.orientation)


def parse(block: bytes, notes: list[str], brief: bool = False) -> Exif:
    """EXIF's block, with or without `Exif\\0\\0` before it; what can't be read is left out, with a line in `notes`.

    A brief reading finds the orientation alone.
    """
    source = Source.of(block.removeprefix(b"Exif\0\0"))
    try:
        layout, first = ifd.layout_of(source)
        main, _ = ifd.directory_at(source, layout, first)
    except RefusedError:
        notes.append("its EXIF is damaged and left out")
        return Exif()
    if brief:
        return Exif(layout.order, orientation_of(source, layout, main))
    return collect(source, layout, main, notes)


def collect(source: Source, layout: Layout, main: Directory, notes: list[str]) -> Exif:
    """The EXIF of a TIFF whose main directory this is."""
    reader = _Reader(source, layout, notes)
    exif = Exif(layout.order, orientation_of(source, layout, main))
    if ORIENTATION in main and not exif.orientation:
        notes.append("the orientation in its EXIF is none that there is, and is left out")
    details, place = reader.below(main, DETAILS), reader.below(main, GPS)
    interoperability = reader.below(details, INTEROPERABILITY)
    exif.main = reader.tags({tag: entry for tag, entry in main.items() if tag in DESCRIBING})
    exif.details = reader.tags({tag: entry for tag, entry in details.items() if tag != INTEROPERABILITY})
    exif.place, exif.interoperability = reader.tags(place), reader.tags(interoperability)
    if any(directory.lost for directory in (main, details, place, interoperability)):
        notes.append("a part of its EXIF is damaged and left out")
    return exif


def orientation_of(source: Source, layout: Layout, main: Directory) -> int:
    """The orientation that a main directory asks for, 0 if none, or none that there is."""
    entry = main.get(ORIENTATION)
    if entry is None or entry.type not in _TYPES[ORIENTATION]:
        return 0
    value = ifd.whole_numbers(source, layout, entry, 1)[0]
    return value if 1 <= value <= 8 else 0


class _Reader:
    """Reads the tags of directories, up to a number of bytes."""

    def __init__(self, source: Source, layout: Layout, notes: list[str]) -> None:
        self.source, self.layout, self.notes = source, layout, notes
        self.left = _MOST_BYTES

    def tags(self, directory: dict[int, ifd.Entry]) -> Tags:
        """Their values."""
        tags = {}
        for tag, entry in directory.items():
            if entry.type > _CLASSIC or entry.type not in _TYPES.get(tag, (entry.type,)):
                self._say(f"{_NAMES.get(tag, f'the tag {tag}')} in its EXIF is of a wrong type and left out")
            elif entry.length > self.left:
                self._say("a part of its EXIF is too large and left out")
            else:
                self.left -= entry.length
                tags[tag] = Tag(entry.type, entry.count, self.source.at(entry.place, entry.length))
        return tags

    def below(self, directory: Directory, pointer: int) -> Directory:
        """The directory that a tag points at."""
        entry = directory.get(pointer)
        if entry is None:
            return Directory()
        try:
            if entry.type not in (ifd.LONG, ifd.IFD, 16, 18):
                raise RefusedError
            place, *_ = ifd.whole_numbers(self.source, self.layout, entry, 1)
            return ifd.directory_at(self.source, self.layout, place)[0]
        except RefusedError:
            self._say(f"{_NAMES[pointer]} in its EXIF can't be found and is left out")
            return Directory()

    def _say(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def block(exif: Exif, width: int, height: int, most: int | None = None) -> tuple[bytes | None, list[str]]:
    """EXIF as a file of that size in pixels holds it, in at most so many bytes; and what is left out for that.

    None if there is nothing to say.
    """
    left_out = []
    parts = (exif.details, exif.main, exif.place, exif.interoperability)
    while True:
        content = b"Exif\0\0" + header(exif.order) + directories(exif, width, height, 8) if exif else None
        if content is None or most is None or len(content) <= most:
            return content, left_out
        # Nobody can do with a maker's note what its maker does; then the largest goes.
        part = next((part for part in parts if _MAKER_NOTE in part), None)
        part = part if part else max(parts, key=lambda part: max((len(t.content) for t in part.values()), default=0))
        tag = _MAKER_NOTE if _MAKER_NOTE in part else max(part, key=lambda tag: len(part[tag].content))
        left_out.append(f"EXIF's tag {tag} of {len(part[tag].content):,} bytes is left out, as the format has no room")
        parts = tuple({t: value for t, value in p.items() if p is not part or t != tag} for p in parts)
        exif = Exif(exif.order, exif.orientation, parts[1], parts[0], parts[2], parts[3])


def header(order: str) -> bytes:
    """What a classic TIFF begins with whose directory follows."""
    return struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)


def directories(exif: Exif, width: int, height: int, start: int, more: Tags | None = None) -> bytes:
    """The main directory, which is to stand at `start`, and those below it, with other tags in the main one."""
    details, main = dict(exif.details), {**exif.main, **(more or {})}
    for tag, side in ((_WIDTH, width), (_HEIGHT, height)):
        if tag in details:
            details[tag] = number(exif.order, ifd.LONG, side)
    if exif.orientation:
        main[ORIENTATION] = number(exif.order, ifd.SHORT, exif.orientation)
    if exif.interoperability:
        details[INTEROPERABILITY] = number(exif.order, ifd.LONG, 0)
    if details:
        main[DETAILS] = number(exif.order, ifd.LONG, 0)
    if exif.place:
        main[GPS] = number(exif.order, ifd.LONG, 0)
    # The length of a directory doesn't depend on where it stands.
    lengths = [len(_directory(exif.order, tags, 0)) for tags in (main, details, exif.place)]
    places = [start + sum(lengths[:n]) for n in range(4)]
    for pointer, tags, place in ((DETAILS, main, places[1]), (GPS, main, places[2]),
                                 (INTEROPERABILITY, details, places[3])):  # fmt: skip
        if pointer in tags:
            tags[pointer] = number(exif.order, ifd.LONG, place)
    below = ((details, places[1]), (exif.place, places[2]), (exif.interoperability, places[3]))
    return _directory(exif.order, main, start) + b"".join(_directory(exif.order, *part) for part in below if part[0])


def number(order: str, kind: int, *values: int) -> Tag:
    """A tag of whole numbers of 16 (SHORT) or 32 bits."""
    letter = "H" if kind == ifd.SHORT else "I"
    return Tag(kind, len(values), struct.pack(f"{order}{len(values)}{letter}", *values))


def _directory(order: str, tags: Tags, place: int) -> bytes:
    """A directory that is to stand at a place, its values behind it; nothing for no tags."""
    if not tags:
        return b""
    behind = place + 2 + 12 * len(tags) + 4
    entries, values = [], b""
    for tag, (kind, count, content) in sorted(tags.items()):
        if len(content) <= 4:
            at = content.ljust(4, b"\0")
        else:
            at = struct.pack(f"{order}I", behind + len(values))
            values += content + b"\0" * (len(content) % 2)
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + at)
    return struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4) + values
