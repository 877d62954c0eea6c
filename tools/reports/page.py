"""The page, made from page.html, page.js and page.css.

All foreign text is escaped: as text of HTML, or as JSON in a script element, which the page's script inserts as text,
never as HTML. A content security policy allows this script, this style sheet, and no connection.
"""

import base64
import hashlib
import io
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dereflect.util import disk
from dereflect.util.run.reader import SCORES, Run

if TYPE_CHECKING:
    from dereflect.tools.reports.pictures import Shown

_HERE = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, undefined=StrictUndefined)
TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False}
_QUALITY = 80  # of WebP
_HALF = ("reflection", "residue")  # kinds shown at half the side


def write(path: Path, run: Run, charts: list[dict], shown: Iterable["Shown"], source: str, max_side: int) -> None:
    """Write the page of a run, whole or not at all.

    Args:
        path: the file.
        run: the run.
        charts: the result of `curves.curves`.
        shown: the test images, which are taken one at a time to save memory.
        source: in words, where their pictures come from.
        max_side: longer side of the embedded pictures, in pixels.

    Raises:
        UserError: the file can't be written.
    """
    with disk.replacing(path, "-o") as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(_page(run, charts, shown, source, max_side))


def data_uri(picture: np.ndarray, max_side: int) -> str:
    """A (H, W, 3) picture around 0..1 as WebP, made smaller if its longer side is above `max_side`."""
    image = Image.fromarray((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _page(run: Run, charts: list[dict], shown: Iterable["Shown"], source: str, max_side: int) -> Iterator[str]:
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    images = []

    def pictures() -> Iterator[dict[str, str]]:
        for image in shown:
            images.append(_describe(image))
            yield _embed(image, max_side)

    return TEMPLATES.get_template("page.html").generate(
        name=run.folder.resolve().name,
        policy=policy,
        style=style,
        script=script,
        run=run,
        scores=_scores(run),
        facts=_facts(run, charts),
        source=source,
        options=[(key, _plain(value)) for key, value in sorted(run.options.items())],
        pictures=pictures(),
        charts=charts,
        images=images,  # complete when the template, which writes the pictures first, comes to it
    )


def _scores(run: Run) -> list[tuple]:
    """A table of the sets' metrics at the picked epoch and at the epoch that the test sets would pick; empty before the
    first evaluation."""
    epoch, by = run.picked
    if epoch is None:
        return []
    best = run.best_epoch("average")
    how = {"val": "picked on the held-out pairs", "last": "the last one"}[by]
    rows = [("set", "images", "input PSNR / SSIM", f"epoch {epoch}, {how}", "gain", f"best by test, epoch {best}")]
    for name in run.sets:
        before, line, flattering = run.line(name, 0, "input"), run.line(name, epoch), run.line(name, best)
        gain = f"{line['PSNR'] - before['PSNR']:+.2f} / {line['SSIM'] - before['SSIM']:+.3f}" if line and before else ""
        count = (line or before or {}).get("count", "")
        rows.append((name, count, *(_pair(of) for of in (before, line)), gain, _pair(flattering)))
    return rows


def _pair(line: dict | None) -> str:
    return f"{line['PSNR']:.2f} / {line['SSIM']:.3f}" if line else ""


def _facts(run: Run, charts: list[dict]) -> list[tuple[str, str]]:
    values = {
        chart["title"]: [value for _, value in chart["series"][0]["points"] if value is not None] for chart in charts
    }
    speed, memory = values.get("images per second"), values.get("peak memory, GiB")
    evaluations = [line.get("seconds", 0) for epoch in run.epochs if (line := run.line("average", epoch))]
    machine = run.of_start("machine")
    facts = [
        ("model", run.model),
        ("epochs", f"{run.epochs_done} of {run.epochs_wanted}"),
        ("started", run.of_start("started")),
        ("machine", f"{machine}, torch {run.of_start('torch')}" if machine else ""),
        ("time", f"{run.hours:.2f} hours, evaluations included" if run.hours is not None else ""),
        ("evaluation", f"{statistics.median(evaluations):.0f} s an epoch" if evaluations else ""),
        ("training speed", f"{statistics.median(speed):.2f} images per second (median)" if speed else ""),
        ("peak memory", f"{max(memory):.2f} GiB" if memory else ""),
        ("disk", f"{run.disk / 1e9:.2f} GB"),
        ("page written", time.strftime("%Y-%m-%d %H:%M")),
        *(("trouble", problem) for problem in run.problems),
    ]
    return [(what, value) for what, value in facts if value]


def _describe(image: "Shown") -> dict:
    """What the gallery's script has to know about an image before it opens the pictures."""
    height, width = image.layers["input"].shape[:2]
    scores = {key: [round(image.before[key], 4), round(image.metrics[key], 4)] for key in SCORES}
    kinds = [kind for kind in ("transmission", "target", *_HALF) if kind in image.layers]
    return {"set": image.set, "name": image.name, "width": width, "height": height, "kinds": kinds, **scores}


def _embed(image: "Shown", max_side: int) -> dict[str, str]:
    sides = {kind: max(1, max_side // 2) if kind in _HALF else max_side for kind in image.layers}
    return {kind: data_uri(picture, sides[kind]) for kind, picture in image.layers.items()}


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
