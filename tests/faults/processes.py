"""A process that starts trainings of several processes: forks have torch in a moment, and it has no threads to fork.

    python -m tests.faults.processes RANKS LOG [options of train_sirs.py ...]

Trains the small network in RANKS processes, each writing to LOG-RANK, and prints their exit statuses as JSON.
"""

import json
import os
import socket
import sys
from pathlib import Path

from dereflect import train_sirs
from dereflect.models import arch
from dereflect.util import program
from tests.faults.small import small


def start(rank: int, size: int, port: int, log: Path, arguments: list[str]) -> int:
    """Fork one of the processes; its process id."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    arch.small = small
    sys.exit(program.run(train_sirs.main, arguments))


def main(size: int, log: Path, arguments: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pids = [start(rank, size, port, log, arguments) for rank in range(size)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
