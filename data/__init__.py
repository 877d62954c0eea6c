"""Files into batches: what there is, and the loaders of training, validation and test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from dereflect.data.demo import build_demo
from dereflect.data.folders import Pair, Sets, discover
from dereflect.data.sampling import EpochSampler, substitutes
from dereflect.util.errors import UserError

if TYPE_CHECKING:  # modules that import torch, which programs that only look at files do without
    from argparse import Namespace
    from pathlib import Path

    from dereflect.data.loader import Loader
    from dereflect.util.distributed import World

_MOST_REPLACED = 0.01  # share of a process's samples of an epoch
_ALWAYS_REPLACED = 10  # samples of an epoch, however short it is
_TEST_WORKERS = 2
_WORTH_WORKERS = 64  # images: for fewer, starting workers takes longer than they save


@dataclass
class Loaders:
    """All batches of a run.

    Attributes:
        train: of the training; None if there is none.
        val: of the held-out pairs; None if there are none.
        tests: of every test set, by its name.
        files: a fingerprint of each set's files, as of `fingerprint` in util, by the set's name.
    """

    train: Loader | None
    val: Loader | None
    tests: dict[str, Loader]
    files: dict[str, dict] = field(default_factory=dict)


def build_loaders(options: Namespace, world: World, log: Callable[[str], None]) -> Loaders:
    """The loaders of one process for what the options name, or for the demo set, which is made if it isn't there.

    Args:
        options: of `options.parse_train`.
        world: this process among all.
        log: takes lines about the data.

    Raises:
        UserError: there is nothing to train on or to test, or files can't be used; in every process.
    """
    from dereflect.util.run import resume

    if options.demo:
        log("No --base_dir given and no ./dataset/reflection-removal here: training on the embedded demo set,")
        log(f"in {options.base_dir}, with a shortened schedule. The README says how to get the real data.")
        world.from_main(lambda: build_demo(options.base_dir))
    sets = world.from_main(lambda: discover(options))  # one look at the files: all processes must have the same sets
    for line in sets.describe():
        log(line)
    files = {"photographs": sets.photographs, "held-out pairs": _files(sets.validation)}
    files |= {f"training pairs of {name}": _files(pairs) for name, pairs in sets.pairs.items()}
    files |= {f"{resume.TEST}{name}": _files(pairs) for name, pairs in sets.tests.items()}
    return Loaders(
        build_train_loader(options, sets, world.rank, world.size) if options.nEpochs else None,
        build_val_loader(options, sets, world.rank, world.size),
        build_test_loaders(options, sets, world.rank, world.size),
        resume.fingerprint(files, options.base_dir),
    )


def build_train_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> Loader:
    """Batches of `TrainSet` samples, the same for any number of workers.

    A sample whose files can't be read is replaced by another one of the epoch; which one depends on seed, epoch and
    index alone.

    Call `loader.batch_sampler.seek(epoch, step)` before every iteration; `len(loader)` is the batches of a
    whole epoch on one process.

    Args:
        options: dataset, batchSize, accumulate, nThreads, seed, gpu_ids and those of `TrainSet`.
        sets: from `discover`.
        rank, world_size: the number of this process, and of how many; together they take batchSize * world_size
            samples a step.

    Raises:
        UserError: an epoch is smaller than one step of all processes.
    """
    from dereflect.data.loader import Loader

    dataset = _module(options).TrainSet(options, sets)
    sampler = EpochSampler(len(dataset), options.batchSize, options.seed, rank, world_size)
    if len(sampler) < options.accumulate:
        raise UserError(
            f"an epoch of {len(dataset)} samples is smaller than one step of --batchSize {options.batchSize} x "
            f"--accumulate {options.accumulate} on {world_size} process{'es' * (world_size > 1)}: lower these or raise "
            "--epoch_size"
        )
    return Loader(
        dataset,
        sampler,
        options,
        options.nThreads,
        persistent=True,
        substitutes=partial(substitutes, options.seed, len(dataset)),
        most_replaced=max(_ALWAYS_REPLACED, int(_MOST_REPLACED * len(sampler) * options.batchSize)),
    )


def build_val_loader(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> Loader | None:
    """The held-out pairs, or None if there are none; arguments as of `build_test_loaders`."""
    return _in_batches(options, sets, sets.validation[rank::world_size]) if sets.validation else None


def build_test_loaders(options: Namespace, sets: Sets, rank: int = 0, world_size: int = 1) -> dict[str, Loader]:
    """A loader for every test set: batches of at most --eval_batch `TestSet` samples of equal size.

    Args:
        options: dataset, if_align, eval_batch, nThreads and gpu_ids are used.
        sets: from `discover`.
        rank, world_size: this process takes every `world_size`-th image, from the `rank`-th on; perhaps none.
    """
    return {name: _in_batches(options, sets, pairs[rank::world_size]) for name, pairs in sets.tests.items()}


def _in_batches(options: Namespace, sets: Sets, pairs: list[Pair]) -> Loader:
    """Images in the order of their names, but an image joins the first batch of its size that has room."""
    from dereflect.data.loader import Loader

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


def _files(pairs: list[Pair]) -> list[Path]:
    return [file for pair in pairs for file in pair.files]


def _module(options: Namespace):
    """The file of data/ that --dataset names."""
    return importlib.import_module(f"dereflect.data.{options.dataset}")
