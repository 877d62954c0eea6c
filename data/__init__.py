"""Files into batches: what there is, and the loaders of training, validation and test."""

import importlib
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from torch.utils.data import Sampler

from data.folders import Pair, Sets, discover
from data.loader import Loader
from data.transforms import generator
from util.errors import UserError

__all__ = [
    "EpochSampler",
    "Loader",
    "Pair",
    "Sets",
    "build_test_loaders",
    "build_train_loader",
    "build_val_loader",
    "discover",
]

_ORDER, _SPARES = 3, 4  # purposes of random numbers
_TRIES = 9  # to replace a sample that can't be read
_MOST_REPLACED = 0.01  # share of a process's samples of an epoch
_ALWAYS_REPLACED = 10  # samples of an epoch, however short it is
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


def build_train_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> Loader:
    """Batches of `TrainSet` samples, the same for any number of workers.

    A sample whose files can't be read is replaced by that of another index of the epoch, drawn from seed, epoch and
    index alone.

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
    spares = partial(_spares, options.seed, len(dataset))
    most = max(_ALWAYS_REPLACED, int(_MOST_REPLACED * len(sampler) * options.batchSize))
    return Loader(dataset, sampler, options, options.nThreads, persistent=True, spares=spares, most_replaced=most)


def build_val_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> Loader | None:
    """The held-out pairs, or None if there are none; arguments as of `build_test_loaders`."""
    return _in_batches(options, sets, sets.validation[rank::world_size]) if sets.validation else None


def build_test_loaders(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> dict[str, Loader]:
    """A loader for every test set: `TestSet` samples, --eval_batch at once where their sizes are equal.

    Args:
        options: dataset, if_align, eval_batch, nThreads and gpu_ids are used.
        sets: from `discover`.
        rank, world_size: this process takes every `world_size`-th image, from the `rank`-th on; perhaps none.
    """
    return {name: _in_batches(options, sets, pairs[rank::world_size]) for name, pairs in sets.tests.items()}


def _in_batches(options: Namespace, sets: Sets, pairs: list[Pair]) -> Loader:
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
    return Loader(dataset, batches, options, workers)


def _spares(seed: int, length: int, key: tuple[int, int]) -> list[tuple[int, int]]:
    """The samples that are tried, one after the other, in the place of one that can't be read."""
    epoch, index = key
    return [(epoch, int(other)) for other in generator(seed, epoch, index, _SPARES).integers(length, size=_TRIES)]


def _module(options: Namespace):
    """The file of data/ that --dataset names."""
    return importlib.import_module(f"data.{options.dataset}")
