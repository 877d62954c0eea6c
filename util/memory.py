"""How much memory a device has to give, and whether it was too little."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from util.errors import UserError

_LIMITS = (  # of this process's control group: limit, use
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_memory(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of the machine within the limit that a container may set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_of_machine(), *(limit - used for limit, used in map(_numbers, _LIMITS) if limit)])


@contextlib.contextmanager
def enough_memory(otherwise: Callable[[], str]) -> Iterator[None]:
    """Have a lack of memory within the context, of a GPU or of the machine, told as what a user can put right.

    Args:
        otherwise: called then; says what to do.

    Raises:
        UserError: with these words.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise UserError(otherwise()) from error


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # a GPU's, and what PyTorch's libraries for the CPU say
        words = ("out of memory", "allocate memory", "bad_alloc")
        return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or error.errno == errno.ENOMEM


def _of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _numbers(files: tuple[Path, Path]) -> tuple[int, int]:
    """What both files say; 0, 0 where there is no limit."""
    try:
        limit, used = (int(file.read_text()) for file in files)
    except (OSError, ValueError):  # no such files, or "max"
        return 0, 0
    return limit, used
