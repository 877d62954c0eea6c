"""Networks, VGG19, losses and weights."""

import argparse
import importlib

from dereflect.util.errors import UserError


def build_model(options: argparse.Namespace, bf16: bool = False):
    """The model of the module that --model names; see `models.dsrnet_model_sirs.build`."""
    return importlib.import_module(f"dereflect.models.{options.model}").build(options, bf16)


def check_backends(network, device: str, scan_backend: str | None = None, passes_backend: str | None = None) -> None:
    """Check that a network can be computed on a device by the backends of these options, or of the environment.

    Args:
        network: its scans only matter if it has any, but an option is always checked.
        device: "cpu" or "cuda".
        scan_backend, passes_backend: the options; None: SCAN_BACKEND and PASSES_BACKEND are looked at.

    Raises:
        UserError: it can't.
    """
    from dereflect.models import passes, scan

    reasons = {"passes": passes.why_refused(passes_backend, device)}
    if scan_backend or any(isinstance(part, scan.Mamba) for part in network.modules()):
        reasons["scan"] = scan.why_refused(scan_backend, device)
    given = {"passes": passes_backend, "scan": scan_backend}
    for name, reason in reasons.items():
        if reason:
            raise UserError(f"--{name}_backend {reason}" if given[name] else reason)
