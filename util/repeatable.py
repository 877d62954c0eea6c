"""Same seed, same machine: the same numbers, bit for bit."""

import os

import torch


def make_repeatable(seed: int) -> None:
    """Seed torch and have it compute in one fixed way; to be called before anything is computed on a GPU."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False
    # Matrix products as precise as cuDNN's convolutions are by default, which 1x1 convolutions otherwise are.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
