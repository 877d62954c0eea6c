"""Single-image reflection removal: the one import name of everything here.

    from dereflect import load_separator          # a photograph without its reflections
    from dereflect import selective_scan, Mamba   # state-space layers that run everywhere

In a checkout this file makes the folder around it a package; installed, it is that package's `__init__.py`. So both
doors lead to the same modules, and none of them takes a name like `models` or `data` from a user's own program.
"""

import importlib
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
__version__ = "0.2.0"

_HOMES = {
    "load_separator": "models.separator",
    "Separator": "models.separator",
    "selective_scan": "models.scan",
    "causal_conv1d": "models.scan",
    "Mamba": "models.scan",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """What is exported, loaded when it is first asked for: `import dereflect` alone loads nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
