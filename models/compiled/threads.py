"""How the CPU kernels run: by torch's own OpenMP threads, with memory in huge pages."""

import ctypes
import itertools
import mmap
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
VECTOR = 64  # bytes

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_tasks(kernel: Callable, tasks: int, scratch: int, *settings, parallel: bool = True) -> None:
    """Call `kernel(memory, first, last, *settings)` for all tasks, in as many threads as torch uses.

    Each thread has memory for `scratch` vectors, and works on tasks `first` to `last` - 1 in one call. Waking the
    others takes tens of microseconds: unless it is `parallel`, the work is left to the thread that asks for it.
    """
    threads = min(tasks, torch.get_num_threads()) if parallel else 1
    pieces = min(tasks, 4 * threads) if threads > 1 else 1  # several each, as threads may be slowed unevenly
    waiting = itertools.pairwise([tasks * i // pieces for i in range(pieces + 1)])

    def work() -> None:
        memory = torch.empty((scratch + 1) * VECTOR, dtype=torch.uint8)
        aligned = -(-memory.data_ptr() // VECTOR) * VECTOR
        for first, last in waiting:
            kernel(aligned, first, last, *settings)

    if threads == 1:
        work()
    else:
        in_parallel(work, threads)


def in_parallel(work: Callable[[], None], threads: int) -> None:
    """Call `work` in each of `threads` threads: torch's own, where its OpenMP library can be reached.

    Torch's threads go on spinning for milliseconds after torch needed them; other threads would have to share the
    processors with them.
    """
    if (openmp := _openmp()) is None:
        helpers = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            helper.result()
        return

    errors = []

    def guarded(_) -> None:
        try:
            work()
        except BaseException as error:  # the caller is C code, which could do nothing with it
            errors.append(error)

    openmp.GOMP_parallel(_Callback(guarded), None, threads, 0)
    if errors:
        raise errors[0]


def in_huge_pages(new: Tensor) -> Tensor:
    """The new tensor, in huge pages if it is large: the first touch of many small pages takes as long as a scan."""
    if sys.platform == "linux" and new.nbytes >= HUGE_PAGE:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = new.data_ptr() + new.nbytes - start
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return new


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it has the entry point of GNU's."""
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"/.*/lib(?:gomp|iomp5|omp)\b.*", maps.read_text()) if maps.exists() else []
    own = [path for path in loaded if path.startswith(str(Path(torch.__file__).parent))]
    for path in [*own, *loaded]:
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):  # a forked process has no threads but the one that forked
    os.register_at_fork(after_in_child=_pool.cache_clear)
