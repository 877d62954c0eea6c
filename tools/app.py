"""A page in the browser: drop a photograph, get it without its reflection.

    python tools/app.py                                            every checkpoints/*/best.pt, and the bundled weights
    python tools/app.py --checkpoint dsrnet_l.pt mdsrnet_l.pt      these
    python tools/app.py --checkpoint published.pt --inet dsrnet_l --vgg_weights vgg19.pth

Then open http://127.0.0.1:7860. Needs requirements-app.txt. Only this machine can open the page, unless --host says
otherwise, and the page connects to no other machine. Photographs and results are deleted when their page is closed, at
the latest an hour after they were made or when this program ends.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import PRETRAINED, arguments, separator_settings
from options.arguments import natural_int, positive_int
from options.parser import Parser
from tools.page.guard import guarded
from tools.page.visits import MOST_BYTES, Visits, own
from util.errors import UserError
from util.program import run

if TYPE_CHECKING:
    from models.separator import Separator

CHECKPOINTS = "checkpoints/*/best.pt"

# Gradio and its dependencies read these when they are imported.
_ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
_PREFIX = "sirr-app-"  # of the folders for temporary files
_KEPT, _LOOK = 3600, 600  # seconds: the longest time that files are kept, and between two searches for older ones
_HEIGHT = 360  # of the photograph and the reflection on the page
_CSS = "#separate { max-width: 24em } footer { display: none !important }"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; imports neither torch nor Gradio."""
    parser = Parser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    weights = arguments.add_weights(parser)
    weights.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE",
                         help=f"to choose from (default: {CHECKPOINTS}, then the bundled one)")  # fmt: skip
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
    os.environ.update(_ENVIRONMENT)
    delete_orphans(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, claimed(Path(folder)):
        os.environ["GRADIO_TEMP_DIR"] = folder
        import gradio  # noqa: F401
        import uvicorn
        from PIL import Image

        # Twice this many pixels are what PIL refuses to decode; above the half of that it warns.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = options.max_megapixels * 10**6 // 2
        separators = Separators(find_checkpoints(options.checkpoint), options)
        door = listen(options.host, options.port)
        print(f"Loading {separators.names[0]}", file=sys.stderr)
        separators.get(separators.names[0])
        app = build_app(separators, Path(folder), options)
        host, port = door.getsockname()[:2]
        print(f"Open http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", file=sys.stderr)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[door])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Mark the folder as in use, for this block and at most for the life of this process."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def delete_orphans(parent: Path) -> None:
    """Delete what this user's earlier pages have left because they were killed (`kill -9`)."""
    for lock in parent.glob(f"{_PREFIX}*/.lock"):
        with contextlib.suppress(OSError):  # in use, or gone
            if lock.parent.lstat().st_uid == os.getuid():  # a lock of another user isn't even opened
                with claimed(lock.parent):
                    shutil.rmtree(lock.parent, ignore_errors=True)


def find_checkpoints(given: list[Path] | None) -> dict[str, Path]:
    """Checkpoints by the names that the page shows.

    Args:
        given: files, or None for those of all runs under the current folder, the newest first, and the bundled one.

    Raises:
        UserError: a file is missing.
    """
    runs = sorted(Path().glob(CHECKPOINTS), key=lambda path: path.stat().st_mtime, reverse=True)
    found = given or [*runs, PRETRAINED]
    for path in found:
        if not path.is_file():
            raise UserError(f"--checkpoint {path}: there is no such file")
    short = {PRETRAINED: f"{PRETRAINED.stem} (bundled)"}
    names = [short.get(path, path.parent.name if path.match(CHECKPOINTS) else str(path)) for path in found]
    return {str(path) if names.count(name) > 1 else name: path for name, path in zip(names, found, strict=True)}


class Separators:
    """Checkpoints by name; the one used last stays loaded."""

    def __init__(self, checkpoints: dict[str, Path], options: argparse.Namespace):
        self.names = list(checkpoints)
        self._checkpoints = checkpoints
        self._settings = separator_settings(options)
        self._loaded = (None, None)

    def get(self, name: str) -> "Separator":
        """The loaded checkpoint.

        Raises:
            UserError: it can't be loaded.
        """
        from models.separator import load_separator

        if self._loaded[0] != name:
            self._loaded = (None, None)  # frees the memory for the next
            self._loaded = (name, load_separator(self._checkpoints[name], **self._settings))
        return self._loaded[1]


def separate_upload(separator: "Separator", path: Path, folder: Path) -> tuple[Path, Path, Path, str]:
    """Separate a photograph into files of `folder`, as tools/infer.py does with --format png.

    Returns:
        The photograph as browsers can show it, its transmission, its reflection, and a line about them.

    Raises:
        UserError: the file is not an image, damaged, or too large.
    """
    import numpy as np

    from tools.infer import Job, separate_file
    from util.device import enough_memory
    from util.photographs import as_type, write_photograph

    before = folder / f"{path.stem}.jpg"
    transmission, reflection = (folder / f"{path.stem}-{layer}.png" for layer in ("transmission", "reflection"))
    start = time.perf_counter()
    try:
        with enough_memory(lambda: f"{path.name}: too large for the memory that is free here; scale it down"):
            photograph = separate_file(separator, Job(path, "png", {"t": transmission, "r": reflection}))
            write_photograph(before, as_type(photograph.pixels, np.dtype(np.uint8)), photograph, "jpeg")
    except UserError as error:
        raise UserError(str(error).replace(f"{path.parent}{os.sep}", "")) from error
    height, width = photograph.pixels.shape[:2]
    return before, transmission, reflection, f"{width} × {height} pixels in {time.perf_counter() - start:.2f} s"


def build_app(separators: Separators, folder: Path, options: argparse.Namespace) -> Callable:
    """The page as an ASGI application; `folder` is Gradio's for temporary files, that of GRADIO_TEMP_DIR."""
    import gradio as gr
    from fastapi import FastAPI

    visits = Visits(folder / "results")
    gr.set_static_paths([visits.folder])  # serve them from there; a copy elsewhere would not be deleted
    page = _build_page(separators, visits, folder, options)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=options.max_megabytes * 2**20,
        css=_CSS,
    )
    return guarded(app, options.host, lambda: visits.bytes() < MOST_BYTES)


def _build_page(separators: Separators, visits: Visits, folder: Path, options: argparse.Namespace):
    """The components of the page, and their events."""
    import gradio as gr

    def separate(path: str | None, name: str, request: gr.Request):
        if path is None:
            raise gr.Error("Drop a photograph first.", duration=None, print_exception=False)
        visits.end_old(_KEPT)
        try:
            results = visits.results(request.session_hash)
            before, transmission, reflection, line = separate_upload(separators.get(name), own(path, folder), results)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        buttons = (gr.DownloadButton(value=file, interactive=True) for file in (transmission, reflection))
        return (before, transmission), reflection, line, *buttons

    def uploaded(path: str | None, request: gr.Request) -> None:
        if path:
            visits.uploaded(request.session_hash, own(path, folder))

    def closed(request: gr.Request) -> None:
        visits.end(request.session_hash)

    with gr.Blocks(title="Reflection removal", analytics_enabled=False, delete_cache=(_LOOK, _KEPT)) as page:
        gr.Markdown(
            "# Reflection removal\nDrop a photograph that was taken through glass, of up to "
            f"{options.max_megabytes} megabytes and {options.max_megapixels} megapixels."
        )
        with gr.Row():
            with gr.Column():
                photograph, name, button = _inputs(separators.names, folder)
            with gr.Column():
                outputs = _outputs()
        photograph.upload(uploaded, photograph, queue=False, show_progress="hidden", api_visibility="private")
        inputs = [photograph, name]
        button.click(separate, inputs, outputs, show_progress_on=outputs[:1], api_visibility="private")
        page.unload(closed)
    return page.queue(max_size=options.queue, default_concurrency_limit=1)


def _inputs(names: list[str], folder: Path) -> tuple:
    """The photograph, the name of the checkpoint and the button; the examples below them."""
    import gradio as gr

    from data.demo import write_examples

    photograph = gr.Image(label="Photograph", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                          height=_HEIGHT, elem_id="photograph")  # fmt: skip
    _take_files_only(photograph, folder)
    name = gr.Dropdown(names, value=names[0], label="Checkpoint")
    button = gr.Button("Remove the reflection", variant="primary", elem_id="separate")
    examples = [str(path) for path in write_examples(folder)]
    gr.Examples(examples, photograph, label="Examples", cache_examples=False)
    return photograph, name, button


def _outputs() -> list:
    """The slider, the reflection, the line about them, and the two downloads."""
    import gradio as gr

    shown = {"type": "filepath", "interactive": False, "buttons": ["fullscreen"]}
    slider = gr.ImageSlider(label="Before and after", elem_id="slider", **shown)
    line = gr.Markdown()
    with gr.Row():
        downloads = [
            gr.DownloadButton(f"Download the {layer}", interactive=False, elem_id=f"download-{layer}")
            for layer in ("transmission", "reflection")
        ]
    reflection = gr.Image(label="Reflection", height=_HEIGHT, elem_id="reflection", **shown)
    return [slider, reflection, line, *downloads]


def _take_files_only(image, folder: Path) -> None:
    """Make an image component pass uploads on unread.

    Otherwise Gradio opens them itself, before util.photographs can report what is wrong, and fetches addresses that a
    request names.
    """
    import gradio as gr

    fetch = image.async_move_resource_to_block_cache

    async def refuse_addresses(path: str | None) -> str | None:
        if path and "://" in path:
            raise gr.Error("Addresses are not fetched; send a file.", print_exception=False)
        return await fetch(str(own(path, folder)) if path else path)  # it would copy any file of this machine

    image.async_move_resource_to_block_cache = refuse_addresses
    image.preprocess = lambda payload: payload and payload.path


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        UserError: it is taken, or isn't this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); try another --port") from error


if __name__ == "__main__":
    sys.exit(run(main, requirements="requirements-app.txt"))
