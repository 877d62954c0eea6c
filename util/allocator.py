"""Memory on the CPU: keep what has been freed for the next step, as long as that is of the same size."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc not to give large freed blocks back to the system.

    By default it does so at once, and every activation of every step has its pages faulted in and zeroed again,
    which costs about as much as writing them. Does nothing where the C library isn't glibc.
    """
    if mallopt := _of_glibc("mallopt"):
        limit = 2**31 - 1  # mallopt takes an int
        mallopt(_M_MMAP_THRESHOLD, limit)
        mallopt(_M_TRIM_THRESHOLD, limit)


def release_freed_memory() -> None:
    """Give it back after all: between images of different sizes, whose activations would not fit into each other's
    gaps, so that a process came to hold several times what it needs."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str):
    """A function of the C library, or None where it isn't glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
