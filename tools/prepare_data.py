"""The data: fetch it, unpack it, bring stock data sets into shape, check what is there.

    python tools/prepare_data.py download                          the authors' archive, as dataset/sirs.zip
    python tools/prepare_data.py unpack dataset/sirs.zip dataset/reflection-removal
    python tools/prepare_data.py check dataset/reflection-removal --published
    python tools/prepare_data.py voc VOCdevkit/VOC2012/JPEGImages   stock Pascal VOC to train on
    python tools/prepare_data.py real20 real20                     stock Real20 to test on
    python tools/prepare_data.py kinds photographs --base_dir kinds
                                                   mixtures of one kind of reflection each: sharp, soft, half a pane ...

A broken-off download goes on where it stopped, and so do voc and real20.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options import PUBLISHED_DATA
from dereflect.options.arguments import positive_int
from dereflect.options.parser import Parser
from dereflect.util.program import run

MIRROR = "https://checkpoints.mingjia.li/sirs.zip"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 1 where `check` finds trouble."""
    options = _parser().parse_args(arguments)
    # Each command imports what it needs: --help answers at once.
    if options.command == "check":
        from dereflect.tools.preparation.check import check

        return check(options.folder, options.published)
    if options.command == "unpack":
        from dereflect.tools.preparation.archive import unpack

        unpack(options.archive, options.folder, options.max_gb * 10**9)
    elif options.command == "download":
        from dereflect.tools.preparation.download import download

        download(options.url, options.file)
    else:
        from dereflect.tools.preparation import convert
        from dereflect.tools.preparation.kinds import kinds

        {"voc": convert.voc, "real20": convert.real20, "kinds": kinds}[options.command](
            options.source, options.base_dir
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("check", help="is everything there, whole and paired, and trained on no test image?")
    add.add_argument("folder", type=Path, nargs="?", default=PUBLISHED_DATA, metavar="DIR",
                     help=f"the data, as --base_dir of train_sirs.py (default: {PUBLISHED_DATA})")  # fmt: skip
    add.add_argument("--published", action="store_true",
                     help="trouble is also what differs from the published sets: other counts, other images, "
                          "none")  # fmt: skip

    add = commands.add_parser("unpack", help="a zip or tar archive, of which nothing can get out of the folder")
    add.add_argument("archive", type=Path, metavar="ARCHIVE")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("--max_gb", type=positive_int, default=50, metavar="GB",
                     help="refuse archives that hold more gigabytes than this (default: 50)")  # fmt: skip

    add = commands.add_parser("voc", help="photographs into centre crops of 224 x 224 pixels, as PNG")
    add.add_argument("source", type=Path, metavar="DIR", help="folder of photographs, such as VOC2012/JPEGImages")
    _add_base_dir(add)

    add = commands.add_parser("real20", help="pairs into pairs whose short side is 420 pixels")
    add.add_argument("source", type=Path, metavar="DIR", help="folder of blended and transmission_layer")
    _add_base_dir(add)

    add = commands.add_parser("kinds", help="photographs into mixtures of one kind of reflection each, to test on")
    add.add_argument("source", type=Path, metavar="DIR", help="folder of photographs without reflections")
    _add_base_dir(add)

    add = commands.add_parser("download", help="the archive of all sets by DSRNet's authors")
    add.add_argument("file", type=Path, nargs="?", default=Path("dataset/sirs.zip"), metavar="FILE",
                     help="where it is put (default: dataset/sirs.zip)")  # fmt: skip
    add.add_argument("--url", default=MIRROR, metavar="URL", help=f"another address (default: {MIRROR})")
    return parser


def _add_base_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_dir", type=Path, default=PUBLISHED_DATA, metavar="DIR",
                        help=f"the data that it joins (default: {PUBLISHED_DATA})")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
