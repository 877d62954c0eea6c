"""The parts of networks, their parameters, FLOPs and memory, and their receptive fields.

    python tools/model_info.py dsrnet_s mdsrnet_s
    python tools/model_info.py dsrnet_l mdsrnet_l --size 384 384 --depth 3
    python tools/model_info.py dsrnet_s mdsrnet_s --receptive_field reach.png --hold_features
    python tools/model_info.py madsrnet_xs --checkpoint models/pretrained/madsrnet_xs.safetensors --tiles 512
    python tools/model_info.py dsrnet_s --checkpoint checkpoints/dsrnet_s/best.pt --receptive_field reach.png

FLOPs are those of one image's forward pass, in matrix products, convolutions and scans; a multiplication with an
addition counts as two. A training step has about three times as many.
Memory is what one image's forward pass keeps for the backward pass, in fp32, with this machine's scan, without VGG19,
which is frozen, and without the losses. All this is counted without computing, so any model and size is quick.

--tiles shows how far images that are separated in tiles are from the whole, in levels of 255, for T and R: with tiles
that are images by themselves, and as tools/infer.py does it, with tiles that know the whole image. Without --photograph
it is an example of 1152x768 pixels, made of photographs that come with scikit-image.

The effective receptive field (Luo et al. 2016) is the absolute gradient of the centre pixel's transmission with
respect to the input, mean over some images of noise. Channel attention sees everything, but only its mean; Mamba what
comes before, row by row; VGG19 some 160 pixels, which --hold_features leaves out. In a fresh network every block's
residual scales are 0, so that it does nothing: without --checkpoint they are drawn at random, and the picture is of
what the architecture can do, not of what a training makes of it.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import natural_float, pixels, positive_int, thirtytwos
from dereflect.options.parser import Parser
from dereflect.util import tables
from dereflect.util.errors import UserError
from dereflect.util.program import run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="model_info.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL",
                        help="networks of models/arch/__init__.py; train_sirs.py --list_models shows them")  # fmt: skip
    parser.add_argument("--size", type=pixels, nargs=2, default=[224, 224], metavar=("HEIGHT", "WIDTH"),
                        help="pixels of the image, rounded up to multiples of 16 (default: 224 224)")  # fmt: skip
    parser.add_argument("--depth", type=positive_int, default=2, metavar="N",
                        help="how deep networks are divided into modules (default: 2)")  # fmt: skip
    parser.add_argument("--receptive_field", type=Path, metavar="FILE.png",
                        help="draw the models' effective receptive fields side by side")  # fmt: skip
    parser.add_argument("--field_size", type=pixels, default=192, metavar="PIXELS",
                        help="side of the receptive field's images, rounded up to a multiple of 16 "
                             "(default: 192)")  # fmt: skip
    parser.add_argument("--hold_features", action="store_true",
                        help="leave out of it what comes through VGG19, whose reach hides the blocks' own")  # fmt: skip
    parser.add_argument("--images", type=positive_int, default=4, metavar="N",
                        help="images of noise that the receptive field is the mean of (default: 4)")  # fmt: skip
    parser.add_argument("--tiles", type=thirtytwos, nargs="+", metavar="PIXELS",
                        help="compare tiles of these sides with the whole image")  # fmt: skip
    parser.add_argument("--photograph", type=Path, metavar="FILE",
                        help="the image for --tiles (default: an example)")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="weights for the receptive field and the tiles; takes a single MODEL")  # fmt: skip
    parser.add_argument("--scales", type=natural_float, default=0.5, metavar="STD",
                        help="standard deviation of the random residual scales without --checkpoint "
                             "(default: 0.5)")  # fmt: skip
    parser.add_argument("--vgg_weights", default="random", metavar="imagenet|random|FILE",
                        help="VGG19's weights for the receptive field and the tiles (default: random)")  # fmt: skip
    show(parser.parse_args(arguments))


def show(options: argparse.Namespace) -> None:
    """Print the tables and draw the picture.

    Raises:
        UserError: there is no such model, or a file can't be read or written.
    """
    from dereflect.models.arch import list_models

    unknown = [name for name in options.models if name not in list_models()]
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such model; there are {', '.join(list_models())}")
    if options.checkpoint and len(options.models) > 1:
        raise UserError("--checkpoint: takes a single MODEL, the one it was trained for")
    if options.checkpoint and not (options.receptive_field or options.tiles):
        raise UserError("--checkpoint: only the receptive field and the tiles depend on weights; add "
                        "--receptive_field FILE.png or --tiles PIXELS")  # fmt: skip
    height, width = (math.ceil(side / 16) * 16 for side in options.size)
    if options.tiles:
        _compare_tiles(options)
        return
    for name in options.models:
        _print_costs(name, height, width, options.depth)
    if options.receptive_field:
        _draw(options)


def _print_costs(name: str, height: int, width: int, depth: int) -> None:
    from dereflect.tools.inspection.costs import costs

    found = costs(name, height, width, depth)
    pixels = height * width
    print(f"{name}, {height} x {width} pixels")
    print(f"  parameters             {found.parameters:15,}")
    print(f"  forward pass           {found.forward / 1e9:15,.1f} GFLOPs, {found.forward / pixels / 1e3:,.0f} k/pixel")
    print(f"  frozen features        {found.vgg / 1e9:15,.1f} GFLOPs")
    print(f"  kept for backward      {found.kept / 1e6:15,.1f} MB, {found.kept / pixels / 1e3:,.1f} kB/pixel\n")
    rows = [("module", "parameters", "share", "GFLOPs", "share")]
    for module in found.modules:
        weight, work = module.parameters / found.parameters, module.forward / found.forward
        figures = f"{module.parameters:,}", f"{weight:.1%}", f"{module.forward / 1e9:,.2f}", f"{work:.1%}"
        rows.append((module.name, *figures))
    print(textwrap.indent(tables.as_text(rows, left=1, rule=False), "  ") + "\n")


def _compare_tiles(options: argparse.Namespace) -> None:
    from dereflect.tools.inspection import seams

    image = seams.photograph(options.photograph)
    print("tiles against the whole image, {1} x {0} pixels, levels of 255".format(*image.shape))
    rows = [("model", "tile", "overlap", "tiles are", "T largest", "mean", "R largest", "mean")]
    for name in options.models:
        for tile in options.tiles:
            separator = seams.separator_of(name, options.checkpoint, options.scales, options.vgg_weights, tile)
            for way, found in seams.differences(separator, image).items():
                figures = (text for each in found for text in (f"{each.largest:.1f}", f"{each.mean:.2f}"))
                rows.append((name, str(tile), str(separator.overlap_for(*image.shape[:2])), way, *figures))
    print(textwrap.indent(tables.as_text(rows, left=1, rule=False), "  "))


def _draw(options: argparse.Namespace) -> None:
    from dereflect.tools.inspection import field

    size = math.ceil(options.field_size / 16) * 16
    hold = options.hold_features
    fields = {}
    for name in options.models:
        network = field.prepared(name, options.checkpoint, options.scales)
        fields[name] = field.receptive_field(network, options.vgg_weights, size, options.images, hold)
    origin = f"random residual scales, std {options.scales:g}"
    if options.checkpoint:
        origin = f"weights: {options.checkpoint}"
    origin += ", VGG19's features held" * hold
    print(f"effective receptive field of the centre pixel, {size} x {size} pixels, {origin}")
    print("radii that hold so much of the gradient, and its shares above and below")
    rows = [("model", "50 %", "90 %", "99 %", "above", "below")]
    for name, values in fields.items():
        radii = (f"{field.radius(values, share):.0f} px" for share in (0.5, 0.9, 0.99))
        rows.append((name, *radii, *(f"{half:.1%}" for half in field.halves(values))))
    print(textwrap.indent(tables.as_text(rows, left=1, rule=False), "  "))
    field.draw(fields, origin, options.receptive_field)
    print(f"{options.receptive_field}: logarithmic, over {field.DECADES} powers of ten below the largest value")


if __name__ == "__main__":
    sys.exit(run(main))
