"""Decoded training photographs in memory that all workers of a process share."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from dereflect.data.transforms import Photograph
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb

_SHARED = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory; nothing is written there by name
_COLUMNS = 4  # of an entry: where it starts, height, width, whether it is whole


class ImageCache:
    """Reads photographs, and decodes each file only once while there is room.

    The first reader of a file decodes it and keeps the pixels for all workers. When the memory is full, further files
    are decoded every time. The cache changes no image.

    Every worker writes into its own part of the memory, and an image counts only when it is complete. So there is no
    lock that a killed worker could leave locked, and nobody sees an incomplete image.

    Args:
        files: the files that will be read.
        budget: bytes of memory, at most; 0 keeps nothing.
        workers: number of processes that will read; 0 if this process reads.
        least: short side, in pixels, that is enough; see `read_rgb`.

    Raises:
        UserError: the machine has less shared memory than `budget`.
    """

    def __init__(self, files: Sequence[Path], budget: int, workers: int, least: int) -> None:
        self.least = least
        self.numbers = {file: number for number, file in enumerate(files if budget else ())}
        if not budget:
            return
        if _SHARED.is_dir() and (free := shutil.disk_usage(_SHARED).free) < budget:
            raise UserError(
                f"--cache_images {budget / 2**30:g}: {_SHARED} has only {free / 2**30:.1f} GiB of shared memory left "
                "(a container gets more with --ipc host or --shm-size)"
            )
        # The system provides a page when it is first written to, so an unused part takes no memory.
        self.pixels = torch.empty(budget, dtype=torch.uint8).share_memory_()
        self.entries = torch.zeros(len(files), _COLUMNS, dtype=torch.int64).share_memory_()
        # Width and height of the photograph, and the part of the pixels that it fills.
        self.full = torch.zeros(len(files), 6, dtype=torch.float64).share_memory_()
        self.used = torch.zeros(max(1, workers), dtype=torch.int64).share_memory_()  # bytes of each worker's part

    def read(self, file: Path) -> Photograph:
        """As `read_rgb`, at a short side of at least `least`; not to be written into."""
        number = self.numbers.get(file)
        if number is None or not self.entries[number, -1]:  # written last, so looked at first
            photograph = Photograph.of(read_rgb(file, self.least))
            if number is not None:
                self._keep(number, photograph)
            return photograph
        start, height, width, _ = self.entries[number].tolist()
        pixels = self.pixels[start : start + 3 * height * width].view(height, width, 3)
        full_width, full_height, *extent = self.full[number].tolist()
        return Photograph(pixels.numpy(), (int(full_width), int(full_height)), tuple(extent))

    def _keep(self, number: int, photograph: Photograph) -> None:
        worker = get_worker_info()
        part = worker.id if worker else 0
        room = len(self.pixels) // len(self.used)
        used = int(self.used[part])
        pixels = torch.tensor(photograph.pixels).flatten()
        # Another worker may have kept the file in the meantime. If two do so at once, the later entry is used.
        if self.entries[number, -1] or used + len(pixels) > room:
            return
        start = part * room + used
        self.pixels[start : start + len(pixels)] = pixels
        self.used[part] = used + len(pixels)
        self.full[number] = torch.tensor([*photograph.size, *photograph.extent], dtype=torch.float64)
        self.entries[number, :-1] = torch.tensor([start, *photograph.pixels.shape[:2]])
        self.entries[number, -1] = 1
