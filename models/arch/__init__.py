"""The named networks: every public function here is one, can be named with --inet, is listed and tested."""

import inspect
import sys

from models.arch.dsrnet import DSRNet


def dsrnet_s() -> DSRNet:
    """DSRNet, small: 9.9 M parameters."""
    return DSRNet(32, (2, 2, 2), 4, (2, 2, 2), split=True)


def dsrnet_m() -> DSRNet:
    """DSRNet, medium: 53.6 M parameters."""
    return DSRNet(64, (2, 2, 2, 2), 4, (2, 2, 2, 2), split=False)


def dsrnet_l() -> DSRNet:
    """DSRNet of the ICCV 2023 paper: 124.6 M parameters."""
    return DSRNet(64, (2, 2, 4, 8), 12, (2, 2, 2, 2), split=False)


def _models() -> dict:
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == __name__ and name not in {"list_models", "create_model"} and name[0] != "_"
    }


def list_models() -> list[str]:
    """Names that `create_model` and --inet take, sorted."""
    return sorted(_models())


def create_model(name: str) -> DSRNet:
    """A network by name, freshly initialised.

    Returns:
        net(image, features) -> (transmission, reflection, residue); see `DSRNet.forward`.

    Raises:
        KeyError: there is no such name; the message lists those there are.
    """
    models = _models()
    if name not in models:
        raise KeyError(f"there is no model '{name}'; there are {', '.join(sorted(models))}")
    return models[name]()
