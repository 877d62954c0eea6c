"""Every random draw of the data pipeline: a function of a purpose, the seed, the epoch and an index, and nothing else.

So the samples are the same for any number of workers and ranks, and after a resume in the middle of an epoch.
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache

import numpy as np

_SUBSTITUTES = 9  # tried in the place of a sample that can't be read


class Purpose(IntEnum):
    """What random numbers are drawn for; each purpose has a stream of its own."""

    SAMPLE = 1  # source, augmentation and blend of one sample
    PARTNERS = 2  # which photographs form synthetic pairs
    ORDER = 3  # of the samples in an epoch
    SUBSTITUTES = 4  # for a sample that can't be read


def generator(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers of one sample, or of one epoch (index 0), for one purpose."""
    # Always four numbers: NumPy pads seeds with zeros, so (purpose, seed, epoch) would be (purpose, seed, epoch, 0).
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((int(purpose), seed, epoch, index))))


def partners(seed: int, epoch: int, index: int, count: int) -> tuple[int, int]:
    """Which two of `count` photographs the synthetic sample `index` of an epoch consists of.

    The photographs are shuffled and the list is cut into halves; the i-th photographs of both halves are partners. The
    list is shuffled anew in every epoch, and in a long epoch (--epoch_size) again whenever each photograph was used.
    """
    half = count // 2
    repetition, place = divmod(index, half)
    order = _shuffled(seed, epoch, repetition, count)
    return int(order[place]), int(order[place + half])


def substitutes(seed: int, length: int, key: tuple[int, int]) -> list[tuple[int, int]]:
    """The samples of an epoch of `length` that are tried, one after the other, in the place of an unreadable one.

    Args:
        seed: of the run.
        length: samples in an epoch.
        key: (epoch, index) of the unreadable sample.
    """
    epoch, index = key
    others = generator(seed, epoch, index, Purpose.SUBSTITUTES).integers(length, size=_SUBSTITUTES)
    return [(epoch, int(other)) for other in others]


class EpochSampler:
    """Batches of (epoch, index) in an order that depends on seed and epoch alone.

    A global batch is `world_size * batch_size` consecutive entries of the order. Every rank takes its own part of it.
    An incomplete batch at the end is dropped. Every iteration starts at the place that `seek` has set.

    Args:
        length: samples in an epoch.
        batch_size: samples of one process in one batch.
        seed: of the order.
        rank, world_size: the number of this process, and of how many.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.seek(0)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration in `epoch`, after `step` batches of this process."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the iteration starts."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # as it is now, even if `seek` is called while batches are still being made ahead
        order = generator(self.seed, epoch, 0, Purpose.ORDER).permutation(self.length)
        starts = ((step * self.world_size + self.rank) * self.batch_size for step in range(self.step, len(self)))
        return ([(epoch, int(index)) for index in order[start : start + self.batch_size]] for start in starts)


@lru_cache(maxsize=64)  # samples of an epoch come in any order
def _shuffled(seed: int, epoch: int, repetition: int, count: int) -> np.ndarray:
    """(count,) indices of photographs."""
    return generator(seed, epoch, repetition, Purpose.PARTNERS).permutation(count)
