"""A process that starts trainings and kills them: forks have torch in a moment, and it has no threads to fork.

    python -m tests.faults.killing DATA RUNS KILLS

Trains `whole` undisturbed, then `killed-0`, `killed-1` ... until that many kills have been done, each to its end.
Prints what happened as JSON.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from dereflect.models import arch
from dereflect.util.run import checkpoint
from tests.faults.small import Small, small, train_small

BALLAST = 1 << 20  # numbers, so that writing a checkpoint takes a while
SETTINGS = ("--nEpochs", "3", "--epoch_size", "6", "--keep", "2", "--resume", "auto", "--name")


def start(data: Path, runs: Path, name: str, seen: mmap.mmap) -> int:
    """Fork a training, which tells in `seen` how many checkpoints it has begun, and the step of the last whole one."""
    seen[:] = bytes(len(seen))
    if pid := os.fork():
        return pid
    status = 99
    try:
        os.dup2(os.open(runs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        plain, begun = checkpoint.save, 0

        def save(state: dict, path: Path, previous: Path | None = None) -> None:
            nonlocal begun
            begun += 1
            seen[:8] = struct.pack("q", begun)
            plain(state, path, previous)
            if previous:
                seen[8:] = struct.pack("q", state["global_step"])

        checkpoint.save = save
        arch.small = lambda: Small(BALLAST)
        arch.small.__module__ = arch.__name__
        status = train_small(data, runs, *SETTINGS, name)[0]
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(data: Path, runs: Path, kills: int) -> None:
    rng = random.Random(0)
    seen = mmap.mmap(-1, 16)
    arch.small = small
    _, status = os.waitpid(start(data, runs, "whole", seen), 0)
    found = {"status": status, "kills": 0, "in a checkpoint": 0, "runs": 0, "lost": []}
    while found["kills"] < kills:
        folder = runs / f"killed-{found['runs']}"
        status = None
        while status != 0:
            pid = start(data, runs, folder.name, seen)
            if found["kills"] < kills:
                if rng.random() < 0.6:  # at some moment of one of the next checkpoints
                    number = rng.randint(1, 6)
                    while struct.unpack_from("q", seen)[0] < number and not os.waitid(
                        os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
                    ):
                        time.sleep(0.0005)
                    time.sleep(rng.uniform(0, 0.05))
                else:
                    time.sleep(rng.uniform(0, 2.5))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if status == signal.SIGKILL:
                found["kills"] += 1
                found["in a checkpoint"] += any(folder.glob(".tmp-*.pt"))
                saved = struct.unpack_from("q", seen, 8)[0]
                if saved and checkpoint.load(folder / "last.pt")["global_step"] < saved:
                    found["lost"].append(saved)
            elif status:
                raise SystemExit(
                    f"{folder.name} ended with {status}:\n{(runs / folder.name).with_suffix('.log').read_text()}"
                )
        found["runs"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
