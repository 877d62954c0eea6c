"""A trained network for others to use: its weights alone, or a file that runs without this project.

    python tools/export.py checkpoints/dsrnet_xs/best.pt -o dsrnet_xs.safetensors
    python tools/export.py checkpoints/dsrnet_xs/best.pt --to onnx -o dsrnet_xs.onnx
    python tools/export.py checkpoints/dsrnet_xs/best.pt --to torch -o dsrnet_xs.pt2
    python tools/export.py checkpoints/part1/last.pt checkpoints/part2/last.pt -o mean.safetensors

Where there is a moving average, its weights are taken. Of several checkpoints the mean of the weights is written, which
may do better than each where one training went on from the other ("Model soups", Wortsman et al., ICML 2022). A
.safetensors file names the network and the options of its training, but none of the machine, such as folders; all
programs here take it as they take a checkpoint. The two others hold the network with its frozen features in float32,
for images of any size; see `models.exported`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import natural_int, roles
from dereflect.options.parser import WHAT, Parser
from dereflect.util.errors import UserError
from dereflect.util.program import run

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="export.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="a run's best.pt or last.pt, or a published file; "
        "of several, all of one network, the mean of their weights is written",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors, .onnx "
                        "or .pt2")  # fmt: skip
    parser.add_argument("--to", choices=tuple(_SUFFIXES), default="safetensors", help="safetensors: the weights alone; "
                        "onnx, torch: a program for images of any size that onnxruntime or torch alone runs "
                        "(default: safetensors)")  # fmt: skip
    parser.add_argument("--half", action="store_true", help="write 16-bit floating point numbers: half the size; for "
                        "safetensors alone")  # fmt: skip
    parser.add_argument("--sizes", type=natural_int, nargs="+", metavar="PIXELS", help="short sides, the largest "
                        "first, at which infer.py, evaluate.py and app.py are to show the network an image; for "
                        "safetensors alone")  # fmt: skip
    parser.add_argument("--vgg_weights", metavar="imagenet|random|FILE", help="for onnx and torch, where the network "
                        "takes VGG19's features: their weights (default: those of the training)")  # fmt: skip
    options = parser.parse_args(argv)
    suffix = _SUFFIXES[options.to]
    if options.output.suffix != suffix:
        parser.error(f"-o {options.output}: must end in {suffix}")
    if options.half and options.to != "safetensors":
        parser.error(f"--half: doesn't go with --to {options.to}, which is in float32")
    if options.sizes and options.to != "safetensors":
        parser.error(f"--sizes: doesn't go with --to {options.to}, whose programs take an image as it is")
    if options.vgg_weights and options.to == "safetensors":
        parser.error("--vgg_weights: only with --to onnx or torch")
    if len(options.checkpoint) > 1 and options.to != "safetensors":
        parser.error(f"{options.checkpoint[1]}: several checkpoints don't go with --to {options.to}; write their mean "
                     "to a .safetensors file first")  # fmt: skip
    if options.to == "safetensors":
        print(export(options.checkpoint, options.output, options.half, options.sizes))
    else:
        print(export_runnable(options.checkpoint[0], options.output, options.to, options.vgg_weights))


def export(sources: Sequence[Path], target: Path, half: bool = False, sizes: Sequence[int] | None = None) -> str:
    """Write the mean of the checkpoints' weights, and what the last one says of its training; returns a line about it.

    Args:
        sources, target: the files.
        half: write 16-bit numbers.
        sizes: at which the network is to be shown images, see `models.views`; None for those that the last one states.

    Raises:
        UserError: one can't be read, is of no network here or of another than the first, the sizes are not
            allowed, or the file can't be written.
    """
    from dereflect.models import views
    from dereflect.models.arch import create_model
    from dereflect.models.weights import architecture_of, load_weights
    from dereflect.util.run import checkpoint
    from dereflect.util.run.reader import is_plain

    state: dict = {}
    name, rest = "", {}
    for source in sources:
        content = checkpoint.load(source)
        found = architecture_of(content, str(source))
        if name and found != name:
            raise UserError(f"{source}: of {found}, but {sources[0]} is of {name}; a mean is of one network's weights")
        name = found
        network = create_model(name)
        rest = load_weights(network, content, str(source))
        for key, value in network.state_dict().items():
            state[key] = state.get(key, 0) + value.double() / len(sources)
    about = {"format": checkpoint.FORMAT, "inet": name}
    about |= {key: rest[key] for key in ("epoch", "global_step") if isinstance(rest.get(key), int)}
    if isinstance(rest.get("options"), dict):
        chosen = {key: value for key, value in rest["options"].items() if isinstance(key, str) and is_plain(value)}
        about["options"] = {key: value for key, value in chosen.items() if roles().get(key) is WHAT}
    if sizes:
        views.check(sizes)
        about["options"] = about.get("options", {}) | {"sizes": list(sizes)}
    state = {key: value.half() if half else value.float() for key, value in state.items()}
    checkpoint.save_weights(state, about, target)
    return f"{target}: {name}, {target.stat().st_size / 1e6:.1f} MB"


def export_runnable(source: Path, target: Path, to: str, vgg_weights: str | None = None) -> str:
    """Write a checkpoint's network as an ONNX model (`to` "onnx") or torch's program; returns a line about it.

    Raises:
        UserError: as `load_separator`; packages are missing, or the file can't be written.
    """
    from dereflect.models import exported
    from dereflect.models.separator import load_separator

    if to == "onnx":
        exported.check_onnx()
    separator = load_separator(source, vgg_weights=vgg_weights, precision="fp32", gpu_ids=[])
    print(f"exporting {separator.inet}: takes a minute or more", file=sys.stderr, flush=True)
    program = exported.export_program(separator.model.network, separator.model.features)
    if to == "onnx":
        form = f"ONNX, opset {exported.write_onnx(program, target)}"
    else:
        exported.write_torch(program, target)
        form = "torch.export"
    return f"{target}: {separator.inet}, {form}, {target.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run(main))
