"""Where the time of a step goes: torch's operators and the project's own, each beside its floor.

The floor of a product is its arithmetic at the rate of the machine's matrix product; that of all other operators is
what they read and write, each tensor once, at the rate of its copy. Tensors that stay in the processor's cache move
faster than that.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dereflect.tools.benchmarks import common, output
from dereflect.tools.benchmarks.common import Measurement
from dereflect.tools.benchmarks.output import Table
from dereflect.tools.benchmarks.variants import FORMULAS_BOTH_WAYS, Images, Work

REPEATS = 3
LEAST = 0.005  # of the step; operators that take less share a row
COLUMNS = {"ms": "{milliseconds:.1f}", "of the step": "{part:.1%}", "floor ms": "{floor:.1f}", "reached": "{share:.0%}"}


@dataclass
class Cost:
    calls: int = 0
    seconds: float = 0.0
    floor: float = 0.0  # seconds


class Operators(TorchDispatchMode):
    """Times every operator that is called, and adds up its floor; views cost nothing."""

    def __init__(self, rates: Mapping[str, float]):
        super().__init__()
        self.rates, self.found = rates, defaultdict(Cost)
        self.formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS_BOTH_WAYS).flop_registry

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        began = perf_counter()
        result = function(*args, **kwargs)
        seconds = perf_counter() - began
        cost = self.found[function.name().partition(".")[0]]
        cost.calls += 1
        cost.seconds += seconds
        cost.floor += self._floor(function, args, kwargs, result)
        return result

    def _floor(self, function, args: tuple, kwargs: dict, result) -> float:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if views or "empty" in function.name():
            return 0.0
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        formula = self.formulas.get(function.overloadpacket)
        if formula and function.namespace == "aten":
            precision = "bf16" if tensors[-1].dtype == torch.bfloat16 else "fp32"
            return formula(*args, **kwargs, out_val=result) / self.rates[precision]
        # A tensor that is one number for many places is read once.
        return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors) / self.rates["copy"]


def by_operator(work: Work, images: Images, rates: Mapping[str, float]) -> tuple[Table, list[Measurement]]:
    """A table of what a step's time goes into: the fastest of some runs of each operator.

    Args:
        work: a step on the CPU.
        images: that it is done with.
        rates: of `machine.ceilings`.
    """
    work(images), work(images)  # takes memory from the system, compiles kernels
    steps, runs = [], []
    for _ in range(REPEATS):
        steps.append(common.elapsed(lambda: work(images), "cpu"))
        with Operators(rates) as operators:
            work(images)
        runs.append(operators.found)
    step = min(steps)
    fastest = {name: min(run[name].seconds for run in runs) for name in runs[0]}
    calls, seconds, floors = Counter(), Counter(), Counter()
    for name, cost in runs[0].items():
        for row in ("all operators", name if fastest[name] >= LEAST * step else "others"):
            calls[row] += cost.calls
            seconds[row] += fastest[name]
            floors[row] += cost.floor
    found = [_row("step", 1, step, floors["all operators"], step)]
    found += [_row(name, calls[name], took, floors[name], step) for name, took in seconds.most_common()]
    return output.table("by operator (cpu)", found, COLUMNS), found


def _row(name: str, calls: int, seconds: float, floor: float, step: float) -> Measurement:
    row = Measurement({"operator": name, "calls": calls}, seconds=[seconds])
    row.figures = {"part": seconds / step, "floor": 1e3 * floor, "share": floor / seconds if seconds else 0.0}
    return row
