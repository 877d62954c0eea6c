"""A run as one HTML page that needs nothing else: curves, figures, every test image, options.

    python tools/report.py checkpoints/dsrnet_s                          writes checkpoints/dsrnet_s/report.html
    python tools/report.py checkpoints/dsrnet_s -o page.html --max_side 320
    python tools/report.py checkpoints/dsrnet_s --checkpoint checkpoints/dsrnet_s/last.pt --gpu_ids 0
    python tools/report.py checkpoints/dsrnet_s --pictures none          curves and figures alone, at once

The pictures are computed from the run's best weights, as its evaluation did (--if_align, --precision), or taken from
its images/ (--save_images) where these are of the same epoch. The page holds everything and loads nothing: it can be
opened from the disk, mailed, or put on any server.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import gpu_list, positive_int
from dereflect.options.parser import Parser
from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.program import run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="weights to compute the pictures with (default: the run's best.pt, else its "
                             "last.pt)")  # fmt: skip
    parser.add_argument("--pictures", choices=("auto", "weights", "saved", "none"), default="auto",
                        help="compute them from weights; take the run's images/; none; auto: the saved ones where "
                             "they are of the weights' epoch or there are no weights (default: auto)")  # fmt: skip
    parser.add_argument("--base_dir", type=Path, metavar="DIR", help="where the run's data is now, if it has moved")
    parser.add_argument("--vgg_weights", metavar="imagenet|random|FILE", help="others than the run's")
    parser.add_argument("--gpu_ids", type=gpu_list, metavar="ID",
                        help="GPU to compute the pictures on, -1 for the CPU (default: a GPU if there is "
                             "one)")  # fmt: skip
    parser.add_argument("--max_side", type=positive_int, default=640, metavar="PIXELS",
                        help="longer side of the embedded pictures (default: 640); reflection and residue have half "
                             "of it")  # fmt: skip
    report(parser.parse_args(arguments))


def report(options: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        UserError: it is no run, its data or weights are missing, or the page can't be written.
    """
    from dereflect.tools.reports import page
    from dereflect.tools.reports.curves import curves
    from dereflect.util.run.reader import is_run, read_run

    if not options.run.is_dir() or not is_run(options.run):
        raise UserError(f"{options.run}: not the folder of a run; train_sirs.py leaves one under --checkpoints_dir")
    run = read_run(options.run)
    path = options.output or options.run / "report.html"
    disk.check_folder(path.parent, "-o" if options.output else "")
    shown, source = (), "none"
    if options.pictures != "none":
        from dereflect.tools.reports.pictures import of_run  # imports torch

        shown, source = of_run(run, options)
    page.write(path, run, curves(run), shown, source, options.max_side)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run(main))
