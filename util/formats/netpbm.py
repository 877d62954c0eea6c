"""PBM, PGM, PPM and PAM, in letters or bytes, scaled by the maxval that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dereflect.util.formats.picture import About, Picture, check_size
from dereflect.util.formats.source import RefusedError, Source

_HEADER = 2**14  # bytes that a header may have, with its comments
_BLOCK = 2**22  # bytes of samples that are looked at at a time
_LETTERS = 2**20  # bytes of numbers in letters
_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*)*([^\s#]+)")
_CHANNELS = {b"P1": 1, b"P2": 1, b"P3": 3, b"P4": 1, b"P5": 1, b"P6": 3}
_PAM = {b"BLACKANDWHITE": 1, b"GRAYSCALE": 1, b"RGB": 3, b"BLACKANDWHITE_ALPHA": 2, b"GRAYSCALE_ALPHA": 2,
        b"RGB_ALPHA": 4}  # fmt: skip


@dataclass(frozen=True)
class _Header:
    """What stands before the samples, which begin at `start`."""

    magic: bytes
    width: int
    height: int
    channels: int
    maxval: int
    start: int


def open_netpbm(source: Source) -> Picture:
    """A picture of the Netpbm family.

    Raises:
        RefusedError: it is damaged, cut short, or holds floating-point numbers.
    """
    content = source.upto(0, _HEADER)
    if content[:2] in (b"PF", b"Pf", b"PG"):
        raise RefusedError("floating-point images are not supported; convert it to 16 bits")
    header = _pam(content) if content[:2] == b"P7" else _plain(content)
    if not 1 <= header.maxval <= 65535:
        raise RefusedError(f"damaged: a maxval of {header.maxval}")
    check_size(header.width, header.height, source)
    return _Netpbm(source, header)


def _plain(content: bytes) -> _Header:
    magic, place = content[:2], 2
    values = []
    for _ in range(2 if magic in (b"P1", b"P4") else 3):
        token = _TOKEN.match(content, place)
        if not token or not token[1].isdigit() or len(token[1]) > 10:
            raise RefusedError("not an image, or damaged")
        values.append(int(token[1]))
        place = token.end()
    width, height, maxval = (*values, 1)[:3]
    return _Header(magic, width, height, _CHANNELS[magic], maxval, place + 1)  # one white space behind the last


def _pam(content: bytes) -> _Header:
    end = re.search(rb"^ENDHDR\r?\n", content, re.MULTILINE)
    if not end:
        raise RefusedError("not an image, or damaged")
    lines = [line.split(None, 1) for line in content[: end.start()].splitlines()[1:]]
    told = dict(line for line in lines if len(line) == 2)
    values = [told.get(name, b"").strip() for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")]
    if not all(value.isdigit() and len(value) <= 10 for value in values):
        raise RefusedError("not an image, or damaged")
    width, height, channels, maxval = map(int, values)
    kind = told.get(b"TUPLTYPE", b"").strip() or {1: b"GRAYSCALE", 3: b"RGB"}.get(channels, b"")
    if _PAM.get(kind, 0) != channels:
        raise RefusedError(f"a PAM of {channels} channels of the kind {kind.decode(errors='replace')!r}, which is not "
                           "supported; convert it to PNG")  # fmt: skip
    return _Header(b"P7", width, height, channels, maxval, end.end())


class _Netpbm(Picture):
    """Samples in letters (P1 to P3) or bytes."""

    kind = "PPM"

    def __init__(self, source: Source, header: _Header) -> None:
        self._source, self._header = source, header
        self.width, self.height = header.width, header.height
        self.deep = header.maxval > 255
        in_letters = header.magic in (b"P1", b"P2", b"P3")
        least = self._row * header.height
        if in_letters:  # a character a sample, and one between those that aren't bits
            least = self._samples if header.magic == b"P1" else 2 * self._samples - 1
        more = source.size - header.start - least
        if more < 0:
            raise RefusedError("truncated: its pixels are not all there")
        # Some programs end the header with two bytes, or with a comment, which then are just what is too much.
        rest = source.upto(header.start - 1, 1 + min(more, _HEADER))
        if not in_letters and re.fullmatch(rb"\r\n|(?:\s|\r\n)(?:#[^\r\n]*\r?\n)+", rest) and len(rest) == 1 + more:
            self._header = replace(header, start=header.start + more)

    @property
    def _samples(self) -> int:
        return self.width * self.height * self._header.channels

    @property
    def _row(self) -> int:
        """Bytes of a row that is written in bytes."""
        if self._header.magic == b"P4":
            return -(-self.width // 8)
        return self.width * self._header.channels * (2 if self.deep else 1)

    def about(self, brief: bool = False) -> About:
        return About()

    def glance(self) -> bool:
        return True

    def check(self) -> None:
        for _ in self._blocks():
            pass

    def samples(self) -> tuple[np.ndarray, np.ndarray | None]:
        channels = self._header.channels
        pixels = np.empty((self.height, self.width, channels), np.uint16 if self.deep else np.uint8)
        flat, place = pixels.reshape(-1), 0
        for values in self._blocks():
            peak, maxval = (65535 if self.deep else 255), self._header.maxval
            flat[place : place + len(values)] = (values.astype(np.uint32) * peak + maxval // 2) // maxval
            place += len(values)
        colours = pixels[:, :, : 1 if channels < 3 else 3]
        return np.broadcast_to(colours, (*colours.shape[:2], 3)), pixels[:, :, -1] if channels in (2, 4) else None

    def _blocks(self) -> Iterator[np.ndarray]:
        """All samples, not scaled, block by block."""
        maxval = self._header.maxval
        in_letters = self._header.magic in (b"P1", b"P2", b"P3")
        for values in self._from_letters() if in_letters else self._from_bytes():
            if len(values) and values.max() > maxval:
                raise RefusedError(f"damaged: values above its maxval of {maxval}")
            yield values

    def _from_bytes(self) -> Iterator[np.ndarray]:
        row, step = self._row, max(1, _BLOCK // max(1, self._row))
        for top in range(0, self.height, step):
            rows = min(step, self.height - top)
            content = self._source.at(self._header.start + top * row, rows * row)
            if self._header.magic == b"P4":
                bits = np.unpackbits(np.frombuffer(content, np.uint8).reshape(rows, row), axis=1)
                yield 1 - bits[:, : self.width].reshape(-1)  # 1 is black
            else:
                yield np.frombuffer(content, ">u2" if self.deep else np.uint8)

    def _from_letters(self) -> Iterator[np.ndarray]:
        """Numbers with white space between; a bitmap's need none."""
        left, place, rest = self._samples, self._header.start, b""
        bitmap = self._header.magic == b"P1"
        while left:
            content = rest + self._source.upto(place, _LETTERS)
            at_end = place + _LETTERS >= self._source.size
            place += _LETTERS
            # Behind a line's end there is no comment, and no number, that has begun before it.
            cut = len(content) if at_end else content.rfind(b"\n") + 1 or content.rfind(b" ") + 1
            if cut == 0 and not bitmap:
                raise RefusedError("damaged: its pixels are no numbers")
            cut = cut or len(content)
            content, rest = re.sub(rb"#[^\r\n]*", b" ", content[:cut]), content[cut:]
            if bitmap:
                values = np.frombuffer(content.translate(None, b" \t\r\n\v\f"), np.uint8)
                values = np.uint8(ord("1")) - values  # 1 is black
            else:
                tokens = content.split()
                if any(not token.isdigit() or len(token) > 9 for token in tokens):
                    raise RefusedError("damaged: its pixels are no numbers")
                values = np.array(tokens, dtype="S9").astype(np.int64)
            values = values[:left]
            left -= len(values)
            yield values
            if at_end and left:
                raise RefusedError("truncated: its pixels are not all there")
