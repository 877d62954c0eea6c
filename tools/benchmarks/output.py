"""Measurements as tables, as files and as pictures."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dereflect.tools.benchmarks.common import Measurement, by_curve
from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.tables import Rows, as_markdown, as_text

Table = tuple[str, Rows]
"""A title and the rows below it."""

Row = tuple[str, list[Measurement], str, Callable[[Measurement], float]]
"""A row of a picture: its title, what it shows, the label of x, and x."""


def table(title: str, found: Sequence[Measurement], columns: Mapping[str, str]) -> Table:
    """A row for each measurement: what was measured, then a cell for each template of `columns`, which is filled in
    from the measurement's record, or left empty if the record lacks a name."""
    rows = [[*found[0].what, *columns]]
    for m in found:
        what = [f"{value:g}" if isinstance(value, float) else str(value) for value in m.what.values()]
        cells = [m.note] if m.note else [_filled(template, m.record()) for template in columns.values()]
        rows.append(what + cells + [""] * (len(columns) - len(cells)))
    return title, rows


def _filled(template: str, record: Mapping[str, object]) -> str:
    try:
        return template.format_map(record)
    except KeyError:
        return ""


def report(
    options: argparse.Namespace, header: Mapping[str, object], tables: Iterable[Table], found: Iterable[Measurement]
) -> None:
    """Print the header and the tables; write them as --markdown, and the header and all measurements as --json."""
    text = "\n".join(f"{key}: {value}" for key, value in header.items() if isinstance(value, str | int))
    print(f"{text}\n")
    for title, rows in tables:
        print(f"{title}\n{as_text(rows, left=2, rule=False)}\n")
    if options.markdown:
        parts = [f"### {title}\n\n{as_markdown(rows)}" for title, rows in tables]
        _write(options.markdown, "\n".join([f"```\n{text}\n```\n", *parts]), "--markdown")
    if options.json:
        record = {"setting": header, "measurements": [m.record() for m in found]}
        _write(options.json, json.dumps(record, indent=1) + "\n", "--json")


def _write(path: Path, text: str, option: str) -> None:
    with disk.replacing(path, option) as temporary:
        temporary.write_text(text, encoding="utf-8")


def draw(rows: Sequence[Row], axes: Mapping[str, str], title: str, path: Path) -> None:
    """Write a picture of logarithmic axes; `axes` maps the labels of y to the names in the records."""
    plt = import_matplotlib()
    same = len({xlabel for _, _, xlabel, _ in rows}) == 1
    size = (5.5 * len(axes), 4 * len(rows))
    figure, grid = plt.subplots(len(rows), len(axes), figsize=size, sharex=same, squeeze=False)
    for cells, (heading, found, xlabel, x) in zip(grid, rows, strict=True):
        curves = {curve: sorted(points, key=x) for curve, points in by_curve(found).items()}
        places = sorted({x(m) for points in curves.values() for m in points})
        for axis, (label, name) in zip(cells, axes.items(), strict=True):
            for curve, points in curves.items():
                axis.plot(list(map(x, points)), [m.record()[name] for m in points], marker="o", label=" ".join(curve))
            axis.set(xscale="log", yscale="log", title=heading, xlabel=xlabel, ylabel=label)
            axis.set_xticks(places, [f"{place:.3g}" if place < 1000 else f"{place:,.0f}" for place in places])
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
            for direction in (axis.xaxis, axis.yaxis):
                direction.set_minor_formatter("")
            axis.grid(alpha=0.3)
        cells[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    with disk.replacing(path, "--plot") as temporary:
        figure.savefig(temporary, dpi=150)


def import_matplotlib():
    """pyplot for files; called before measuring, so that a missing package is reported early."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
