"""Which backend computes a scan: what is asked for, else the first that works.

Asked for, strongest first: the call's `backend=`, `set_backend(name)`, the environment variable SCAN_BACKEND.
A backend is found to work by trying it on a tiny scan, never by a version number.
"""

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger("scan")

# In the order in which "auto" tries them.
MODULES = {"mamba_ssm": "package", "triton": "gpu", "cpu": "cpu", "reference": "reference"}
BACKENDS = ("auto", *MODULES)

_asked_for: str | None = None


def set_backend(name: str | None) -> None:
    """Use `name`, one of `BACKENDS`, for every scan that does not ask for another; None undoes it.

    Raises ValueError for an unknown name. Whether the backend can run is seen when a scan comes, as that
    depends on the device of its tensors.
    """
    global _asked_for
    if name is not None:
        _check_name(name, "set_backend")
    _asked_for = name


def asked_for() -> str | None:
    """The name given to `set_backend`, if any."""
    return _asked_for


def available_backends(device: str) -> dict[str, str | None]:
    """For every backend: None where it works on tensors of `device` ("cpu", "cuda"), else the reason."""
    return {name: why_not(name, device) for name in MODULES}


def backend_module(name: str) -> ModuleType:
    """The module behind a backend; importing it may fail with what it needs."""
    return importlib.import_module(f"models.scan.{MODULES[name]}")


def choose_backend(requested: str | None, device: str, dtype: torch.dtype) -> str:
    """The backend for tensors of `device` and `dtype`, when `requested` (None or "auto": the first that works).

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
    _log_once(f"selective scan of {device} tensors: {name}, as asked for")
    return name


# What torch.compiler.assume_constant_result does, without importing the compiler (and Triton with it): a traced
# graph holds the name that was chosen when it was traced.
choose_backend._dynamo_marked_constant = True


@cache
def why_not(name: str, device: str) -> str | None:
    """None where the backend works on tensors of `device`, else the reason why not."""
    try:
        module = backend_module(name)
        if not module.runs_on(device):
            return f"it doesn't run on {device} tensors"
        with _disable_current_modes():  # really computes, even where a model is only traced or counted
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
    """The first backend that works and why the earlier ones don't, which is logged."""
    if double:
        _log_once("selective scan of float64 tensors: reference, the only one with that precision")
        return "reference"
    skipped = []
    for name in MODULES:
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
