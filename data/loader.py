"""Batches of samples, in spite of unreadable files and killed workers."""

import multiprocessing
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from dereflect.util.errors import UserError
from dereflect.util.program import SIGNALS

MOST_RESTARTS = 3
"""How often workers are restarted in one iteration over a loader: an epoch, or the evaluation of a set."""

_PREFETCH = 4  # batches a worker makes ahead
_PATIENCE = 2.0  # seconds until a dead worker is known to be dead
_FULL = "/dev/shm is full; --nThreads 0 does without, docker run takes --ipc=host or --shm-size=8g"  # noqa: S108 - words


class Loader:
    """A DataLoader that survives unreadable files and killed workers.

    A sample that can't be read (the dataset raises UserError) is replaced by a substitute, counted and logged. When a
    worker dies, all workers are restarted, and the batches go on where they stopped.

    Args:
        dataset: the samples.
        batches: lists of the samples' keys; every iteration starts at the first list that this yields.
        options: gpu_ids and dataset are used.
        workers: number of processes that make batches; with 0, this process does.
        persistent: whether the workers stay alive from one iteration to the next.
        substitutes: key of an unreadable sample -> keys to try instead, the same every time; None replaces nothing.
        most_replaced: number of samples that may be replaced in one iteration.

    Attributes:
        dataset, batch_sampler: the arguments `dataset` and `batches`.
        workers: the processes.
        faults: how many samples were replaced and how often the workers were restarted in this iteration.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list],
        options: Namespace,
        workers: int,
        persistent: bool = False,
        substitutes: Callable[[object], Iterable] | None = None,
        most_replaced: int = 0,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, batches
        self._options, self._count, self._persistent = options, workers, persistent
        self._substitutes, self._most_replaced = substitutes, most_replaced
        self._remaining = _Remaining(batches)
        self._loader: DataLoader | None = None
        self.workers: list[BaseProcess] = []
        self._logged: set[str] = set()
        self.faults = {"replaced": 0, "restarts": 0}

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __bool__(self) -> bool:
        """True, even if this process has no batch of the set: it takes part in what all processes do with it."""
        return True

    def __iter__(self) -> Iterator[dict]:
        """Yield the batches.

        Raises:
            UserError: a sample can't be read and must not be replaced; too many samples were replaced; workers die
                again and again, or have no shared memory for their samples.
        """
        self.faults = dict.fromkeys(self.faults, 0)
        self._remaining.start = 0
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
                source = self._loader = None  # this ends the workers that are still alive
                continue
            self._remaining.start += 1
            if batch is None:
                row = f"{len(troubles)} samples in a row can't be read, the last: " if self._substitutes else ""
                raise UserError(row + troubles[-1])
            self._replaced(troubles)
            yield batch

    def _start(self) -> Iterator:
        """Iterate over the remaining batches; start workers if there are none."""
        if self._loader is None or not self._persistent:
            self.workers = []
        if self._loader is None:
            self._loader = self._build()
        before = set(multiprocessing.active_children())
        with _signals_blocked():
            source = iter(self._loader)
        self.workers = self.workers or list(set(multiprocessing.active_children()) - before)
        return source

    def _build(self) -> DataLoader:
        settings: dict[str, object] = {
            "pin_memory": torch.cuda.is_available() and self._options.gpu_ids != [],
            # A DataLoader draws a seed whenever an iteration starts. If it drew from the global generator, all later
            # random numbers would depend on how often the run was resumed.
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
        samples = _WithSubstitutes(self.dataset, self._substitutes)
        return DataLoader(samples, batch_sampler=self._remaining, collate_fn=_collate, **settings)

    def _replaced(self, troubles: list[str]) -> None:
        """Count the replaced samples of a batch, and warn of each new cause.

        Raises:
            UserError: too many samples were replaced.
        """
        for trouble in troubles:
            self.faults["replaced"] += 1
            if trouble not in self._logged:
                self._logged.add(trouble)
                _warn(f"{trouble}; another sample takes its place")
        if self.faults["replaced"] > self._most_replaced:
            raise UserError(
                f"{self.faults['replaced']} samples of this epoch could not be read, which is too many to replace; "
                f"the last: {troubles[-1]}"
            )

    def _dead(self) -> list[BaseProcess]:
        """The workers that have died. Waits a moment: a worker's connections break before the worker counts as dead."""
        if self.workers:
            connection.wait([worker.sentinel for worker in self.workers], _PATIENCE)
        return [worker for worker in self.workers if not worker.is_alive()]

    def _explain(self, error: Exception, dead: list[BaseProcess]) -> None:
        """Warn that workers have died.

        Raises:
            UserError: they died too often, or the shared memory is full.
            Exception: the given error, as no worker has died.
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
    tqdm.write(f"WARNING: {text}", file=sys.stderr)  # does not break a progress bar


class _Remaining:
    """The batches from position `start` on."""

    def __init__(self, batches: Iterable[list]) -> None:
        self.batches, self.start = batches, 0

    def __iter__(self) -> Iterator[list]:
        return islice(self.batches, self.start, None)


class _WithSubstitutes(Dataset):
    """The samples of a dataset, or their substitutes; each with the messages about all that could not be read."""

    def __init__(self, dataset: Dataset, substitutes: Callable[[object], Iterable] | None) -> None:
        self.dataset, self.substitutes = dataset, substitutes

    def __getitem__(self, key: object) -> tuple[object | None, list[str]]:
        try:
            return self.dataset[key], []
        except UserError as error:
            troubles = [str(error)]
        for substitute in self.substitutes(key) if self.substitutes else ():
            try:
                return self.dataset[substitute], troubles
            except UserError as error:
                troubles.append(str(error))
        return None, troubles


def _collate(samples: list[tuple[object | None, list[str]]]) -> tuple[object | None, list[str]]:
    """Join samples to a batch and its messages. The batch is None if a sample is; the last message then says why."""
    for sample, troubles in samples:
        if sample is None:
            return None, troubles
    return default_collate([sample for sample, _ in samples]), [line for _, troubles in samples for line in troubles]


def _cause_of_death(code: int) -> str:
    """Describe the exit code of a worker."""
    if code == -signal.SIGKILL:
        return (
            "a worker process was killed (SIGKILL), as the kernel does when the memory runs out: "
            "lower --nThreads or --cache_images"
        )
    if code == -signal.SIGBUS:
        return f"a worker process died of a bus error (SIGBUS): {_FULL}"
    return f"a worker process died ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"


def _context(options: Namespace):
    """How worker processes are started.

    They are not forked from this process. It has threads (CUDA, OpenMP, TensorBoard), and a lock that one of them
    holds at that moment would stay locked in the fork forever. A fork server is a process of its own without such
    threads. It imports the libraries once and forks the workers, so that they start fast all the same.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cv2", "numba", "PIL.Image", f"dereflect.data.{options.dataset}"])
    with _signals_blocked():
        forkserver.ensure_running()
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """In this block, let processes start that the signals which end a program don't reach, from their first moment on.

    Ctrl-C, Slurm, systemd and `timeout` send their signal to all processes. Only this process handles it; it still
    needs the others, and ends them. A process inherits the signals that are blocked when it is started, so the fork
    server and the resource tracker do, and the workers from the fork server.
    """

    def block() -> set[signal.Signals]:
        return signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    before = block()
    try:
        resource_tracker.ensure_running()  # which, if it starts, unblocks two of them
        block()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Limit a worker to one thread; end it when the main process ends it or ends itself, and by no other signal."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for wait in (_end_with_parent, _end_when_told):
        threading.Thread(target=wait, daemon=True).start()


def _end_with_parent() -> None:
    # PyTorch's own check compares the parent's process id. That is the fork server's, which stays alive.
    multiprocessing.parent_process().join()
    os._exit(1)


def _end_when_told() -> None:
    """End the worker when the main process sends it SIGTERM, as `terminate` does; it is blocked, so others can't."""
    if not hasattr(signal, "sigwaitinfo"):  # on macOS, where the sender is unknown
        signal.sigwait({signal.SIGTERM})
        os._exit(1)
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(1)
