"""What happened in a step whose loss wasn't finite: the step once more, block by block.

    python tools/replay.py checkpoints/mdsrnet_v1_l/nonfinite_step_81234_rank_0.pt

The file has the weights, the batch and the options of that step. Shows the losses, and for every block the root mean
square of what comes in and what goes out, the first one that isn't finite marked.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replay.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="nonfinite_step_..._rank_....pt of a run's folder")
    parser.add_argument("--vgg_weights", metavar="imagenet|random|FILE", help="others than the run's")
    try:
        replay(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def replay(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        UserError: the file is no such checkpoint.
    """
    import torch

    from models.arch import create_model
    from models.arch.blocks import Block
    from models.dsrnet_model_sirs import DSRNetModel
    from models.losses import ReflectionLoss
    from models.vgg import Vgg19
    from util import checkpoint
    from util.distributed import wants_bf16

    state = checkpoint.load(options.file)
    if not {"batch", "names", "network", "inet", "options"} <= state.keys():
        raise UserError(f"{options.file}: not a saved step; a run leaves one when a loss is not finite")
    recipe = state["options"]
    network = create_model(state["inet"])
    network.load_state_dict(state["network"])
    vgg = Vgg19(options.vgg_weights or recipe["vgg_weights"])
    loss = ReflectionLoss(vgg, lambda_vgg=recipe["lambda_vgg"], lambda_rec=recipe["lambda_rec"])
    model = DSRNetModel(network, vgg, loss, bf16=wants_bf16(recipe["precision"], torch.device("cpu")))
    rows = []

    def size(x: torch.Tensor) -> float:
        return x.float().square().mean().sqrt().item()

    for name, part in network.named_modules():
        if isinstance(part, Block):
            part.register_forward_hook(
                lambda _, came, went, name=name: rows.append((name, size(came[0]), size(went), went.abs().max().item()))
            )
    with torch.no_grad():
        terms = model(*(state["batch"][key] for key in ("input", "target_t", "target_r")))
    print(f"{state['inet']}, step {state['global_step']}; {', '.join(state['names'])}")
    print("losses:  " + ", ".join(f"{key} {value.item():.4g}" for key, value in terms.items()))
    bad = [name for name, value in state["network"].items() if not value.isfinite().all()]
    print("weights: " + (f"not finite in {', '.join(bad[:5])} and {len(bad)} in all" if bad else "all finite"))
    width = max(len(name) for name, *_ in rows)
    print(f"\n{'block':{width}}  {'rms in':>9}  {'rms out':>9}  {'largest':>9}")
    found = False
    for name, came, went, most in rows:
        mark = "" if found or math.isfinite(went) else "  <- the first that isn't finite"
        found = found or bool(mark)
        print(f"{name:{width}}  {came:9.3g}  {went:9.3g}  {most:9.3g}{mark}")


if __name__ == "__main__":
    sys.exit(main())
