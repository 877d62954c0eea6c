"""What a network costs, counted with tensors that have shapes but no values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dereflect.models.scan.flops  # noqa: F401  for FLOP counters to know the scan
from dereflect.models.arch import create_model
from dereflect.models.arch.blocks import Block
from dereflect.models.features import build_features


def _product_flops(_: torch.Size, a: torch.Size, b: torch.Size, **__) -> int:
    """FLOPs of result += a @ b, (N, K, L) and (N, L, M)."""
    return 2 * a.numel() * b[-1]


def _depthwise_flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    """(N, H, W, C), and a weight of nine numbers for each channel."""
    return 2 * 9 * x.numel()


# The counter knows the products that make a tensor, but not the one that adds to a tensor in place.
FORMULAS = {torch.ops.aten.baddbmm_: _product_flops, torch.ops.passes.depthwise: _depthwise_flops}


@dataclass
class Module:
    """A part of a network: its parameters, and the FLOPs of its forward pass."""

    name: str
    parameters: int
    forward: int


@dataclass
class Costs:
    """The costs of a network for one image.

    Attributes:
        parameters: of the network.
        forward: FLOPs of its forward pass.
        vgg: FLOPs of VGG19's features, 0 where the network has a stem of its own.
        kept: bytes that the forward pass keeps for the backward pass.
        modules: parts that together are the whole network, the costliest first.
    """

    parameters: int
    forward: int
    vgg: int
    kept: int
    modules: list[Module]


def costs(name: str, height: int, width: int, depth: int) -> Costs:
    """Count a model's costs.

    Args:
        name: of `models.arch`.
        height, width: of the image, multiples of 16.
        depth: how deep the network is divided into modules.
    """
    with torch.device("meta"):
        network = create_model(name)
    frozen = build_features(network.features, "random")
    with FakeTensorMode():
        _take_values(network)
        if frozen:
            _take_values(frozen)
        image = torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as vgg_counter, torch.no_grad():
            features = frozen(image) if frozen else None
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, kept_bytes(network) as kept:
            network(image, features)
        flops = {called: sum(by_kind.values()) for called, by_kind in counter.get_flop_counts().items()}
    root = type(network).__name__
    modules = [
        Module(part, _count(module), _flops(module, f"{root}.{part}", flops))
        for part, module in _parts(network, depth).items()
    ]
    modules.sort(key=lambda module: -module.forward)
    return Costs(_count(network), counter.get_total_flops(), vgg_counter.get_total_flops(), kept(), modules)


@contextmanager
def kept_bytes(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes that forward passes in this block keep for the backward pass: each storage once, without the
    network's own parameters."""
    owned = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())


def _take_values(network: nn.Module) -> None:
    """Replace the parameters by tensors on the CPU that have shapes but no values."""
    for module in network.modules():
        for key, old in module._parameters.items():
            if old is not None:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                module._parameters[key] = nn.Parameter(new, old.requires_grad)


def _parts(network: nn.Module, depth: int, prefix: str = "") -> dict[str, nn.Module]:
    """The modules at a depth, or above it if they have no parts. A block is not divided: it uses the weights of its
    layers without calling the layers."""
    parts = {}
    for name, module in network.named_children():
        if depth > 1 and not isinstance(module, Block) and next(module.children(), None) is not None:
            parts |= _parts(module, depth - 1, f"{prefix}{name}.")
        else:
            parts[prefix + name] = module
    return parts


def _flops(module: nn.Module, name: str, flops: dict[str, int]) -> int:
    """FLOPs of a module that was called, or of the called modules in one that only holds others."""
    if name in flops:
        return flops[name]
    return sum(_flops(child, f"{name}.{key}", flops) for key, child in module.named_children())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
