"""The choice of a backend for a scan: the requested one, else the first that works.

A request comes from, strongest first: the call's `backend=`, `set_backend(name)`, the environment variable
SCAN_BACKEND. A backend is tried on a tiny scan to see whether it works; version numbers are never looked at.

Every other module of this package is a backend, with the same functions:

    saved_shape(...)      the shape of what the forward pass saves for the backward pass
    scan(...)             y, the last state, what is saved, and y before the gate (empty where nothing needs it)
    scan_backward(...)    the gradients
"""

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger("scan")

NAMES = ("mamba_ssm", "triton", "cpu", "reference")
"""Modules of this package, in the order in which "auto" tries them."""

BACKENDS = ("auto", *NAMES)

_requested: str | None = None


def set_backend(name: str | None) -> None:
    """Use `name`, one of `BACKENDS`, for every scan that does not request another; None undoes it.

    Raises ValueError for an unknown name. Whether the backend can run depends on the device of the tensors, so a scan
    finds that out, not this function.
    """
    global _requested
    if name is not None:
        _check_name(name, "set_backend")
    _requested = name


def requested_backend() -> str | None:
    """The name given to `set_backend`, if any."""
    return _requested


def why_refused(requested: str | None, device: str) -> str | None:
    """What is wrong with the requested backend or, without a request, with that of SCAN_BACKEND; None if nothing is."""
    name = requested or os.environ.get("SCAN_BACKEND") or "auto"
    source = "" if requested else "SCAN_BACKEND "
    if name not in BACKENDS:
        return f"{source}{name}: there is no such scan backend; there are {', '.join(BACKENDS)}"
    reason = None if name == "auto" else why_not(name, device)
    return f"{source}{name}: {reason}" if reason else None


def available_backends(device: str) -> dict[str, str | None]:
    """For every backend: None where it works on tensors of `device` ("cpu", "cuda"), else the reason."""
    return {name: why_not(name, device) for name in NAMES}


def backend_module(name: str) -> ModuleType:
    """The module behind a backend; importing it may fail with what it needs."""
    return importlib.import_module(f"dereflect.models.scan.backends.{name}")


def choose_backend(requested: str | None, device: str, dtype: torch.dtype) -> str:
    """The name of the backend for tensors of `device` and `dtype`; for None or "auto" the first that works.

    Raises ValueError for an unknown name, RuntimeError with the reason for a backend that can't run here.
    """
    source = "backend" if requested else "SCAN_BACKEND"
    name = requested or os.environ.get("SCAN_BACKEND") or "auto"
    _check_name(name, source)
    double = dtype == torch.float64
    if name == "auto":
        return _first_that_works(device, double)
    reason = "it computes in float32; float64 needs 'reference'" if double and name != "reference" else None
    reason = reason or why_not(name, device)
    if reason:
        raise RuntimeError(f"selective_scan: {source} {name!r} can't run on {device} tensors: {reason}")
    _log_once(f"selective scan of {device} tensors: {name}, as requested")
    return name


# The same as torch.compiler.assume_constant_result, without importing the compiler (and Triton with it): a traced
# graph keeps the name that was chosen when it was traced.
choose_backend._dynamo_marked_constant = True


def _runs_on(name: str, device: str) -> bool:
    """Known without importing the backend, as that takes long; in its interpreter Triton runs on the CPU, too."""
    devices = {"mamba_ssm": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted or device in devices.get(name, (device,))


@cache
def why_not(name: str, device: str) -> str | None:
    """None where the backend works on tensors of `device`, else the reason why not."""
    try:
        if not _runs_on(name, device):
            return f"it doesn't run on {device} tensors"
        module = backend_module(name)
        with _disable_current_modes():  # computes for real, even where a model is only traced or counted
            tiny = torch.ones(1, 1, 2, device=device)
            state = torch.ones(1, 1, device=device)
            module.scan(tiny, tiny, -state, tiny, tiny, None, None, None, False, False)
            if device == "cuda":
                torch.cuda.synchronize()  # where a kernel's failure shows
    except Exception as error:  # whatever an installation can get wrong
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _first_that_works(device: str, double: bool) -> str:
    """The first backend that works; the log says why the earlier ones don't."""
    if double:
        _log_once("selective scan of float64 tensors: reference, the only one with that precision")
        return "reference"
    skipped = []
    for name in NAMES:
        reason = why_not(name, device)
        if reason is None:
            _log_once("; ".join([f"selective scan of {device} tensors: {name}", *skipped]))
            return name
        skipped.append(f"not {name}: {reason}")
    raise AssertionError("the reference runs everywhere")


@cache
def _log_once(message: str) -> None:
    logger.info(message)


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: no scan backend {name!r}; choose from {', '.join(BACKENDS)}")
