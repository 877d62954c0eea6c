"""A network of the published code, out of a folder that holds a clone of a DSRNet or MDSRNet repository.

Its packages have names such as `models`, as ours have, so they are imported in the place of ours for a moment. On a
CPU its `.cuda()` calls do nothing. Where the package mamba_ssm isn't installed, a stand-in has its reference scan: the
plain recurrence.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from torch import Tensor, nn

from dereflect.models.scan import Mamba, selective_scan_reference, set_backend
from dereflect.models.weights import translate
from dereflect.util.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]


class ReferenceMamba(Mamba):
    """`mamba_ssm.Mamba` with the plain recurrence."""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, **_):
        super().__init__(d_model, d_state, d_conv, expand)

    def forward(self, x: Tensor, **_) -> Tensor:
        set_backend("reference")
        try:
            return super().forward(x)
        finally:
            set_backend(None)


class PublishedNetwork(nn.Module):
    """The published network of a name, with the weights of ours.

    Args:
        folder: the clone.
        name: of a function of its models/arch/__init__.py, and of one of ours.
        ours: the network whose weights it gets.
        device: "cpu" or "cuda".

    Raises:
        UserError: the folder holds no such code, it needs a package that isn't there, or its network isn't that one.
    """

    def __init__(self, folder: Path, name: str, ours: nn.Module, device: str):
        super().__init__()
        self.device = device
        if not (folder / "models" / "arch" / "__init__.py").is_file():
            raise UserError(f"--against {folder}: there is no models/arch/__init__.py in it")
        try:
            with _in_the_place_of_ours(folder), self._without_cuda():
                create = getattr(importlib.import_module("models.arch"), name, None)
                if create is None:
                    raise UserError(f"--against {folder}: its models/arch/__init__.py has no {name}")
                self.network = create()
        except ImportError as error:
            raise UserError(f"--against {folder}: {error}; it wants a package that this Python lacks") from error
        self.network.load_state_dict(_weights(ours, self.network, f"--against {folder}: its {name}"))

    def forward(self, image: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As of our network."""
        with self._without_cuda():
            return self.network(image, features)

    @contextlib.contextmanager
    def _without_cuda(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind in (Tensor, nn.Module) if self.device == "cpu" else ():
                stack.enter_context(patch.object(kind, "cuda", lambda self, *_, **__: self))
            yield


def _weights(ours: nn.Module, published: nn.Module, what: str) -> dict[str, Tensor]:
    """The state dict of the published network with the values of ours."""
    values = ours.state_dict()
    state = {name: values.get(translate(name)) for name in published.state_dict()}
    unfit = [
        name for name, value in published.state_dict().items() if getattr(state[name], "shape", None) != value.shape
    ]
    left = values.keys() - {translate(name) for name in state}
    if unfit or left:
        first = f"its parameter {unfit[0]}" if unfit else f"our {min(left)}"
        raise UserError(f"{what} is another network than ours: {first} has no counterpart")
    return state


@contextlib.contextmanager
def _in_the_place_of_ours(folder: Path) -> Iterator[None]:
    """Packages and modules of the folder can be imported; of ours with the same names nothing is lost."""
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}

    def taken() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in names]

    kept = {name: sys.modules.pop(name) for name in taken()}
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
    stand_ins = {} if importlib.util.find_spec("mamba_ssm") else _stand_ins()
    try:
        with patch.object(sys, "path", [str(folder.resolve()), *elsewhere]), patch.dict(sys.modules, stand_ins):
            importlib.invalidate_caches()
            yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(kept)


def _stand_ins() -> dict[str, ModuleType]:
    """What stands for mamba_ssm."""
    names = ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple")
    names += ("mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules = {name: ModuleType(name) for name in names}
    for name in ("mamba_ssm", "mamba_ssm.modules.mamba_simple"):
        modules[name].Mamba = ReferenceMamba
    modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_reference
    for module in modules.values():
        module.__path__ = []
    return modules
