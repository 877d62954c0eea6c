"""A page in the browser: drop photographs, get them without their reflections.

    python tools/app.py                                            the bundled weights, and every run under checkpoints/
    python tools/app.py --checkpoint dsrnet_l.pt mdsrnet_l.pt      these, the first of them chosen, and the bundled
    python tools/app.py --checkpoint published.pt --inet dsrnet_l --vgg_weights vgg19.pth

Then open http://127.0.0.1:7860. Needs requirements-app.txt. Only this machine can open the page, unless --host says
otherwise, and neither the page nor this program connects to any other machine. Photographs and results are deleted when
their page is closed, at the latest an hour after they were made or when this program ends.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options import PRETRAINED, arguments, separator_settings
from dereflect.options.arguments import natural_int, positive_int
from dereflect.options.parser import Parser
from dereflect.util.errors import UserError
from dereflect.util.program import run
from dereflect.util.scratch import own_folder

if TYPE_CHECKING:
    from dereflect.util.photographs import Photograph

CHECKPOINTS = ("checkpoints/*/last.pt", "checkpoints/*/best.pt")  # the second stands before the first


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; imports neither torch nor the server."""
    parser = Parser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    weights = arguments.add_weights(parser)
    weights.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE",
                         help=f"to choose from, beside the bundled one (default: {CHECKPOINTS[1]}, or last.pt where "
                              "there is none)")  # fmt: skip
    arguments.add_tiles(parser)
    arguments.add_device(parser, trained=True)
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1",
                      help="address to listen at; 0.0.0.0: all see the page (default: 127.0.0.1)")  # fmt: skip
    page.add_argument("--port", type=natural_int, default=7860, help="0: one that is free (default: 7860)")
    page.add_argument("--max_megabytes", type=positive_int, default=30, metavar="N",
                      help="larger files are refused (default: 30)")  # fmt: skip
    page.add_argument("--max_megapixels", type=positive_int, default=24, metavar="N",
                      help="larger photographs are refused (default: 24)")  # fmt: skip
    page.add_argument("--queue", type=positive_int, default=20, metavar="N",
                      help="photographs that may wait; they are separated one at a time (default: 20)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    serve(parse(argv))


def serve(options: argparse.Namespace) -> None:
    """Show the page until Ctrl-C or SIGTERM.

    Raises:
        UserError: there is no checkpoint or the first can't be loaded, or the port is taken.
    """
    from PIL import Image

    from dereflect.data.demo import write_examples
    from dereflect.tools.page import server
    from dereflect.tools.page.work import Work

    Image.MAX_IMAGE_PIXELS = options.max_megapixels * 10**6 // 2  # twice as many are what util.images refuses
    separators = Separators(find_checkpoints(options.checkpoint), options)
    door = server.listen(options.host, options.port)
    print(f"Loading {separators.chosen}", file=sys.stderr)
    separators.load(separators.chosen)
    with own_folder("sirr-app-") as folder:
        work = Work(folder, separators.separate_file, options.queue + 1)
        about = {"weights": separators.names, "chosen": separators.chosen, "strength": options.strength}
        limits = {"megabytes": options.max_megabytes, "megapixels": options.max_megapixels}
        page = server.Page(work, about | limits, write_examples(folder))
        host, port = door.getsockname()[:2]
        print(f"Open http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", file=sys.stderr)
        try:
            asyncio.run(server.serve(server.Doors(page.app, options.host), door, work))
        finally:
            work.close()


def find_checkpoints(given: list[Path] | None) -> dict[str, Path]:
    """Checkpoints by the names that the page shows, the bundled one first.

    Args:
        given: files, or None for those of all runs under the current folder, the newest first: best.pt, or last.pt of
            a run that has none, such as one without held-out pairs.

    Raises:
        UserError: a file is missing.
    """
    of_runs = {path.parent: path for pattern in CHECKPOINTS for path in Path().glob(pattern)}.values()
    runs = sorted(of_runs, key=lambda path: path.stat().st_mtime, reverse=True)
    found = list(dict.fromkeys([PRETRAINED, *(given or runs)]))
    for path in found:
        if not arguments.is_file(path):
            raise UserError(f"--checkpoint {path}: there is no such file")
    short = {PRETRAINED: f"{PRETRAINED.stem} (bundled)"}
    is_of_run = {path: any(map(path.match, CHECKPOINTS)) for path in found}
    names = [short.get(path, path.parent.name if is_of_run[path] else str(path)) for path in found]
    return {str(path) if names.count(name) > 1 else name: path for name, path in zip(names, found, strict=True)}


class Separators:
    """Checkpoints by name; the one used last stays loaded.

    Attributes:
        names: of all.
        chosen: the name of the one that is offered first: the first of --checkpoint, else the bundled one.
    """

    def __init__(self, checkpoints: dict[str, Path], options: argparse.Namespace):
        self.names = list(checkpoints)
        self.chosen = self.names[1 if options.checkpoint and len(self.names) > 1 else 0]
        self._checkpoints = checkpoints
        self._settings = separator_settings(options) | {"strength": 1.0}  # the page weakens what it has
        self._loaded = (None, None)

    def load(self, name: str):
        """The loaded checkpoint.

        Raises:
            UserError: it can't be loaded.
        """
        from dereflect.models.separator import load_separator

        if self._loaded[0] != name:
            self._loaded = (None, None)  # frees the memory for the next
            path = self._checkpoints[name]
            replaced = {"inet": None, "vgg_weights": None} if path == PRETRAINED else {}
            self._loaded = (name, load_separator(path, **self._settings | replaced))
        return self._loaded[1]

    def separate_file(self, name: str, *arguments) -> "Photograph":
        """`tools.infer.separate_file` with that checkpoint."""
        from dereflect.tools.infer import separate_file

        return separate_file(self.load(name), *arguments)


program = partial(run, main, requirements="requirements-app.txt")
"""The command `dereflect-page` of the installed package."""

if __name__ == "__main__":
    sys.exit(program())
