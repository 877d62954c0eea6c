"""The device that computes: which one, in which precision, how repeatably, and with how much memory."""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dereflect.options.arguments import STRIDE
from dereflect.util.errors import UserError

_LEAST_CROP = 64  # pixels: smaller training crops are not worth suggesting
_LIMITS = (  # of this process's control group: limit, use
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)

# ---- which device, which precision, which numbers -----------------------------------------------------------------


def choose_device(gpu_ids: list[int] | None, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of one process.

    Args:
        gpu_ids: --gpu_ids; None takes a GPU if there is one, an empty list the CPU.
        local_rank: the number of this process on this machine.
        processes: how many processes train together.

    Raises:
        UserError: --gpu_ids names a GPU that doesn't exist, or several GPUs for one process.
    """
    if gpu_ids == []:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if gpu_ids in (None, [0]) and torch.backends.mps.is_available() and processes == 1:
            return torch.device("mps")
        if gpu_ids:
            raise UserError(f"--gpu_ids {','.join(map(str, gpu_ids))}: PyTorch finds no such GPU here; -1 is the CPU")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    ids = list(range(count if processes > 1 else 1)) if gpu_ids is None else gpu_ids
    if max(ids) >= count:
        raise UserError(f"--gpu_ids {max(ids)}: there is no such GPU; there are {', '.join(map(str, range(count)))}")
    if len(ids) > 1 and processes == 1:
        raise UserError("several GPUs want one process each: ./runner.sh 0,1 MODEL 'COMMENT', or torchrun")
    if local_rank >= len(ids):
        raise UserError(f"{local_rank + 1} processes on this machine, but only {len(ids)} GPUs for them")
    return torch.device("cuda", ids[local_rank])


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Whether --precision means bfloat16 on this device; "auto" does where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_deterministic(seed: int) -> None:
    """Seed torch and select deterministic algorithms: the same seed on the same machine gives the same numbers, bit
    for bit. Call it before anything is computed on a GPU."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False
    # Matrix products as precise as cuDNN's convolutions are by default, which 1x1 convolutions otherwise are.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32


def random_states(device: torch.device) -> dict[str, torch.Tensor | None]:
    """The states of torch's random numbers, as `set_random_states` takes them."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"random": torch.get_rng_state(), "random_cuda": cuda}


def set_random_states(states: dict, device: torch.device) -> None:
    """Continue the random numbers where `random_states` was called; those of a GPU only if it was called for one."""
    torch.set_rng_state(states["random"])
    if device.type == "cuda" and states["random_cuda"] is not None:
        torch.cuda.set_rng_state(states["random_cuda"], device)


# ---- memory -------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks instead of giving them back to the system.

    By default glibc gives them back at once, and every activation of every step has its pages faulted in and zeroed
    again, which costs about as much as writing them. Does nothing where the C library isn't glibc.
    """
    if mallopt := _glibc_function("mallopt"):
        limit = 2**31 - 1  # mallopt takes an int
        mallopt(_M_MMAP_THRESHOLD, limit)
        mallopt(_M_TRIM_THRESHOLD, limit)


def release_freed_memory() -> None:
    """Give freed blocks back to the system. Call it between images of different sizes: their activations don't fit
    into each other's gaps, and the process would come to hold several times what it needs."""
    if malloc_trim := _glibc_function("malloc_trim"):
        malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Free memory in bytes: of the GPU, or of the machine within the limit that a container may set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_free_on_machine(), *(limit - used for limit, used in map(_read_numbers, _LIMITS) if limit)])


def total_memory(device: torch.device) -> int:
    """Memory in bytes, free or not: of the GPU, or of the machine within the limit that a container may set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in map(_read_numbers, _LIMITS) if limit)])


@contextlib.contextmanager
def enough_memory(remedy: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error in the block, of a GPU or of the machine, into a UserError.

    Args:
        remedy: called only then; returns the message, which says what to do.

    Raises:
        UserError: with that message.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(remedy()) from error


def less_memory_for_a_step(options: argparse.Namespace, device: torch.device, step: int) -> str:
    """The message for a training step that needs too much memory: which options need less.

    Args:
        options: batchSize, accumulate, compile, checkpoint_activations, precision and crop_size are used.
        device: that computes.
        step: its number.
    """
    ways = []
    if options.batchSize > 1 and options.compile != "graphs":
        part = max(size for size in range(1, options.batchSize) if options.batchSize % size == 0)
        times = options.batchSize // part
        ways.append(f"--batchSize {part} --accumulate {options.accumulate * times} (the same samples, 1/{times})")
    if not options.checkpoint_activations:
        ways.append("--checkpoint_activations (less than half, a third slower)")
    bf16 = wants_bf16(options.precision, device)
    if not bf16:
        ways.append("--precision bf16 (about half, but another run)")
    if (side := int(options.crop_size / math.sqrt(2)) // STRIDE * STRIDE) >= _LEAST_CROP:
        ways.append(f"--crop_size {side} (about half, but another run)")
    return (
        f"not enough memory on {device} for step {step} with --batchSize {options.batchSize}, "
        f"--crop_size {options.crop_size} and {'bf16' if bf16 else 'fp32'}; what takes less: "
        + (", ".join(ways) or "a smaller --inet")
    )


def less_memory_for_images(shape: tuple[int, ...], name: str, device: torch.device) -> str:
    """The message for test images that need too much memory: which options need less.

    Args:
        shape: of the batch, (B, 3, H, W).
        name: of the test set.
        device: that computes.
    """
    count, _, height, width = shape
    ways = ["--eval_batch 1"] if count > 1 else ["--precision bf16", "leaving such images out"]
    return (
        f"not enough memory on {device} to separate {count} of {name} with {width}x{height} pixels; what "
        f"takes less: {', '.join(ways)}; all steps of the epoch are saved: --resume evaluates it again "
        "(tools/evaluate.py --protocol native separates images of any size, in tiles)"
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # a GPU's, and what PyTorch's libraries for the CPU say
        words = ("out of memory", "allocate memory", "bad_alloc", "calculation overflowed", "multiplication overflow")
        return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or error.errno == errno.ENOMEM


def _free_on_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_numbers(files: tuple[Path, Path]) -> tuple[int, int]:
    """The numbers in both files; 0, 0 where there is no limit."""
    try:
        limit, used = (int(file.read_text()) for file in files)
    except (OSError, ValueError):  # no such files, or "max"
        return 0, 0
    return limit, used


def _glibc_function(name: str):
    """A function of the C library, or None where that isn't glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
