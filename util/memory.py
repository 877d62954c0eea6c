"""How much memory a device has to give."""

import os
from pathlib import Path

import torch

_LIMITS = (  # of this process's control group: limit, use
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_memory(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of the machine within the limit that a container may set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_of_machine(), *(limit - used for limit, used in map(_numbers, _LIMITS) if limit)])


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
