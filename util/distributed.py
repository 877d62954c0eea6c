"""One process or several: how they start, exchange values and notice that one of them is lost."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dereflect.util import disk
from dereflect.util.device import choose_device
from dereflect.util.errors import UserError

_PATIENCE = timedelta(minutes=20)  # waits for a process that is alive but late: it may compile, or write slowly
_BEAT = 5.0  # seconds between two signs of life
_MISSED = 9  # beats in a row that another process misses until it counts as lost
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The device and the rank of this process, and the number of all processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def gather(self, values: list) -> list:
        """Join the lists of all processes; every process gets the result."""
        if self.size == 1:
            return values
        parts: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def share(self, value: object) -> object:
        """The value that the main process passes; every process gets it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, call: Callable[[], T]) -> T:
        """Call a function in the main process only; every process gets its result, or the UserError that it raises."""
        outcome: T | UserError | None = None
        if self.is_main:
            try:
                outcome = call()
            except UserError as error:
                outcome = error
        outcome = self.share(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over all processes."""
        if self.size == 1:
            return model
        for parameter in model.parameters():
            if parameter.requires_grad and 1 in parameter.shape:
                parameter.register_hook(partial(_restride, parameter.stride()))
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """In this context, end this process when another one no longer shows signs of life.

        Args:
            folder: one that all processes share; each touches a file of its own there.
        """
        if self.size == 1:
            yield
            return
        over = threading.Event()
        files = [folder / f"alive_{rank}" for rank in range(self.size)]
        _touch(files[self.rank])
        self.barrier()  # from here on every file is of this start
        thread = threading.Thread(target=_watch, args=(files, self.rank, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1:
            dist.destroy_process_group()


def _restride(wanted: tuple[int, ...], gradient: torch.Tensor) -> torch.Tensor:
    """A gradient with the strides of its parameter, where the two only differ in dimensions of size 1.

    There a stride means nothing, and every operation chooses its own. DistributedDataParallel, however, compares all
    strides, and copies a gradient that has others, with a warning.
    """
    pairs = zip(wanted, gradient.stride(), gradient.shape, strict=True)
    if any(stride != own and size != 1 for stride, own, size in pairs):
        return gradient
    return gradient.as_strided(gradient.shape, wanted)


def join(gpu_ids: list[int] | None) -> World:
    """The device and rank of this process; joins the other processes if torchrun has started several.

    Args:
        gpu_ids: as of `choose_device`.

    Raises:
        UserError: as `choose_device`.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(gpu_ids, local_rank, size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return World(device, rank, size)


def _watch(files: list[Path], rank: int, over: threading.Event) -> None:
    """Touch the file of this rank, look at the other ranks' files, and end this process when one stops changing.

    Counted are missed beats, not seconds: when a job is suspended as a whole, no process counts as lost. A process that
    ends normally removes its file, and isn't missed.
    """
    seen = [disk.changed_at(file) for file in files]
    missed = [0] * len(files)
    while not over.wait(_BEAT):
        _touch(files[rank])
        for other, file in enumerate(files):
            before, seen[other] = seen[other], disk.changed_at(file)
            missed[other] = missed[other] + 1 if seen[other] is not None and seen[other] == before else 0
            if other != rank and missed[other] == _MISSED:
                _end(other, rank)
    files[rank].unlink(missing_ok=True)


def _touch(file: Path) -> None:
    with contextlib.suppress(OSError):  # such as a full disk, which the training itself will report
        file.touch()


def _end(lost: int, rank: int) -> None:
    """End the process at once: the main thread may be waiting for the lost process."""
    print(
        f"error: the process of rank {lost} has shown no life for {_BEAT * _MISSED:g} s; rank {rank} ends, too "
        "(torchrun --max-restarts starts all again, and --resume auto goes on from the last checkpoint)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
