"""What keeps a training stable: a guard over the gradient's norm, and the norms inside a network to look at."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn


class Verdict(Enum):
    """What to do with a step."""

    STEP = "step"
    SKIP = "skip"
    RETURN = "return"  # to the last good checkpoint, as skipping alone no longer helps


@dataclass
class Guard:
    """Judges every step by the running distribution of the logarithm of the gradient's norm.

    Let m and s be the mean and the standard deviation of this distribution. A norm above exp(m + CLIP s) is clipped to
    that limit. A step whose norm is above exp(m + SKIP s), or not finite, is skipped. After PATIENCE skipped steps
    among the last WINDOW, the training returns to its last good checkpoint and goes on with half the learning rate.

    The guard's state is plain values, `state()`, so that a resumed run judges exactly as an uninterrupted one.
    """

    mean: float = 0.0
    square: float = 0.0  # running mean of (log norm - mean)^2
    seen: int = 0
    skipped: list[int] = field(default_factory=list)  # numbers of the latest skipped steps
    rate: float = 1.0  # factor on the learning rate
    returns: int = 0

    CLIP = 2.0
    SKIP = 6.0
    LEAST_SPREAD = 0.2  # lower limit of s: after a very steady start, every norm would look far off
    WARM_UP = 30  # steps before any finite norm is judged
    MEMORY = 0.99  # of the running means
    PATIENCE = 5
    WINDOW = 50
    MOST_RETURNS = 6

    def limit(self, deviations: float) -> float:
        """The norm that lies `deviations` standard deviations above the mean; infinite during the warm-up."""
        if self.seen < self.WARM_UP:
            return math.inf
        return math.exp(self.mean + deviations * max(math.sqrt(self.square), self.LEAST_SPREAD))

    def judge(self, step: int, norm: float) -> Verdict:
        """The verdict on step number `step`, whose gradient has this norm; the guard learns from an accepted norm."""
        if math.isfinite(norm) and norm <= self.limit(self.SKIP):
            self._learn(math.log(max(norm, 1e-30)))
            return Verdict.STEP
        self.skipped = [other for other in self.skipped if other > step - self.WINDOW] + [step]
        return Verdict.RETURN if len(self.skipped) >= self.PATIENCE else Verdict.SKIP

    def is_calm(self, step: int) -> bool:
        """Whether none of the last WINDOW steps was skipped; only then is a checkpoint a good one."""
        return not any(other > step - self.WINDOW for other in self.skipped)

    def is_exhausted(self) -> bool:
        """Whether the training has returned to a good checkpoint as often as it may."""
        return self.returns == self.MOST_RETURNS

    def returned(self) -> None:
        """Note that the weights are those of the last good checkpoint again."""
        self.skipped = []
        self.returns += 1
        self.rate /= 2

    def state(self) -> dict:
        """All its values, as `Guard(**state)` takes them."""
        return asdict(self)

    def describe_skip(self, step: int, norm: float) -> str:
        """The message about a skipped step."""
        message = f"step {step}: skipped, its gradient's norm is {norm:.3g}"
        if math.isfinite(limit := self.limit(self.SKIP)):
            message += f" (limit {limit:.3g}, usually about {math.exp(self.mean):.3g})"
        return message

    def describe_return(self, step: int) -> str:
        """The message about a return to the weights of step number `step`; called after `returned`."""
        return (
            f"{self.PATIENCE} of the last {self.WINDOW} steps were: back to the weights of step {step}, "
            f"on with {self.rate:g} times the learning rate"
        )

    def describe_end(self, good: Path) -> str:
        """The message when no return is left; `good` is the last good checkpoint."""
        return (
            f"the guard has returned to the last good checkpoint {self.returns} times, which hasn't helped; "
            f"{good} holds it; try a lower --lr"
        )

    def _learn(self, value: float) -> None:
        self.seen += 1
        share = max(1 - self.MEMORY, 1 / self.seen)
        difference = value - self.mean
        self.mean += share * difference
        self.square = (1 - share) * (self.square + share * difference**2)


class BlockNorms:
    """Measures how large the activations and the gradients of a network's blocks are, to see where a training diverges.

    Args:
        blocks: name -> module that returns one tensor.

    Attributes:
        watching: whether forward passes are measured now.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self.blocks = blocks
        self.watching = False
        self.activations: dict[str, Tensor] = {}
        for name, block in blocks.items():
            block.register_forward_hook(lambda _, __, output, name=name: self._measure(name, output))

    def values(self) -> dict[str, float]:
        """Of each block: the root mean square of its last result, the Euclidean norm of its parameters' gradients."""
        gradients = {}
        for name, block in self.blocks.items():
            norms = [p.grad.norm() for p in block.parameters() if p.grad is not None]
            gradients[name] = torch.stack(norms).norm() if norms else torch.zeros(())
        return {f"activation_rms/{name}": value.item() for name, value in self.activations.items()} | {
            f"gradient_norm/{name}": value.item() for name, value in gradients.items()
        }

    def _measure(self, name: str, output: Tensor) -> None:
        if self.watching:
            self.activations[name] = output.detach().float().square().mean().sqrt()
