"""Measurements as tables, as files and as pictures."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.benchmarks.common import Measurement, by_curve
from util import disk
from util.errors import UserError
from util.tables import Rows, as_markdown, as_text

Table = tuple[str, Rows]
"""A title and the rows below it."""


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


@dataclass
class Panel:
    """A row of axes over one quantity; each line has its xs, then a list of ys for each axis."""

    title: str
    xlabel: str
    ylabels: Sequence[str]
    lines: dict[str, tuple[list[float], ...]]


def panel(
    title: str,
    found: Iterable[Measurement],
    xlabel: str,
    x: Callable[[Measurement], float],
    names: Mapping[str, str],
) -> Panel:
    """A line over `x` for each curve; `names` maps the labels of the axes to the names in the records."""
    lines = {}
    for curve, points in by_curve(found).items():
        points = sorted(points, key=x)
        ys = ([m.record()[name] for m in points] for name in names.values())
        lines[" ".join(curve)] = ([x(m) for m in points], *ys)
    return Panel(title, xlabel, list(names), lines)


def draw(panels: list[Panel], title: str, path: Path) -> None:
    """Write a picture of logarithmic axes, a row for every panel."""
    plt = import_matplotlib()
    columns = len(panels[0].ylabels)
    same = len({panel.xlabel for panel in panels}) == 1
    size = (5.5 * columns, 4 * len(panels))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, sharex=same, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for axis, label, number in zip(row, panel.ylabels, range(1, columns + 1), strict=True):
            for name, line in panel.lines.items():
                axis.plot(line[0], line[number], marker="o", label=name)
            axis.set(xscale="log", yscale="log", title=panel.title, xlabel=panel.xlabel, ylabel=label)
            places = sorted({x for line in panel.lines.values() for x in line[0]})
            axis.set_xticks(places, [f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in places])
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
            for direction in (axis.xaxis, axis.yaxis):
                direction.set_minor_formatter("")
            axis.grid(alpha=0.3)
        row[0].legend()
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
