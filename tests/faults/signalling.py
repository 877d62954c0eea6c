"""A process that starts trainings with workers and sends signals to their process groups.

    python -m tests.faults.signalling DATA RUNS SEED TRIES

Every training is a process group of its own, as a shell's job or a step of Slurm is. It gets a signal while workers
start: those of the training, or those of one of the evaluations' sets. Prints what happened as JSON, a list of a dict
for each try.
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

from dereflect import data, train_sirs
from dereflect.data.loader import Loader
from dereflect.models import arch
from dereflect.util import program
from dereflect.util.program import SIGNALS
from dereflect.util.run import checkpoint
from tests.faults.small import RECIPE, small
from tests.helpers import arguments

SETTINGS = ("--nEpochs", "3", "--epoch_size", "3", "--nThreads", "2", "--name")
STARTS = 7  # of workers in such a training: once for its steps, for both test sets after each epoch


def start(data_folder: Path, runs: Path, name: str, seen: mmap.mmap) -> int:
    """Fork a training, which tells in `seen` how often it has begun to start workers; its process id."""
    seen[:] = bytes(len(seen))
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    os.dup2(os.open(runs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    plain = Loader._start

    def begin(loader: Loader):
        seen[:8] = struct.pack("q", struct.unpack_from("q", seen)[0] + 1)
        return plain(loader)

    Loader._start = begin
    data._WORTH_WORKERS = 1
    arch.small = small
    sys.exit(program.run(train_sirs.main, arguments(data_folder, runs, *RECIPE, "--val_split", "0", *SETTINGS, name)))


def main(data_folder: Path, runs: Path, seed: int, tries: int) -> None:
    rng = random.Random(seed)
    seen = mmap.mmap(-1, 8)
    found = []
    for number in range(tries):
        name, signum = f"run-{number}", SIGNALS[(seed + number) % len(SIGNALS)]
        which = 1 + (seed + number) % STARTS
        delay = rng.uniform(0, 4.0 if which == 1 else 0.1)
        pid = start(data_folder, runs, name, seen)
        while struct.unpack_from("q", seen)[0] < which and not os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.0005)
        time.sleep(delay)
        os.killpg(pid, signum)
        began = time.monotonic()
        _, status = os.waitpid(pid, 0)
        log = (runs / f"{name}.log").read_text()
        last = runs / name / "last.pt"
        found.append(
            {
                "signal": signum.name,
                "start": f"{which} + {delay:.3f} s",
                "status": os.waitstatus_to_exitcode(status),
                "seconds": round(time.monotonic() - began, 2),
                "step": checkpoint.load(last)["global_step"] if last.exists() else None,
                "stopped": log.count(f"stopped by {signum.name}; saved after step"),
                "odd": [line for line in log.splitlines() if "Traceback" in line or "Error" in line or "Warn" in line],
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
