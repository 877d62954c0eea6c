"""Weights alone, for others to use: a checkpoint's, without the optimiser's state, as a .safetensors file.

    python tools/export.py checkpoints/dsrnet_xs/best.pt -o dsrnet_xs.safetensors

Where there is a moving average, its weights are taken. The file names the network and the options of its training, but
none of the machine, such as folders. All programs here take it as they take a checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import roles
from dereflect.options.parser import WHAT, Parser
from dereflect.util.program import run


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="export.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's best.pt or last.pt, or a published file"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--half", action="store_true", help="write 16-bit floating point numbers: half the size")
    options = parser.parse_args(argv)
    if options.output.suffix != ".safetensors":
        parser.error(f"-o {options.output}: must end in .safetensors")
    print(export(options.checkpoint, options.output, options.half))


def export(source: Path, target: Path, half: bool = False) -> str:
    """Write the weights of a checkpoint; returns a line about them.

    Raises:
        UserError: it can't be read or is of no network here, or the file can't be written.
    """
    from dereflect.models.arch import create_model
    from dereflect.models.weights import architecture_of, load_weights
    from dereflect.util.run import checkpoint
    from dereflect.util.run.reader import is_plain

    content = checkpoint.load(source)
    name = architecture_of(content, str(source))
    network = create_model(name)
    rest = load_weights(network, content, str(source))
    about = {"format": checkpoint.FORMAT, "inet": name}
    about |= {key: rest[key] for key in ("epoch", "global_step") if isinstance(rest.get(key), int)}
    if isinstance(rest.get("options"), dict):
        chosen = {key: value for key, value in rest["options"].items() if isinstance(key, str) and is_plain(value)}
        about["options"] = {key: value for key, value in chosen.items() if roles().get(key) is WHAT}
    state = {key: value.half() if half else value for key, value in network.state_dict().items()}
    checkpoint.save_weights(state, about, target)
    return f"{target}: {name}, {target.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run(main))
