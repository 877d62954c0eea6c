"""Files into batches: what there is, and the loaders of training, validation and test."""

import importlib
import multiprocessing
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import forkserver

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from data.folders import Pair, Sets, discover
from data.transforms import generator
from util.errors import UserError

__all__ = [
    "EpochSampler",
    "Pair",
    "Sets",
    "build_test_loaders",
    "build_train_loader",
    "build_val_loader",
    "discover",
]

_ORDER = 3  # purpose of random numbers
_PREFETCH = 4  # batches a worker makes ahead
_TEST_WORKERS = 2
_WORTH_WORKERS = 64  # images: for fewer, starting workers takes longer than they save


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in an order that depends on seed and epoch alone.

    A global batch is `world_size * batch_size` consecutive entries of the order, of which every rank takes
    its own; an incomplete one at the end is dropped. Iteration starts where `seek` said, however often it is
    begun.

    Args:
        length: samples an epoch.
        batch_size: samples of one process.
        seed: of the order.
        rank, world_size: which of how many processes this is.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.seek(0)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration in `epoch`, after `step` batches of this process."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever iteration starts."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # as it is now, even if `seek` is called while batches are still being made ahead
        order = generator(self.seed, epoch, 0, _ORDER).permutation(self.length)
        starts = ((step * self.world_size + self.rank) * self.batch_size for step in range(self.step, len(self)))
        return ([(epoch, int(index)) for index in order[start : start + self.batch_size]] for start in starts)


def build_train_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Batches of `TrainSet` samples, the same for any number of workers.

    Call `loader.batch_sampler.seek(epoch, step)` before every iteration; `len(loader)` is the batches of a
    whole epoch on one process.

    Args:
        options: dataset, batchSize, nThreads, seed, gpu_ids and those of `TrainSet`.
        sets: from `discover`.
        rank, world_size: which of how many processes this is; together they take batchSize * world_size
            samples a step.

    Raises:
        UserError: an epoch is smaller than one batch of all processes.
    """
    dataset = _module(options).TrainSet(options, sets)
    sampler = EpochSampler(len(dataset), options.batchSize, options.seed, rank, world_size)
    if not len(sampler):
        raise UserError(
            f"an epoch of {len(dataset)} samples is smaller than one batch of {options.batchSize} on "
            f"{world_size} process{'es' * (world_size > 1)}: lower --batchSize or raise --epoch_size"
        )
    return DataLoader(dataset, batch_sampler=sampler, **_workers(options, options.nThreads, persistent=True))


def build_val_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> DataLoader | None:
    """The held-out pairs, or None if there are none; arguments as of `build_test_loaders`."""
    return _in_batches(options, sets, sets.validation[rank::world_size]) if sets.validation else None


def build_test_loaders(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> dict[str, DataLoader]:
    """A loader for every test set: `TestSet` samples, --eval_batch at once where their sizes are equal.

    Args:
        options: dataset, if_align, eval_batch, nThreads and gpu_ids are used.
        sets: from `discover`.
        rank, world_size: this process takes every `world_size`-th image, from the `rank`-th on; perhaps none.
    """
    return {name: _in_batches(options, sets, pairs[rank::world_size]) for name, pairs in sets.tests.items()}


def _in_batches(options: Namespace, sets: Sets, pairs: list[Pair]) -> DataLoader:
    """By name, except that an image may come early, with the first one of its size whose batch has room."""
    batches: list[list[int]] = []
    filling: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(pairs):
        size = sets.image_sizes[pair.mixture]
        if len(filling.get(size, ())) % options.eval_batch == 0:
            filling[size] = []
            batches.append(filling[size])
        filling[size].append(index)
    dataset = _module(options).TestSet(options, pairs)
    workers = min(_TEST_WORKERS, options.nThreads) if len(pairs) >= _WORTH_WORKERS else 0
    return DataLoader(dataset, batch_sampler=batches, **_workers(options, workers))


def _module(options: Namespace):
    """The file of data/ that --dataset names."""
    return importlib.import_module(f"data.{options.dataset}")


def _workers(options: Namespace, count: int, persistent: bool = False) -> dict[str, object]:
    """The arguments of a DataLoader that say how samples are made and handed over."""
    always = {
        "pin_memory": torch.cuda.is_available() and options.gpu_ids != [],
        # A loader draws a seed whenever it is iterated; from the global stream, that would make what follows
        # depend on how often a run was resumed.
        "generator": torch.Generator(),
    }
    if not count:
        return always
    return {
        **always,
        "num_workers": count,
        "persistent_workers": persistent,
        "prefetch_factor": _PREFETCH,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": _context(options),
    }


def _context(options: Namespace):
    """How worker processes come to be.

    Not by forking this process: it has threads (CUDA, OpenMP, TensorBoard), and a lock that one of them holds
    at that moment stays locked in the fork for good. A fork server is a process of its own, without such
    threads, that imports the libraries once and forks from there, so that a worker starts in a moment all the
    same.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cv2", "PIL.Image", f"data.{options.dataset}"])
    # What it ignores when it starts, its workers ignore from their first moment: Ctrl-C is for this process to
    # handle, and would otherwise end a worker that has just begun.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


def _start_worker(_: int) -> None:
    """One thread a worker, which leaves Ctrl-C to the main process and doesn't outlive it."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # PyTorch's own watch compares process ids, which tells nothing under a fork server: it lives on
    multiprocessing.parent_process().join()
    os._exit(1)
