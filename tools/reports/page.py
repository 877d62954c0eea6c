"""The page, made from page.html, page.js and page.css.

All foreign text is escaped: as text of HTML, or as JSON in a script element, which the page's script inserts as text,
never as HTML. A content security policy allows this script, this style sheet, and no connection.
"""

import base64
import hashlib
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dereflect.options.config import changed
from dereflect.util import disk
from dereflect.util.published import averaged_sets
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
        shown: the test images, which are taken and made smaller one at a time to save memory.
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
    pictures, images = [], []
    measured: dict[str, list[dict]] = defaultdict(list)  # the scores of every image by set
    for image in shown:
        pictures.append(_embed(image, max_side))
        images.append(_describe(image))
        measured[image.set].append(image.scores)
    changes = changed(run.options)
    return TEMPLATES.get_template("page.html").generate(
        name=run.folder.resolve().name,
        policy=policy,
        style=style,
        script=script,
        run=run,
        counts={name: _count(run, name) for name in run.sets},
        scores=list(_scores(run, measured)),
        facts=_facts(run, charts),
        source=source,
        changed=[(key, _plain(value)) for key, value in changes.items()],
        options=[(key, _plain(value)) for key, value in sorted(run.options.items()) if key not in changes],
        pictures=pictures,
        charts=charts,
        images=images,
    )


def _count(run: Run, name: str) -> int | None:
    """How many images a set has."""
    return next((line.get("count") for line in run.lines if line["set"] == name), None)


def _scores(run: Run, measured: Mapping[str, list[dict]]) -> Iterator[tuple[str, list[tuple[str, str]], bool]]:
    """The rows of the table of figures: what was measured, PSNR and SSIM of every set, and whether it is the result.

    Args:
        run: the run; nothing comes of one without an evaluation.
        measured: by test set, the scores of every image of the page.
    """
    epoch, by = run.picked
    if epoch is None:
        return
    best = run.best_epoch("average")

    def row(of: Callable[[str], dict | None]) -> list[tuple[str, str]]:
        return [(f"{line['PSNR']:.2f}", f"{line['SSIM']:.3f}") if (line := of(name)) else ("", "") for name in run.sets]

    def gain(name: str) -> tuple[str, str]:
        before, after = run.line(name, 0, "input"), run.line(name, epoch)
        if not (before and after):
            return "", ""
        return f"{after['PSNR'] - before['PSNR']:+.2f}", f"{after['SSIM'] - before['SSIM']:+.3f}"

    how = {"val": "picked on the held-out pairs", "last": "the last one"}[by]
    yield "untouched", row(lambda name: run.line(name, 0, "input")), False
    for baseline, means in _baselines(measured).items():
        yield baseline, row(means.get), False
    if epoch and 0 in run.epochs:
        yield "epoch 0, as it began", row(lambda name: run.line(name, 0)), False
    yield f"epoch {epoch}, {how}", row(lambda name: run.line(name, epoch)), True
    yield "gain over untouched", [gain(name) for name in run.sets], False
    if best is not None:
        yield f"epoch {best}, best by test", row(lambda name: run.line(name, best)), False


def _baselines(measured: Mapping[str, list[dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean scores by baseline and set, averages over the sets included; nothing if no image was measured."""
    images = {**measured}
    for title, names in averaged_sets(measured).items():
        images[title] = [scores for name in names for scores in measured[name]]
    kinds = [kind for kind in next(iter(images.values()), [{}])[0] if kind not in {"model", "input"}]
    return {
        kind: {
            name: {metric: statistics.fmean(scores[kind][metric] for scores in of_set) for metric in SCORES}
            for name, of_set in images.items()
        }
        for kind in kinds
    }


def _facts(run: Run, charts: list[dict]) -> list[tuple[str, str]]:
    values = {
        chart["title"]: [value for _, value in chart["series"][0]["points"] if value is not None] for chart in charts
    }
    speed, memory = values.get("images per second"), values.get("peak memory, GiB")
    evaluations = [line.get("seconds", 0) for epoch in run.epochs if (line := run.line("average", epoch))]
    machine = run.of_start("machine")
    facts = [
        ("model", run.model),
        ("data", "the embedded demo set: every mixture is synthetic" if run.options.get("demo") else ""),
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
    scores = {key: [round(image.scores[kind][key], 4) for kind in ("input", "model")] for key in SCORES}
    kinds = [kind for kind in ("transmission", "target", *_HALF) if kind in image.layers]
    return {"set": image.set, "name": image.name, "width": width, "height": height, "kinds": kinds, **scores}


def _embed(image: "Shown", max_side: int) -> dict[str, str]:
    sides = {kind: max(1, max_side // 2) if kind in _HALF else max_side for kind in image.layers}
    return {kind: data_uri(picture, sides[kind]) for kind, picture in image.layers.items()}


def _plain(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "-" if value is None else text or "-"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
