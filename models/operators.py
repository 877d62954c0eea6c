"""Functions as registered torch operators, that cost little to call.

The operators of `torch.library.custom_op` import torch's compiler when the first of them is called, which takes a
second: longer than a network takes for a photograph.
"""

from collections.abc import Callable, Sequence

import torch
from torch import library


class Operator:
    """A function as an operator that autograd, torch.compile, FLOP counters and opcheck know."""

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]):
        self.name = name
        schema = library.infer_schema(function, mutates_args=mutates_args)
        library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, "default", function)
        namespace, operator = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), operator).default

    def __call__(self, *arguments):
        return self.overload(*arguments)

    def register_fake(self, function: Callable) -> Callable:
        """As `torch.library.register_fake`."""
        return library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """As `torch.library.register_autograd`."""
        library.register_autograd(self.name, backward, setup_context=setup_context)


def custom_op(name: str, mutates_args: Sequence[str]) -> Callable[[Callable], Operator]:
    """Decorator of the function that computes the operator `name`, on all devices; as `torch.library.custom_op`.

    Args:
        name: "namespace::name".
        mutates_args: names of the function's arguments that it changes.
    """
    return lambda function: Operator(name, function, mutates_args)
