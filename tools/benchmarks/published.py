"""Networks and training samples of the published code, out of a clone of a DSRNet or MDSRNet repository.

Its packages have names such as `models` that may be others' too, and are imported for a moment only. On a CPU its
`.cuda()` calls do nothing. Where the package mamba_ssm isn't installed, a stand-in has its reference scan: the plain
recurrence. What else it imports and never calls has stand-ins, too.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils.data import Dataset

from dereflect.data.folders import Sets
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
        with _imported(folder, "models.arch", device) as arch:
            create = getattr(arch, name, None)
            if create is None:
                raise UserError(f"--against {folder}: its models/arch/__init__.py has no {name}")
            with _with_blocks(arch):
                self.network = create()
        self.network.load_state_dict(_weights(ours, self.network, f"--against {folder}: its {name}"))

    def forward(self, image: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As of our network."""
        with _without_cuda(self.device):
            return self.network(image, features)


def published_samples(folder: Path, sets: Sets) -> Dataset:
    """The training samples of the published code, of the folders that ours are made of.

    Args:
        folder: the clone.
        sets: our images to train on, and their mix.

    Raises:
        UserError: the folder holds no such code, or it needs a package that isn't there.
    """
    with _imported(folder, "data.sirs_dataset", "cpu") as module, contextlib.redirect_stdout(io.StringIO()):
        parts = []
        for source in sets.mix:
            if source == "synthetic":
                parts.append(module.DSRDataset(str(sets.photographs[0].parent)))
            else:
                pairs = sets.pairs[source][0].mixture.parents[1]
                parts.append(module.DSRTestDataset(str(pairs), enable_transforms=True))
        return module.FusionDataset(parts, list(sets.mix.values()))


@contextlib.contextmanager
def _imported(folder: Path, name: str, device: str) -> Iterator[ModuleType]:
    """A module of the published code; it can import others of them meanwhile.

    Raises:
        UserError: the folder has no such module, or what runs in it raises.
    """
    path = Path(*name.split("."))
    if not any((folder / file).is_file() for file in (path / "__init__.py", path.with_suffix(".py"))):
        raise UserError(f"--against {folder}: there is no {path} in it")
    try:
        with _in_the_place_of_ours(folder), _without_cuda(device):
            yield importlib.import_module(name)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--against {folder}: {error}; it wants a package that this Python lacks") from error
    except Exception as error:
        raise UserError(f"--against {folder}: its {name} fails: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _without_cuda(device: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in (Tensor, nn.Module) if device == "cpu" else ():
            stack.enter_context(patch.object(kind, "cuda", lambda self, *_, **__: self))
        yield


def _with_blocks(arch: ModuleType) -> contextlib.AbstractContextManager:
    """Give networks that don't say how many blocks their residue has the published weights' number.

    DSRNet's code took that number out of a default and left dsrnet_s without, which can't be built since.
    """
    network = getattr(arch, "DSRNet", None)
    if network is None or "lrm_blk_nums" not in inspect.signature(network).parameters:
        return contextlib.nullcontext()
    return patch.object(arch, "DSRNet", functools.partial(network, lrm_blk_nums=[2, 4]))


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
    stand_ins = {
        name: module for name, module in _stand_ins().items() if not importlib.util.find_spec(name.partition(".")[0])
    }
    try:
        with patch.object(sys, "path", [str(folder.resolve()), *elsewhere]), patch.dict(sys.modules, stand_ins):
            importlib.invalidate_caches()
            yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(kept)


def _stand_ins() -> dict[str, ModuleType]:
    """What stands for mamba_ssm, and for what is imported and never called."""
    names = ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple")
    names += ("mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules = {name: ModuleType(name) for name in names}
    for name in ("mamba_ssm", "mamba_ssm.modules.mamba_simple"):
        modules[name].Mamba = ReferenceMamba
    modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_reference
    for module in modules.values():
        module.__path__ = []
    modules |= {name: ModuleType(name) for name in ("kornia", "tensorboardX")}
    modules["tensorboardX"].SummaryWriter = None
    return modules
