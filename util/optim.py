"""The optimiser: which parameters decay, and the learning rate of every step."""

import argparse
import math

import torch
from torch import nn


def learning_rate(step: int, options: argparse.Namespace, total: int) -> float:
    """The rate of a step (from 0) of `total`.

    "cosine_iter" falls from lr to lr_min in `period` steps and rises again in as many (the schedule of the -W models:
    cosine annealing, stepped every iteration); "cosine" falls once over the whole run.
    """
    if options.scheduler == "none":
        return options.lr
    period = options.period if options.scheduler == "cosine_iter" else max(1, total)
    return options.lr_min + (options.lr - options.lr_min) * (1 + math.cos(math.pi * step / period)) / 2


def parameter_groups(network: nn.Module, decay: float) -> list[dict]:
    """Weight decay for the weights of convolutions and linear layers, and for nothing else."""
    decayed = {
        id(module.weight) for module in network.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    }
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(network: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser that the options describe; optimizer, lr and wd are used."""
    kind, decay = (torch.optim.AdamW, options.wd) if options.optimizer == "adamw" else (torch.optim.Adam, 0.0)
    return kind(parameter_groups(network, decay), lr=options.lr, betas=(0.9, 0.999), fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved state, but keep the optimiser's settings.

    The settings are those of the options, which --resume force may have changed. Only the learning rate is taken from
    the state, as each step sets it.
    """
    groups = [
        ours | {"lr": saved["lr"]}
        for ours, saved in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
