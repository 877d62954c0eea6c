"""Two thousand steps: memory and open files stay what they were."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dereflect.util.run import checkpoint
from dereflect.util.run.reader import read_metrics
from tests.helpers import arguments

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS = 8, 250


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_and_open_files_are_flat(tiny_data, tmp_path):
    more = f"--nEpochs {EPOCHS} --epoch_size {STEPS} --nThreads 1 --save_steps 100 --crop_size 16 --name soak "
    more += "--ema 0.9 --guard --log_norms --save_images"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "train_sirs.py", *arguments(tiny_data, tmp_path, *more.split())],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        samples = []
        try:
            while process.poll() is None:
                samples.append((epochs_done(tmp_path / "soak"), *resources(process.pid)))
                time.sleep(0.5)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert checkpoint.load(tmp_path / "soak/last.pt")["global_step"] == EPOCHS * STEPS
    # The first two epochs are left out: caches fill, and the allocator finds its size.
    steady = np.array([sample for sample in samples if sample[0] >= 2 and sample[1]], float)
    epochs, memory, files = steady.T
    means = [memory[epochs == epoch].mean() for epoch in np.unique(epochs)]
    growth = np.polyfit(np.unique(epochs), means, 1)[0] / STEPS
    # Checkpoints and pictures are open for moments, which a sample may hit or miss; what leaks stays open.
    opened = [int(np.median(files[epochs == epoch])) for epoch in np.unique(epochs)]
    print(f"\n{len(samples)} samples, {EPOCHS * STEPS} steps; after {2 * STEPS}: {means[0] / 2**20:.0f} MiB resident, ")
    print(f"{growth / 1024:+.2f} KiB a step, at most {memory.max() / 2**20:.0f} MiB; open files: {opened}")
    assert growth < 8 * 1024, "bytes a step: a tensor of the smallest size kept for each would be more"
    assert max(opened) - min(opened) <= 2


def resources(pid: int) -> tuple[int, int]:
    """Resident bytes and open files; nothing where it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * 4096, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0, 0


def epochs_done(folder: Path) -> int:
    return max((line["epoch"] for line in read_metrics(folder)), default=0) if folder.exists() else 0
