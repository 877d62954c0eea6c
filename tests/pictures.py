"""Makes every picture of docs anew, of the bundled weights and the embedded demo data.

    python -m tests.pictures               all but the measured ones; trains the demo, some three minutes on two cores
    python -m tests.pictures demo app      these
    python -m tests.pictures scan step     the measured ones: many minutes, with nothing else on the machine

What is needed: requirements-dev.txt; for app, report and tensorboard Chromium and its driver, too (Debian: apt-get
install chromium chromium-driver), without which these three stay as they are.
"""

import argparse
import base64
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dereflect import load_separator
from dereflect.data.demo import build_demo
from dereflect.util.images import read_image
from dereflect.util.metrics import joint_psnr
from tests.helpers import ROOT
from tests.page import CHROMIUM, DRIVER, Page, address, browser

_TILE, _GAP = (180, 150), 6  # pixels of the sheet
_MOST, _LEAST = 3, 2  # rows
_WINDOW = (1280, 1300)
_WIDTH = 900  # of a picture of a window


def demo(path: Path, scratch: Path) -> None:
    """Rows of mixture, transmission, its target, what was taken away, the mirrored photograph; prints the gains."""
    separator, rows = load_separator(), []
    build_demo(scratch / "demo")
    for mixture in sorted(scratch.glob("demo/test/*/blended/*")):
        I, T, R = (
            read_image(next((mixture.parents[1] / kind).glob(f"{mixture.stem}.*")))
            for kind in ("blended", "transmission_layer", "reflection_layer")
        )
        found = np.clip(separator.separate(I).transmission, 0, 1)
        gain = joint_psnr(found * 255, T * 255) - joint_psnr(I * 255, T * 255)
        rows.append((gain, mixture.parents[1].name, [I, found, T, np.clip(I - found, 0, 1), R]))
    rows.sort(key=lambda row: -row[0])
    for gain, name, _ in rows:
        print(f"{gain:+.1f} dB  {name}")
    chosen = rows[:_MOST] + rows[-_LEAST:]
    (width, height), steps = _TILE, np.add(_TILE, _GAP)
    sheet = Image.new("RGB", (5 * steps[0] - _GAP, len(chosen) * steps[1] - _GAP), "white")
    for y, (_, _, images) in enumerate(chosen):
        for x, image in enumerate(images):
            tile = Image.fromarray((image * 255 + 0.5).astype(np.uint8))
            sheet.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (x * steps[0], y * steps[1]))
    sheet.save(path, optimize=True)


def app(path: Path, scratch: Path) -> None:
    """The page with its first example, separated by the bundled weights."""
    with program(scratch, "tools/app.py", "--port", "0") as process, browser(address(process), scratch) as page:
        page.open()
        page.until(lambda: page.find("#examples button"), "the examples")[0].click()
        page.separated()
        page.until(lambda: page.do("return [...document.images].every(image => image.complete)"), "the pictures")
        snap(page, path, whole=True)


def report(path: Path, scratch: Path) -> None:
    """The upper end of the demo run's report."""
    file = scratch / "report.html"
    _run("tools/report.py", trained(scratch), "-o", file, folder=scratch)
    with browser(file.as_uri(), scratch) as page:
        page.driver.get(page.url)
        page.until(lambda: page.do("return [...document.querySelectorAll('img[src]')].length > 5"), "the pictures")
        snap(page, path)


def tensorboard(path: Path, scratch: Path) -> None:
    """The demo run's metrics beside those of the untouched input."""
    trained(scratch)
    options = ("--logdir", "checkpoints", "--port", "0", "--load_fast", "false")
    with program(scratch, "-m", "tensorboard.main", *options) as process:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        with browser(f"{url}#custom_scalars", scratch) as page:
            page.driver.get(page.url)
            settle(page)
            snap(page, path)


def field(path: Path, _: Path) -> None:
    """How far a pixel sees in two networks."""
    _run("tools/model_info.py", "dsrnet_s", "mdsrnet_s", "--receptive_field", path, "--hold_features")


def scan(path: Path, _: Path) -> None:
    """Time and memory of the selective scan over the length."""
    _run("tools/benchmark.py", "scan", "--max_seconds", "20", "--plot", path)


def step(path: Path, _: Path) -> None:
    """Time and memory of a training step over image size and batch."""
    sizes, variants = ("--sizes", "64", "128", "224", "--batches", "1", "4"), ("--variants", "plain", "fp32", "bf16")
    _run("tools/benchmark.py", "step", "--inet", "dsrnet_s", *sizes, *variants, "--repeats", "2", "--plot", path)


PICTURES = {make.__name__: make for make in (demo, app, report, tensorboard, field, scan, step)}
"""What makes docs/NAME.png, by its name."""

_SEEN, _MEASURED = {"app", "report", "tensorboard"}, {"scan", "step"}


def trained(scratch: Path) -> Path:
    """The run of the README's first command."""
    run = scratch / "checkpoints" / "madsrnet_xs"
    if not run.exists():
        comment = ("--comment", "first run", "--checkpoints_dir", run.parent)
        _run("train_sirs.py", "--inet", run.name, "--if_align", "--gpu_ids=-1", *comment, folder=scratch)
    return run


@contextmanager
def program(folder: Path, *arguments: object) -> Iterator[subprocess.Popen]:
    """One that serves, until the end."""
    process = subprocess.Popen(_command(*arguments), cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def settle(page: Page) -> None:
    """Wait until the window doesn't change any more."""
    before, now = b"", b"none yet"
    while now != before:
        time.sleep(4)
        before, now = now, page.driver.get_screenshot_as_png()


def snap(page: Page, path: Path, whole: bool = False) -> None:
    """Write the window as a picture, or the whole page."""
    width, height = _WINDOW
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    time.sleep(1)
    seen = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
    picture = Image.open(io.BytesIO(base64.b64decode(seen["data"]))).convert("RGB")
    picture.thumbnail((_WIDTH, picture.height), Image.Resampling.LANCZOS)
    picture.save(path, optimize=True)


def _run(*arguments: object, folder: Path = ROOT) -> None:
    subprocess.run(_command(*arguments), cwd=folder, check=True)


def _command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, script if script == "-m" else str(ROOT / script), *map(str, arguments)]


def main(arguments: Sequence[str] | None = None, folder: Path = ROOT / "docs") -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args(arguments).names or [name for name in PICTURES if name not in _MEASURED]
    if unknown := set(names) - set(PICTURES):
        parser.error(f"{min(unknown)}: there is no such picture; there are {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name in _SEEN and not (CHROMIUM and DRIVER):
                print(f"{name}: stays as it is, as there is no Chromium with its driver", file=sys.stderr)
                continue
            print(f"{name}: {PICTURES[name].__doc__}", flush=True)
            PICTURES[name](folder / f"{name}.png", Path(scratch))


if __name__ == "__main__":
    main()
