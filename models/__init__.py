"""Networks, VGG19, losses and weights."""

import argparse
import importlib


def build_model(options: argparse.Namespace, bf16: bool = False):
    """The model of the module that --model names; see `models.dsrnet_model_sirs.build`."""
    return importlib.import_module(f"models.{options.model}").build(options, bf16)
