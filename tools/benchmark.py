"""How fast, and in how much memory: tables of measurements made side by side on this machine.

    python tools/benchmark.py scan                           every backend of the selective scan over the length
    python tools/benchmark.py scan --gated --dtype bf16      as a Mamba layer calls it, in bfloat16
    python tools/benchmark.py scan --shapes 2,128,50176 2,1024,784 --json scan.json --plot scan.png
    python tools/benchmark.py step                           a training step beside a plainly written network's
    python tools/benchmark.py step --models dsrnet_l --batches 1 2 4 --variants bf16 bf16+compile bf16+checkpoint
    python tools/benchmark.py step --sizes 256 --variants bf16 --profile trace.json
    python tools/benchmark.py step --forward_only --models mdsrnet_s --variants fp32 --sizes 64 128 256 512
    python tools/benchmark.py memory --models dsrnet_s       peak memory over the size of the images
    python tools/benchmark.py data --workers 0 1 2           training samples a second
    python tools/benchmark.py eval --images 50               an evaluation beside its forward passes alone

Every comparison runs in one process with the competitors in turn, and medians are shown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.benchmarks import data, evaluation, scan, step
from util.program import run


def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (scan.add_scan, step.add_step, step.add_memory, data.add_data, evaluation.add_eval):
        add(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.arguments = " ".join(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run(main))
