"""How large the activations and the gradients of a network's parts are, to see where a training goes astray."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Norms:
    """Watches parts of a network.

    Args:
        parts: name -> module with one tensor as its result.

    Attributes:
        watching: whether forward passes are measured now.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        self.parts = parts
        self.watching = False
        self.activations: dict[str, Tensor] = {}
        for name, part in parts.items():
            part.register_forward_hook(lambda _, __, output, name=name: self._measure(name, output))

    def _measure(self, name: str, output: Tensor) -> None:
        if self.watching:
            self.activations[name] = output.detach().float().square().mean().sqrt()

    def values(self) -> dict[str, float]:
        """Root mean square of every part's last result, Euclidean norm of its parameters' gradients."""
        gradients = {}
        for name, part in self.parts.items():
            grads = [p.grad.norm() for p in part.parameters() if p.grad is not None]
            gradients[name] = torch.stack(grads).norm() if grads else torch.zeros(())
        return {f"activation_rms/{name}": value.item() for name, value in self.activations.items()} | {
            f"gradient_norm/{name}": value.item() for name, value in gradients.items()
        }
