"""How much memory a network's forward pass takes."""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SIDES = 64, 128  # pixels, of the images that are tried
# Times what is counted, for scratch memory of torch's libraries and freed memory that they keep. On a CPU a process
# grows by 2.9 times as much with madsrnet_xs, 2.7 with dsrnet_xs and 1.6 with dsrnet_s, in bf16 by 3.4 and 2.6.
_HIDDEN = 3.5


def bytes_per_pixel(model: nn.Module) -> float:
    """The memory that a forward pass of the model takes at most for every pixel of its image, measured with small ones.

    Args:
        model: with a method `predict`, (1, 3, H, W) to anything.
    """
    device = next(model.parameters()).device
    small, large = (_peak(model, side, device) for side in _SIDES)  # their difference is free of what is constant
    return _HIDDEN * (large - small) / (_SIDES[1] ** 2 - _SIDES[0] ** 2)


def _peak(model: nn.Module, side: int, device: torch.device) -> int:
    with _Allocated() as allocated:
        model.predict(torch.full((1, 3, side, side), 0.5, device=device))
    return allocated.peak


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in the block and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
