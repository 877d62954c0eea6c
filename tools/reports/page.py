"""The page itself. Whatever comes from outside is escaped: as text of HTML, or as JSON within a script element, which
the page's own script puts in place as text, never as HTML. A content security policy allows that one script and one
style sheet, and no connection."""

import base64
import hashlib
import html
import io
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tools.reports.pictures import Shown
from util import disk
from util.run.reader import SCORES, Run

_HERE = Path(__file__).parent
_QUALITY = 80  # of WebP
_HALF = ("reflection", "residue")  # kinds shown at half the side


def write(path: Path, run: Run, charts: list[dict], shown: Iterable[Shown], source: str, max_side: int) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        run: whose page it is.
        charts: of `curves.curves`.
        shown: the test images; taken one by one, as they may be many.
        source: where their pictures come from.
        max_side: longer side of the embedded pictures, in pixels.

    Raises:
        UserError: the file can't be written.
    """
    with disk.replacing(path, "-o") as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(_page(run, charts, shown, source, max_side))


def as_json(value: object) -> str:
    """JSON that may stand in a script element, whatever is in it."""
    text = json.dumps(value, allow_nan=False)
    for special in "<>&":
        text = text.replace(special, f"\\u{ord(special):04x}")
    return text


def data_uri(picture: np.ndarray, max_side: int) -> str:
    """A (H, W, 3) picture around 0..1 as WebP, made smaller if its longer side is above `max_side`."""
    image = Image.fromarray((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _page(run: Run, charts: list[dict], shown: Iterable[Shown], source: str, max_side: int) -> Iterator[str]:
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    name = html.escape(run.folder.resolve().name)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style></head><body>\n'
    yield f"<header><h1>{name}</h1><p>{html.escape(run.comment)}</p></header>\n"
    yield _section("Figures", _scores(run) + _table(_facts(run, charts), head=False))
    yield _section("Curves", '<div id="charts"></div>')
    yield _section("Test images", _GALLERY.format(source=html.escape(source)))
    yield _section("Options", _table([(key, _plain(value)) for key, value in sorted(run.options.items())], head=False))
    images = []
    for number, image in enumerate(shown):
        images.append(_described(image))
        yield f'<script type="application/json" id="picture{number}">{as_json(_embedded(image, max_side))}</script>\n'
    yield f'<script type="application/json" id="data">{as_json({"charts": charts, "images": images})}</script>\n'
    yield f"<script>{script}</script></body></html>\n"


_GALLERY = """<p>Left of the handle is the mixture, right of it what the buttons say. PSNR and SSIM are of the
transmission; the gain is over the untouched mixture. Pictures: {source}.</p>
<p id="controls"><label>sorted by <select id="sort"><option value="gain">gain, worst first</option>
<option value="best">gain, best first</option><option value="psnr">PSNR</option><option value="name">name</option>
<option value="set">set</option></select></label> <label>set <select id="filter"><option value="">all</option>
</select></label> <span id="count"></span></p><div id="gallery"></div>"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _table(rows: list[tuple], head: bool = True) -> str:
    """Rows of texts, which are escaped here."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if head and number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _scores(run: Run) -> str:
    """The sets' figures at the picked epoch, and at the one that the test sets would pick."""
    epoch, by = run.picked
    if epoch is None:
        return "<p>Nothing has been evaluated.</p>"
    best = run.best_epoch("average")
    how = {"val": "picked on the held-out pairs", "last": "the last one"}[by]
    rows = [("set", "images", "input PSNR / SSIM", f"epoch {epoch}, {how}", "gain", f"best by test, epoch {best}")]
    for name in run.sets:
        before, line, flattering = run.line(name, 0, "input"), run.line(name, epoch), run.line(name, best)
        gain = f"{line['PSNR'] - before['PSNR']:+.2f} / {line['SSIM'] - before['SSIM']:+.3f}" if line and before else ""
        count = (line or before or {}).get("count", "")
        rows.append((name, count, *(_pair(of) for of in (before, line)), gain, _pair(flattering)))
    return _table(rows) + "<p>An epoch picked by the test sets flatters their figures.</p>"


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
        ("epochs", f"{run.epochs[-1] if run.epochs else 0} of {run.epochs_wanted}"),
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


def _described(image: Shown) -> dict:
    """What the gallery's script needs to know of an image without opening its pictures."""
    height, width = image.layers["input"].shape[:2]
    scores = {key: [round(image.before[key], 4), round(image.metrics[key], 4)] for key in SCORES}
    kinds = [kind for kind in ("transmission", "target", *_HALF) if kind in image.layers]
    return {"set": image.set, "name": image.name, "width": width, "height": height, "kinds": kinds, **scores}


def _embedded(image: Shown, max_side: int) -> dict[str, str]:
    sides = {kind: max(1, max_side // 2) if kind in _HALF else max_side for kind in image.layers}
    return {kind: data_uri(picture, sides[kind]) for kind, picture in image.layers.items()}


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
