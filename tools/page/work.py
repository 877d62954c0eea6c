"""Photographs that were sent to the page: separated one at a time, kept for a while, deleted.

Everything lies in the app's own folder, under names that are drawn here; nothing that a request says becomes a path.
"""

import contextlib
import os
import queue
import secrets
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dereflect.util.device import enough_memory, release_freed_memory
from dereflect.util.errors import UserError
from dereflect.util.images import opened, read_rgb
from dereflect.util.jobs import Job
from dereflect.util.photographs import Photograph, read_photograph, write_photograph

KEPT = 3600  # seconds that a result is kept
MOST_BYTES, MOST_RESULTS = 4 * 2**30, 200  # of all photographs and results; the oldest results go first
PREVIEWS = ("before.jpg", "transmission.jpg", "reflection.jpg")
LAYERS = ("transmission.png", "reflection.png")

_PREVIEW_SIDE = 2048  # pixels
_ROWS = 256  # that are blended at once
_WORST = 16  # bytes a pixel: two layers with alpha, of 16 bits, that can't be compressed


class BusyError(Exception):
    """There is no place, or no room, for another photograph."""


class _DroppedError(Exception):
    """The photograph that is in work has been deleted."""


@dataclass(eq=False)
class Sent:
    """A photograph that was sent.

    Attributes:
        folder: its own; the name is the photograph's token.
        weights: the name of the checkpoint that separates it.
        bytes: what it has on the disk, or may come to have.
        state: "sending", "waiting", "working", "done" or "failed".
        about: what the page is told: the tiles that are done, or what came out.
        dropped: it has been deleted.
    """

    folder: Path
    weights: str
    bytes: int
    state: str = "sending"
    about: dict = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    dropped: bool = False

    @property
    def token(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        """The photograph."""
        return self.folder / "photograph"

    @property
    def pending(self) -> bool:
        return self.state in {"sending", "waiting", "working"}

    def in_words(self, error: Exception) -> str:
        """The error's text without the names of this app's files, which say nothing to anybody."""
        return str(error).replace(f"{self.file}: ", "").replace(f"{self.folder}{os.sep}", "")


class Work:
    """The photographs of all visitors.

    Args:
        folder: the app's own.
        separate: called with the name of a checkpoint and with what `tools.infer.separate_file` takes beside the
            separator: the job, `refuse`, `note` and `watch`; returns the photograph.
        places: photographs that may be under way at once, the one in work included.
    """

    def __init__(self, folder: Path, separate: Callable[..., Photograph], places: int):
        self._folder, self._separate_file, self._places = folder, separate, places
        self._sent: dict[str, Sent] = {}  # those used longest ago first
        self._working: Sent | None = None
        self._queue: queue.SimpleQueue[Sent] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._blending = threading.Lock()
        threading.Thread(target=self._separate_all, daemon=True).start()

    def begin(self, weights: str, size: int) -> Sent:
        """A place for a photograph of at most that many bytes.

        Raises:
            BusyError: there is none.
        """
        with self._lock:
            if sum(sent.pending for sent in self._sent.values()) >= self._places:
                raise BusyError("Busy: too many photographs are waiting here; try again in a moment.")
            self._make_room(size)
            sent = Sent(self._folder / secrets.token_hex(16), weights, size)
            sent.folder.mkdir(mode=0o700)
            self._sent[sent.token] = sent
            return sent

    def submit(self, sent: Sent) -> None:
        """Have a photograph separated that is wholly here.

        Raises:
            UserError: by its header it isn't one, or is too large; `UserError`s of its pixels come later.
        """
        with _told(sent), opened(sent.file):
            pass
        with self._lock:
            sent.state, sent.bytes = "waiting", sent.file.stat().st_size
        self._queue.put(sent)

    def find(self, token: str) -> Sent | None:
        """The photograph of that token."""
        return self._sent.get(token)

    def status(self, sent: Sent) -> dict:
        """What the page is told of a photograph."""
        with self._lock:
            before = list(self._sent.values())
            ahead = sum(other.pending for other in before[: before.index(sent)]) if sent in before else 0
            return {"state": sent.state, "ahead": ahead, **sent.about}

    def forget(self, sent: Sent) -> None:
        """Delete a photograph and what was made of it; if it is in work, that ends with its next tile."""
        with self._lock:
            self._sent.pop(sent.token, None)
            sent.dropped = True
            shutil.rmtree(sent.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what is too old."""
        with self._lock:
            for sent in list(self._sent.values()):
                if not sent.pending and time.monotonic() - sent.since > KEPT:
                    self.forget(sent)

    def close(self, patience: float = 3) -> None:
        """Delete everything, and wait a little for the one in work, so that it leaves nothing."""
        with self._lock:
            for sent in list(self._sent.values()):
                self.forget(sent)
        end = time.monotonic() + patience
        while self._working and time.monotonic() < end:
            time.sleep(0.05)

    def open_result(self, sent: Sent, name: str, strength: float) -> BinaryIO:
        """A file of PREVIEWS or LAYERS; the transmission at that strength, I + strength (T - I), at its full depth.

        Raises:
            FileNotFoundError: it has been deleted.
            BusyError: there is no room.
        """
        if name != "transmission.png" or strength == 1:
            return (sent.folder / name).open("rb")
        with self._blending:
            with self._lock:
                self._sent[sent.token] = self._sent.pop(sent.token, sent)  # the last whose turn comes to go
                self._make_room(sent.bytes)
            blended = sent.folder / "blended.png"
            try:
                with _told(sent):
                    _blend(read_photograph(sent.file), read_photograph(sent.folder / name), strength, blended)
            finally:
                self._written(sent)
            return blended.open("rb")

    def _written(self, sent: Sent) -> None:
        """See what a photograph's files take, now that there are more; if it was deleted meanwhile, these go, too."""
        with self._lock:
            if sent.dropped or sent.state == "failed":
                shutil.rmtree(sent.folder, ignore_errors=True)
            sent.bytes = _size(sent.folder)

    def _make_room(self, size: int) -> None:
        finished = [sent for sent in self._sent.values() if not sent.pending]
        used = sum(sent.bytes for sent in {*self._sent.values(), self._working} - {None})
        while finished and (used + size > MOST_BYTES or len(finished) >= MOST_RESULTS):
            used -= finished[0].bytes
            self.forget(finished.pop(0))
        if used + size > MOST_BYTES:
            raise BusyError("Busy: there is no room for another photograph; try again in a moment.")

    def _separate_all(self) -> None:
        while True:
            sent = self._queue.get()
            with self._lock:
                if sent.dropped:
                    continue
                self._working, sent.state = sent, "working"
            about, state = {}, "failed"
            try:
                about, state = self._separate(sent), "done"
            except _DroppedError:
                pass
            except (UserError, BusyError) as error:
                about = {"error": str(error)}
            except Exception:
                traceback.print_exc()
                about = {"error": "This program has failed; its log says where."}
            with self._lock:
                sent.state, sent.about, sent.since = state, about, time.monotonic()
                self._written(sent)
                self._working = None

    def _separate(self, sent: Sent) -> dict:
        def watch(tiles: Iterable, total: int) -> Iterator:
            for number, tile in enumerate(tiles):
                if sent.dropped:
                    raise _DroppedError
                sent.about = {"tile": number, "tiles": total}
                yield tile

        started, notes = time.perf_counter(), []
        with _told(sent):
            with opened(sent.file) as picture:
                room = _WORST * picture.width * picture.height
            with self._lock:
                self._make_room(room)
                sent.bytes += room
            layers = {kind: sent.folder / name for kind, name in zip("tr", LAYERS, strict=True)}
            job = Job(sent.file, "png", layers)
            photograph = self._separate_file(sent.weights, job, None, notes.append, watch)
            for source, name in zip((sent.file, *layers.values()), PREVIEWS, strict=True):
                _write_preview(source, sent.folder / name, photograph)
        release_freed_memory()  # the next photograph may be of another size
        height, width = photograph.pixels.shape[:2]
        return {"width": width, "height": height, "seconds": time.perf_counter() - started, "notes": notes}


@contextlib.contextmanager
def _told(sent: Sent) -> Iterator[None]:
    """Turn what goes wrong with a photograph into a UserError that doesn't name the app's files."""
    try:
        with enough_memory(lambda: "too large for the memory that is free here; scale it down"):
            yield
    except UserError as error:
        raise UserError(sent.in_words(error)) from error


def _write_preview(source: Path, path: Path, like: Photograph) -> None:
    """A picture as any browser can show it, in the photograph's colours, made smaller if it is large."""
    picture = read_rgb(source)
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.LANCZOS, reducing_gap=2)
    pixels = np.asarray(picture)
    write_photograph(path, pixels, Photograph(pixels, icc=like.icc), "jpeg")


def _blend(photograph: Photograph, transmission: Photograph, strength: float, path: Path) -> None:
    pixels = photograph.pixels.copy()
    for top in range(0, len(pixels), _ROWS):
        rows = slice(top, top + _ROWS)
        mixture = photograph.pixels[rows].astype(np.float32)
        pixels[rows] = mixture + np.float32(strength) * (transmission.pixels[rows] - mixture) + 0.5
    write_photograph(path, pixels, photograph, "png")


def _size(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0
