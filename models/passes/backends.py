"""Which backend computes the passes: what is asked for, else the compiled one where it works.

Asked for, strongest first: `set_backend(name)`, the environment variable PASSES_BACKEND. The compiled backend is found
to work by trying it on a tiny tensor, never by a version number.
"""

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger("passes")

BACKENDS = ("auto", "cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)  # that the compiled backend reads and writes

_asked_for: str | None = None


def set_backend(name: str | None) -> None:
    """Use `name`, one of `BACKENDS`, for all passes; None undoes it.

    "reference" leaves the blocks to plain torch. Raises ValueError for an unknown name, RuntimeError for "cpu" where
    that can't run.
    """
    global _asked_for
    if name is not None:
        _check(name, "set_backend")
    _asked_for = name


def why_refused(requested: str | None, device: str) -> str | None:
    """What is wrong with the requested backend or, without a request, with that of PASSES_BACKEND; None if nothing is.

    On devices other than the CPU nothing is: they have no passes of their own, see `chosen_backend`.
    """
    name = requested or os.environ.get("PASSES_BACKEND") or "auto"
    source = "" if requested else "PASSES_BACKEND "
    if name not in BACKENDS:
        return f"{source}{name}: there is no such backend of the passes; there are {', '.join(BACKENDS)}"
    if name == "cpu" and device == "cpu" and (reason := why_not()):
        return f"{source}cpu: numba's passes can't run: {reason}"
    return None


def chosen_backend(x: Tensor, dtype: torch.dtype) -> str | None:
    """The backend for activations `x` that are computed with in `dtype`; None: the blocks are left to plain torch.

    So they are under torch.compile, which makes passes of its own, on other devices and in other precisions.

    Raises ValueError for an unknown name in PASSES_BACKEND, RuntimeError where "cpu" is asked for and can't run.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or dtype not in DTYPES or x.numel() == 0:
        return None
    name = _asked_for or os.environ.get("PASSES_BACKEND") or "auto"
    _check(name, "PASSES_BACKEND")
    if name == "reference":
        return None
    if name == "auto" and why_not():
        _log_once(f"passes between the products: plain torch, as numba's don't work: {why_not()}")
        return None
    _log_once("passes between the products: compiled by numba")
    return "cpu"


def backend_module(name: str) -> ModuleType:
    """The module behind a backend; importing it may fail with what it needs."""
    return importlib.import_module(f"dereflect.models.passes.{name}")


@cache
def why_not() -> str | None:
    """None where the compiled backend works, else the reason why not."""
    try:
        with _disable_current_modes():  # really computes, even where a model is only traced or counted
            backend_module("cpu").norm(torch.ones(1, 1), 1e-6)
    except Exception as error:  # whatever an installation can get wrong
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _log_once(message: str) -> None:
    logger.info(message)


def _check(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: no backend {name!r} of the passes; choose from {', '.join(BACKENDS)}")
    if name == "cpu" and why_not():
        raise RuntimeError(f"{source} 'cpu': numba's passes can't run: {why_not()}")
