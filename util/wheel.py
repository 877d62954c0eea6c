"""How a wheel is laid out: all folders become the one package `dereflect`, whose `__init__.py` is dereflect.py.

A hook of hatchling's, which builds. An editable installation needs none of it: there dereflect.py finds the folders.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ROOMS = ("models", "data", "options", "tools", "util", "engine.py", "train_sirs.py")


class Layout(BuildHookInterface):
    """Tells hatchling where each file goes."""

    def initialize(self, version: str, build_data: dict) -> None:
        """`version` is "standard" or "editable"."""
        if version == "standard":
            places = {room: f"dereflect/{room}" for room in _ROOMS}
            places |= {"dereflect.py": "dereflect/__init__.py", "util/py.typed": "dereflect/py.typed"}
            build_data["force_include"] |= places
