"""A guard over training: what a gradient's norm usually is, and what to do with one that is far from it."""

import math
from dataclasses import asdict, dataclass, field
from enum import Enum


class Verdict(Enum):
    """What to do with a step."""

    STEP = "step"
    SKIP = "skip"
    RETURN = "return"  # to the last good checkpoint: skipping alone doesn't help any more


@dataclass
class Guard:
    """Judges every step by the running distribution of the gradient norm's logarithm.

    With m and s the distribution's mean and standard deviation: a norm above exp(m + CLIP s) is to be clipped to
    that, a step with one above exp(m + SKIP s) (or not finite) to be skipped. PATIENCE skipped steps of the last
    WINDOW ask for the return to the last good checkpoint and for half the learning rate from there on.

    What it knows is plain values, `state()`, so that a resumed run judges as an undisturbed one.
    """

    mean: float = 0.0
    square: float = 0.0  # running mean of (log norm - mean)^2
    seen: int = 0
    skipped: list[int] = field(default_factory=list)  # the newest ones
    rate: float = 1.0  # what the learning rate is to be multiplied with
    returns: int = 0

    CLIP = 2.0
    SKIP = 6.0
    LEAST_SPREAD = 0.2  # of s, lest a very steady start make everything look far off
    WARM_UP = 30  # steps before anything finite is judged
    MEMORY = 0.99  # of the running means
    PATIENCE = 5
    WINDOW = 50
    MOST_RETURNS = 6

    def limit(self, deviations: float) -> float:
        """The norm so many standard deviations above the usual; infinite while too few have been seen."""
        if self.seen < self.WARM_UP:
            return math.inf
        return math.exp(self.mean + deviations * max(math.sqrt(self.square), self.LEAST_SPREAD))

    def judge(self, step: int, norm: float) -> Verdict:
        """The verdict on step number `step` with a gradient of this norm, from which the guard learns, too."""
        if math.isfinite(norm) and norm <= self.limit(self.SKIP):
            self._learn(math.log(max(norm, 1e-30)))
            return Verdict.STEP
        self.skipped = [other for other in self.skipped if other > step - self.WINDOW] + [step]
        return Verdict.RETURN if len(self.skipped) >= self.PATIENCE else Verdict.SKIP

    def is_calm(self, step: int) -> bool:
        """Whether no step has been skipped lately: what a checkpoint needs to be a good one."""
        return not any(other > step - self.WINDOW for other in self.skipped)

    def returned(self) -> None:
        """The weights are those of the last good checkpoint again."""
        self.skipped = []
        self.returns += 1
        self.rate /= 2

    def state(self) -> dict:
        """All it knows."""
        return asdict(self)

    def _learn(self, value: float) -> None:
        self.seen += 1
        share = max(1 - self.MEMORY, 1 / self.seen)
        difference = value - self.mean
        self.mean += share * difference
        self.square = (1 - share) * (self.square + share * difference**2)
