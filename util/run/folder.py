"""A run's folder: the names of its files, the lock on it, its checkpoints and the room that they need on the disk."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from dereflect.util.run.lock import Lock

if TYPE_CHECKING:  # finding the files of a run takes no torch
    from argparse import Namespace

    from torch import nn
    from torch.optim import Optimizer

    from dereflect.util.distributed import World

EVENTS = "events.out.tfevents."
"""The prefix of TensorBoard's files."""


class RunFolder:
    """The folder of a run. `RunFolder(path)` only names its files; a training opens it with `RunFolder.open`.

    Attributes:
        path: the folder.
        last, previous: the newest checkpoint, and the one before it.
        best: the checkpoint of the best epoch, without the optimiser's state.
        good: the newest checkpoint that the guard trusts.
        refused: a `last` from which a resumed run could not go on.
        options, starts, metrics, per_image, panels, images: the record of the run; see util/run/record.py.
        lock: of a training, on the folder.
    """

    def __init__(self, path: Path, lock: Lock | None = None):
        self.path, self.lock = path, lock
        self.last, self.previous = path / "last.pt", path / "previous.pt"
        self.best, self.good, self.refused = path / "best.pt", path / "good.pt", path / "refused.pt"
        self.options, self.starts, self.metrics = path / "options.yaml", path / "starts.jsonl", path / "metrics.jsonl"
        self.per_image, self.panels, self.images = path / "per_image", path / "panels", path / "images"

    def epoch(self, number: int) -> Path:
        """The checkpoint that --save_every keeps of an epoch."""
        return self.path / f"epoch_{number:03}.pt"

    def nonfinite(self, step: int, rank: int) -> Path:
        """The state and the batch of a step whose loss or gradient was not finite."""
        return self.path / f"nonfinite_step_{step}_rank_{rank}.pt"

    def layers(self, test_set: str, image: str) -> dict[str, Path]:
        """The pictures that --save_images writes of a test image: "transmission" and "reflection"."""
        folder = self.images / disk.fitting(test_set)
        return {layer: folder / disk.fitting(image, f"_{layer[0]}.png") for layer in ("transmission", "reflection")}

    def panel(self, test_set: str) -> Path:
        """The newest picture of a set."""
        return self.panels / disk.fitting(test_set, ".png")

    @classmethod
    @contextmanager
    def open(cls, options: Namespace, world: World, log: Callable[[str], None]) -> Iterator[RunFolder]:
        """Make the folder of a training, and keep other jobs out of it in this block.

        The folder is the one that --name names, with a number appended if another run has this name and is not to be
        resumed.

        Raises:
            UserError: it can't be made, or another job is at work in it; in every process.
        """
        path = world.from_main(lambda: _make(options))
        world.from_main(lambda: _check_files(path))
        with Lock(path) as lock:
            world.from_main(lambda: lock.acquire(log))
            if path.name != options.name:
                log(
                    f"There is a run '{options.name}' already; this one is '{path.name}' (--resume continues that one)."
                )
            world.from_main(lambda: disk.remove_temporary(path))
            yield cls(path, lock)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def require_room(self, options: Namespace, network: nn.Module) -> None:
        """Check that all checkpoints of the run fit on the disk, the temporary file of the one being written included.

        Args:
            options: nEpochs, save_every, keep, guard and ema are used.
            network: whose checkpoints they are.

        Raises:
            UserError: they don't fit.
        """
        weights = sum(value.nbytes for value in network.state_dict().values()) * (2 if options.ema else 1)
        whole = weights + 2 * sum(parameter.nbytes for parameter in network.parameters())  # Adam's two means
        epochs, every, keep = options.nEpochs, options.save_every, options.keep
        kept = range(every, epochs + 1, every)[-keep:] if every else ()
        sizes = {self.last: whole, self.previous: whole, self.best: weights}
        sizes |= ({self.good: whole} if options.guard else {}) | {self.epoch(number): whole for number in kept}
        there = {status.st_ino: status.st_size for status in (path.stat() for path in sizes if path.exists())}
        if epochs:
            disk.require(self.path, sum(sizes.values()) + whole - sum(there.values()))

    def save_last(self, state: dict, is_good: bool) -> None:
        """Write the newest checkpoint; the one before it stays as `previous`."""
        checkpoint.save(state, self.last, self.previous)
        if is_good:
            checkpoint.link(self.last, self.good)

    def save_best(self, state: dict) -> None:
        """Write the best checkpoint."""
        checkpoint.save({key: value for key, value in state.items() if key != "optimizer"}, self.best)

    def save_epoch(self, state: dict, number: int, keep: int) -> None:
        """Write the checkpoint of an epoch; then, as it is safe, delete all but the newest `keep` of them (0: none)."""
        checkpoint.save(state, self.epoch(number))
        numbered = sorted(self.path.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name))
        for path in numbered[:-keep] if keep else ():
            with disk.writing(path):
                path.unlink()

    def can_resume(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def load_newest(
        self, world: World, options: Namespace, network: nn.Module, optimizer: Optimizer, identity: dict
    ) -> tuple[dict, list[str]]:
        """Load the newest checkpoint that the run can go on from: each process reads it once, the main one checks it.

        Args:
            world: this process among all.
            options, network, optimizer: of the run; see `util.run.resume.check_usable`.
            identity: of the run as it would go on.

        Returns:
            The state, and lines for the user. If the last checkpoint is unusable, that is `refused` now.

        Raises:
            UserError: no checkpoint is usable, or too much has changed; all files are as they were.
        """
        state: dict | None = None

        def choose() -> tuple[Path, list[str]]:
            nonlocal state
            state, path, messages = self._choose_newest(options, network, optimizer, identity)
            return path, messages

        path, messages = world.from_main(choose)
        return checkpoint.load(path) if state is None else state, messages

    def _choose_newest(
        self, options: Namespace, network: nn.Module, optimizer: Optimizer, identity: dict
    ) -> tuple[dict, Path, list[str]]:
        from dereflect.util.run.resume import check_continuable, check_usable  # imports torch

        messages: list[str] = []
        for path in (path for path in (self.last, self.previous) if path.exists()):
            try:
                state = checkpoint.load(path)
                check_usable(state, path, options, network.state_dict(), optimizer)
            except UserError as error:
                messages.append(str(error))
                continue
            changed = check_continuable(state, identity)
            if messages:
                with disk.writing(self.refused):
                    self.last.replace(self.refused)
                messages.append(f"it is {self.refused} now; going on from the checkpoint before, {path}")
            return state, path, messages + changed
        raise UserError("\n".join(messages))

    def describe(self) -> list[str]:
        """Lines that tell a user where to look."""
        tensorboard = Path(sys.executable).with_name("tensorboard")
        program = os.path.relpath(tensorboard) if tensorboard.exists() else "tensorboard"
        weights = [str(path) for path in (self.last, self.best) if path.exists()]
        return [
            f"pictures (mixture, T, its target, R, its target, residue): {self.panels}/",
            f"every figure:          {self.metrics}, {self.per_image}/",
            *([f"weights:               {', '.join(weights)}"] if weights else []),
            f"curves and pictures:   {program} --logdir {self.path.parent}",
        ]


def check_resumable(options: Namespace) -> None:
    """Check that there is a run to resume where --resume demands one, before anything is built.

    Raises:
        UserError: there is none; the message names the runs that there are.
    """
    runs, folder = options.checkpoints_dir, RunFolder(options.checkpoints_dir / options.name)
    if options.resume in ("must", "force") and not folder.can_resume():
        there = sorted(path.name for path in runs.glob("*") if RunFolder(path).last.exists())
        raise UserError(
            f"--resume: {folder.last} does not exist; runs that can be resumed: {', '.join(there) or 'none'} "
            "(--resume auto starts anew where there is nothing)"
        )


def _check_files(path: Path) -> None:
    """Check that no file that the run reads or writes is a pipe or a device.

    Raises:
        UserError: one is.
    """
    folder = RunFolder(path)
    for part in (path, folder.per_image, folder.panels):
        if part.is_dir():
            disk.check_regular(part)


def _make(options: Namespace) -> Path:
    path = options.checkpoints_dir / options.name
    for number in itertools.count(2):
        with disk.writing(path):
            try:
                path.mkdir(parents=True, exist_ok=options.resume is not None)
                return path
            except FileExistsError:
                path = options.checkpoints_dir / f"{options.name}-{number}"
