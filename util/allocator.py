"""Memory on the CPU: keep what has been freed for the next step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc not to give large freed blocks back to the system.

    By default it does so at once, and every activation of every step has its pages faulted in and zeroed again,
    which costs about as much as writing them. Does nothing where the C library isn't glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        limit = 2**31 - 1  # mallopt takes an int
        mallopt(_M_MMAP_THRESHOLD, limit)
        mallopt(_M_TRIM_THRESHOLD, limit)
