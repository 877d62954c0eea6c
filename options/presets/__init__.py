"""Recipes by name, for --config: the files of this folder."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(config: Path) -> Path | None:
    """The file of a recipe that is named as --config; None for anything else, such as the path of a file."""
    return _FOLDER / f"{config}.yaml" if str(config) in names() else None
