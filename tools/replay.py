"""Repeat a training step whose loss or gradient wasn't finite, and show where that begins, block by block.

    python tools/replay.py checkpoints/mdsrnet_v1_l/nonfinite_step_81234_rank_0.pt

The file has the weights, the batch and the options of that step. The output has the losses and, for every block, the
root mean square of its input, of its output and of the gradients of both. A mark shows the first one that isn't finite.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import train_parser
from dereflect.options.parser import Parser
from dereflect.util.errors import UserError
from dereflect.util.program import run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="replay.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="nonfinite_step_..._rank_....pt of a run's folder")
    parser.add_argument("--vgg_weights", metavar="imagenet|random|FILE", help="others than the run's")
    replay(parser.parse_args(arguments))


def replay(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        UserError: the file is no such checkpoint.
    """
    import torch

    from dereflect.models.arch.blocks import Block
    from dereflect.util.run import checkpoint

    state = checkpoint.load(options.file)
    if not {"batch", "names", "network", "inet", "options"} <= state.keys():
        raise UserError(f"{options.file}: not a saved step; a run leaves one when a loss or a gradient is not finite")
    model = _model(state, options.vgg_weights)
    network = model.network
    rows: dict[str, dict[str, float]] = {}

    def size(x: torch.Tensor) -> float:
        return x.detach().float().square().mean().sqrt().item()

    def watch(name: str, came: torch.Tensor, went: torch.Tensor) -> None:
        rows[name] = {"in": size(came), "out": size(went), "largest": went.detach().abs().max().item()}
        for what, x in (("grad in", came), ("grad out", went)):
            rows[name][what] = 0.0  # of what nothing is learnt from, such as VGG19's features
            if x.requires_grad:
                x.register_hook(lambda grad, what=what: rows[name].update({what: size(grad)}))

    for name, part in network.named_modules():
        if isinstance(part, Block):
            part.register_forward_hook(lambda _, came, went, name=name: watch(name, came[0], went))
    terms = model(*state["batch"].values())
    sum(terms.values()).backward()
    print(f"{state['inet']}, step {state['global_step']}; {', '.join(state['names'])}")
    print("losses:  " + ", ".join(f"{key} {value.item():.4g}" for key, value in terms.items()))
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for what, tensors in (("weights", state["network"]), ("gradients", gradients)):
        bad = [name for name, value in tensors.items() if not value.isfinite().all()]
        print(f"{what}: " + (f"not finite in {', '.join(bad[:5])} and {len(bad)} in all" if bad else "all finite"))
    width = max(len(name) for name in rows)
    columns = ("in", "out", "largest", "grad out", "grad in")
    print(f"\n{'block':{width}}  " + "  ".join(f"{column:>9}" for column in columns))
    mark = _marks(rows)
    for name, row in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{row[column]:9.3g}" for column in columns) + mark.get(name, ""))


def _model(state: dict, vgg_weights: str | None):
    """The model that the run trained, with the weights of the step; options newer than the run have their defaults."""
    import torch

    from dereflect.models import build_model, check_backends
    from dereflect.util.device import wants_bf16

    recorded = {action.dest: action.default for action in train_parser()._actions} | state["options"]
    recorded |= {"weight_path": None, "checkpoint_activations": False}  # the weights are those of the step
    recipe = argparse.Namespace(**recorded)
    recipe.vgg_weights = vgg_weights or recipe.vgg_weights
    model = build_model(recipe, wants_bf16(recipe.precision, torch.device("cpu")))
    check_backends(model.network, "cpu")
    model.network.load_state_dict(state["network"])
    return model


def _marks(rows: dict[str, dict[str, float]]) -> dict[str, str]:
    """The block, if any, where the first value that isn't finite comes from; if there is none, the first gradient."""
    for name, row in rows.items():
        if not math.isfinite(row["out"]):
            return {name: "  <- the first that isn't finite"}
    for name, row in reversed(rows.items()):
        if not math.isfinite(row["grad out"]):
            return {name: "  <- its gradient comes in not finite"}
        if not math.isfinite(row["grad in"]):
            return {name: "  <- the first gradient that isn't finite"}
    return {}


if __name__ == "__main__":
    sys.exit(run(main))
