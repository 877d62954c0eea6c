"""The files of the page: which may be read, and when they go."""

import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

MOST_BYTES = 2**30  # of uploads and results at once


class Visits:
    """The files of every open page, kept apart so that they can be deleted with it; results lie in `folder`.

    What a request calls its visit may be any text, such as a path: it is only a key. Folders get names of their own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._folders: dict[str, Path] = {}
        self._uploads: dict[str, set[Path]] = {}
        folder.mkdir(exist_ok=True)

    def uploaded(self, visit: str, path: Path) -> None:
        """Remember an upload. A photograph that is uploaded twice is one file."""
        self._uploads.setdefault(visit, set()).add(path)

    def results(self, visit: str) -> Path:
        """A new, empty folder; the earlier folder of the visit is deleted."""
        if earlier := self._folders.get(visit):
            shutil.rmtree(earlier, ignore_errors=True)
        self._folders[visit] = self.folder / secrets.token_hex(16)
        self._folders[visit].mkdir(parents=True)
        return self._folders[visit]

    def end(self, visit: str) -> None:
        """Delete the files of this visit."""
        if folder := self._folders.pop(visit, None):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self._uploads.pop(visit, set()).difference(*self._uploads.values()):
            path.unlink(missing_ok=True)

    def end_old(self, age: float) -> None:
        """Delete folders of results and of uploads, broken off or not, that are older than this many seconds."""
        for place in [*self.folder.iterdir(), *self.folder.parent.iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # another visit has just ended
                if place.is_dir() and place != self.folder and time.time() - place.stat().st_mtime > age:
                    shutil.rmtree(place, ignore_errors=True)

    def bytes(self) -> int:
        """The size of everything in the app's folder."""
        found = 0
        for place, _, names in os.walk(self.folder.parent):
            for name in names:
                with contextlib.suppress(OSError):
                    found += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118
        return found


def own(path: str, folder: Path) -> Path:
    """An upload or an example, resolved; a request may name any file of this machine.

    Raises:
        gradio.Error: it is another file.
    """
    import gradio as gr

    with contextlib.suppress(OSError, ValueError):
        if (found := Path(path).resolve()).is_relative_to(folder.resolve()) and found.is_file():
            return found
    raise gr.Error("That is no upload.", print_exception=False)
