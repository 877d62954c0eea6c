"""Batches that outlive a file that can't be read and a worker that is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from util.errors import UserError

MOST_RESTARTS = 3
"""How often workers are started anew in one iteration over a loader: an epoch, an evaluation of a set."""

_PREFETCH = 4  # batches a worker makes ahead
_PATIENCE = 2.0  # seconds until a worker that is gone is known to be
_FULL = "/dev/shm is full; --nThreads 0 does without, docker run takes --ipc=host or --shm-size=8g"  # noqa: S108 - words


class Loader:
    """Batches of a dataset, made by worker processes or, with none, by this one.

    As torch's DataLoader, but for faults. A sample that can't be read (the dataset raises UserError) is replaced,
    counted and told, where there is something to replace it by; a worker that dies is, with all others, started anew,
    and the batches go on where they were.

    Args:
        dataset: of samples.
        batches: lists of the samples' keys; every iteration begins with the first one that this yields then.
        options: gpu_ids and dataset are used.
        workers: processes, 0 for none.
        persistent: whether they live on from one iteration to the next.
        spares: for a key those to try instead, the same ones every time; None replaces nothing.
        most_replaced: samples in one iteration.

    Attributes:
        dataset, batch_sampler: as given.
        workers: the processes.
        faults: how many samples have been replaced, and how often workers started anew, since the iteration began.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list],
        options: Namespace,
        workers: int,
        persistent: bool = False,
        spares: Callable[[object], Iterable] | None = None,
        most_replaced: int = 0,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, batches
        self._options, self._count, self._persistent = options, workers, persistent
        self._spares, self._most_replaced = spares, most_replaced
        self._rest = _Rest(batches)
        self._loader: DataLoader | None = None
        self.workers: list[BaseProcess] = []
        self._told: set[str] = set()
        self.faults = {"replaced": 0, "restarts": 0}

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict]:
        """Yields the batches.

        Raises:
            UserError: what is said of a sample that nothing may replace; too many had to be; workers die again and
                again, or have no memory to hand samples over.
        """
        self.faults = dict.fromkeys(self.faults, 0)
        self._rest.start = 0
        source = None
        while True:
            try:
                if source is None:
                    source = self._start()
                batch, troubles = next(source)
            except StopIteration:
                return
            except Exception as error:
                dead = self._dead()
                self._explain(error, dead)
                source = self._loader = None  # the workers that live end with it
                continue
            self._rest.start += 1
            if batch is None:
                row = f"{len(troubles)} samples in a row can't be read, the last: " if self._spares else ""
                raise UserError(row + troubles[-1])
            self._replaced(troubles)
            yield batch

    def _start(self) -> Iterator:
        """An iteration over the batches that are left, in new workers if there are none."""
        if self._loader is None or not self._persistent:
            self.workers = []
        if self._loader is None:
            self._loader = self._build()
        before = set(multiprocessing.active_children())
        source = iter(self._loader)
        self.workers = self.workers or list(set(multiprocessing.active_children()) - before)
        return source

    def _build(self) -> DataLoader:
        settings: dict[str, object] = {
            "pin_memory": torch.cuda.is_available() and self._options.gpu_ids != [],
            # A loader draws a seed whenever it is iterated; from the global stream, that would make what follows
            # depend on how often a run was resumed.
            "generator": torch.Generator(),
        }
        if self._count:
            settings |= {
                "num_workers": self._count,
                "persistent_workers": self._persistent,
                "prefetch_factor": _PREFETCH,
                "worker_init_fn": _start_worker,
                "multiprocessing_context": _context(self._options),
            }
        samples = _Samples(self.dataset, self._spares)
        return DataLoader(samples, batch_sampler=self._rest, collate_fn=_collate, **settings)

    def _replaced(self, troubles: list[str]) -> None:
        """Count and tell what was replaced in a batch.

        Raises:
            UserError: it has become too much.
        """
        for trouble in troubles:
            self.faults["replaced"] += 1
            if trouble not in self._told:
                self._told.add(trouble)
                _warn(f"{trouble}; another sample takes its place")
        if self.faults["replaced"] > self._most_replaced:
            raise UserError(
                f"{self.faults['replaced']} samples of this epoch could not be read, which is too many to replace; "
                f"the last: {troubles[-1]}"
            )

    def _dead(self) -> list[BaseProcess]:
        """The workers that have died; waits a moment, as one's connections break before it counts as dead."""
        if self.workers:
            connection.wait([worker.sentinel for worker in self.workers], _PATIENCE)
        return [worker for worker in self.workers if not worker.is_alive()]

    def _explain(self, error: Exception, dead: list[BaseProcess]) -> None:
        """Say that workers have died.

        Raises:
            UserError: they have often enough, or the shared memory is full.
            Exception: the error is something else.
        """
        if not dead:
            if "</torch_" in str(error):  # a file in /dev/shm
                raise UserError(f"a worker process has no room for its samples: {_FULL}") from error
            raise error
        reason = _cause_of_death(dead[0].exitcode)
        if self.faults["restarts"] == MOST_RESTARTS:
            raise UserError(f"{reason}; workers were started anew {MOST_RESTARTS} times before") from error
        self.faults["restarts"] += 1
        _warn(f"{reason}; all are started anew ({self.faults['restarts']} of {MOST_RESTARTS} times)")


def _warn(text: str) -> None:
    tqdm.write(f"WARNING: {text}", file=sys.stderr)  # clear of progress bars


class _Rest:
    """Those of some batches that are left from a place on."""

    def __init__(self, batches: Iterable[list]) -> None:
        self.batches, self.start = batches, 0

    def __iter__(self) -> Iterator[list]:
        return islice(self.batches, self.start, None)


class _Samples(Dataset):
    """A dataset's samples, or their spares', each with a line for every one that could not be read."""

    def __init__(self, dataset: Dataset, spares: Callable[[object], Iterable] | None) -> None:
        self.dataset, self.spares = dataset, spares

    def __getitem__(self, key: object) -> tuple[object | None, list[str]]:
        try:
            return self.dataset[key], []
        except UserError as error:
            troubles = [str(error)]
        for spare in self.spares(key) if self.spares else ():
            try:
                return self.dataset[spare], troubles
            except UserError as error:
                troubles.append(str(error))
        return None, troubles


def _collate(samples: list[tuple[object | None, list[str]]]) -> tuple[object | None, list[str]]:
    """A batch, None if one of its samples is, and all that could not be read; the reason of the None is the last."""
    for sample, troubles in samples:
        if sample is None:
            return None, troubles
    return default_collate([sample for sample, _ in samples]), [line for _, troubles in samples for line in troubles]


def _cause_of_death(code: int) -> str:
    """Words for a worker's exit code."""
    if code == -signal.SIGKILL:
        return (
            "a worker process was killed (SIGKILL), as the kernel does when the memory runs out: "
            "lower --nThreads or --cache_images"
        )
    if code == -signal.SIGBUS:
        return f"a worker process died of a bus error (SIGBUS): {_FULL}"
    return f"a worker process died ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"


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
