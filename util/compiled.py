"""Functions that numba compiles on the user's machine."""

from collections.abc import Callable
from functools import partial

import numba


def compiled(signature) -> Callable[[Callable], Callable]:
    """Compile a function here and now, unless an earlier run left it in numba's cache on disk.

    It runs without the interpreter's lock, and a division by zero gives infinity.
    """

    def compile_it(function: Callable) -> Callable:
        compiler = partial(numba.njit, signature, nogil=True, error_model="numpy")
        try:
            return compiler(cache=True)(function)
        except RuntimeError:  # no folder for the cache can be written
            return compiler()(function)

    return compile_it
