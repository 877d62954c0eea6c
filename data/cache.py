"""Decoded training photographs, kept in memory that all workers of a process share."""

import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.errors import UserError
from util.images import read_rgb

_SHARED = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory; nothing is written there by name
_COLUMNS = 3  # of an entry: where it starts, height, width


class ImageCache:
    """Reads photographs, each from its file only once as long as there is room.

    The first reader of a file decodes it and leaves the pixels for the others; what comes when the memory is full
    is decoded every time. Images are the same with and without.

    Args:
        files: what will be read.
        budget: bytes to use at most; 0 keeps nothing.
        least: short side, in pixels, that is enough; see `read_rgb`.

    Raises:
        UserError: the machine has less shared memory than that.
    """

    def __init__(self, files: Sequence[Path], budget: int, least: int) -> None:
        self.least = least
        self.numbers = {file: number for number, file in enumerate(files if budget else ())}
        if not budget:
            return
        if _SHARED.is_dir() and (free := shutil.disk_usage(_SHARED).free) < budget:
            raise UserError(
                f"--cache_images {budget / 2**30:g}: {_SHARED} has only {free / 2**30:.1f} GiB of shared memory left "
                "(a container gets more with --ipc host or --shm-size)"
            )
        # A page counts only once it is written to, so room that is never needed takes no memory.
        self.pixels = torch.empty(budget, dtype=torch.uint8).share_memory_()
        self.entries = torch.zeros(len(files) + 1, _COLUMNS, dtype=torch.int64).share_memory_()  # last: the end
        self.lock = multiprocessing.get_context("spawn").Lock()

    def read(self, file: Path) -> Image.Image:
        """As `read_rgb`, of the short side that is enough."""
        number = self.numbers.get(file)
        if number is None:
            return read_rgb(file, self.least)
        with self.lock:
            start, height, width = self.entries[number].tolist()
        if height:
            pixels = self.pixels[start : start + 3 * height * width].view(height, width, 3)
            return Image.fromarray(pixels.numpy())
        image = read_rgb(file, self.least)
        self._keep(number, image)
        return image

    def _keep(self, number: int, image: Image.Image) -> None:
        pixels = torch.from_numpy(np.array(image)).flatten()
        with self.lock:
            start = int(self.entries[-1, 0])
            if self.entries[number, 1] or start + len(pixels) > len(self.pixels):
                return
            self.pixels[start : start + len(pixels)] = pixels
            self.entries[-1, 0] = start + len(pixels)
            self.entries[number] = torch.tensor([start, image.height, image.width])
