"""All runs of a folder as a leaderboard.

    python tools/summarize.py                                  the runs under checkpoints/
    python tools/summarize.py runs --sort real20_420           by the PSNR on one set
    python tools/summarize.py --markdown runs.md --csv runs.csv --json runs.json
    python tools/summarize.py --over_seeds                     runs that differ in their seed only: mean and spread

A run's figures are those of the epoch that its held-out pairs picked ('val'). A run without held-out pairs shows its
last epoch ('last'). The best epoch by the test sets has its own column, because it flatters. PSNR is in dB.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.config import changed
from dereflect.options.parser import FROM, WHAT, Parser
from dereflect.util import disk, tables
from dereflect.util.errors import UserError
from dereflect.util.program import run
from dereflect.util.published import AVERAGED_SETS

_COLUMNS = {"inet", "seed", "nEpochs"}  # options with a column of their own
_SORTS = ("average", "published", "best_by_test", "hours", "disk", "name", "model")
_TEXT_WIDTH = 44  # characters of a comment or a recipe on the terminal


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="summarize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("checkpoints"), metavar="FOLDER",
                        help="where the runs are, at any depth (default: checkpoints)")  # fmt: skip
    parser.add_argument("--sort", default="average", metavar="KEY",
                        help=f"sort by {', '.join(_SORTS)} or the name of a test set (default: average); names, hours "
                             "and disk in ascending order, scores in descending order")  # fmt: skip
    parser.add_argument("--over_seeds", action="store_true",
                        help="show finished runs that differ only in their seed as one line: the mean, and after +- "
                             "the standard deviation of the PSNR")  # fmt: skip
    for kind in _WRITERS:
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write the table as {kind}, too")
    summarize(parser.parse_args(arguments))


def summarize(options: argparse.Namespace) -> None:
    """Print the leaderboard and write the files.

    Raises:
        UserError: there are no runs, there is no such key to sort by, or a file can't be written.
    """
    from dereflect.util.run.reader import find_runs, read_run

    rows = [row(read_run(folder), options.folder) for folder in find_runs(options.folder)]
    sets = test_sets(rows)
    if options.over_seeds:
        rows = over_seeds(rows)
    rows = in_order(rows, options.sort, sets)
    print(terminal_table(rows, sets))
    for note in notes(rows):
        print(note)
    for kind, write in _WRITERS.items():
        if path := getattr(options, kind):
            with disk.replacing(path, f"--{kind}") as temporary:
                temporary.write_text(write(rows, sets), encoding="utf-8", errors="backslashreplace")


def row(run, root: Path) -> dict:
    """The leaderboard's entry of a run, as plain values."""
    epoch, by = run.picked
    best = run.best_epoch("average")
    return {
        "name": run.folder.relative_to(root).as_posix() if run.folder != root else run.folder.resolve().name,
        "model": run.model,
        "comment": run.comment,
        "recipe": recipe(run.options),
        "seed": run.options.get("seed"),
        "status": "; ".join(run.problems) or ("finished" if run.is_finished else "unfinished"),
        "epochs": run.epochs_done,
        "epochs_wanted": run.epochs_wanted,
        "epoch": epoch,
        "picked_by": by,
        "average": _scores(run.line("average", epoch)),
        "published": _scores(run.line("average_published", epoch)),
        "sets": {
            name: _scores(run.line(name, epoch))
            for name in run.sets
            if name != "val" and not name.startswith("average")
        },
        "val": _scores(run.line("val", epoch)),
        "best_by_test": _scores(run.line("average", best)) | {"epoch": best},
        "aligned": bool(run.options.get("if_align")),
        "hours": run.hours,
        "disk": run.disk,
        "started": run.of_start("started"),
    }


def recipe(options: dict[str, object]) -> str:
    """The options that decide what is trained and differ from the defaults; for a demo run, from the demo's recipe."""
    parts = ["demo"] if options.get("demo") else []
    for key, value in changed(options, (WHAT, FROM)).items():
        if key not in _COLUMNS:
            parts.append(f"{key}={' '.join(map(str, value)) if isinstance(value, list) else _short(value)}")
    return ", ".join(parts)


def over_seeds(rows: list[dict]) -> list[dict]:
    """Finished runs that differ only in their seed become one row; the others stay as they are."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for number, entry in enumerate(rows):
        same = (entry["model"], entry["recipe"], entry["epochs"], entry["aligned"])
        groups[same if entry["status"] == "finished" else number].append(entry)
    return [_merged(group) if len(group) > 1 else group[0] for group in groups.values()]


def _merged(rows: list[dict]) -> dict:
    first = rows[0]
    return first | {
        "name": ", ".join(entry["name"] for entry in rows),
        "comment": ", ".join(dict.fromkeys(entry["comment"] for entry in rows)),
        "seed": ", ".join(str(entry["seed"]) for entry in rows),
        "epoch": None,
        "picked_by": "each",
        **{key: _mean([entry[key] for entry in rows]) for key in ("average", "published", "val")},
        "best_by_test": _mean([entry["best_by_test"] for entry in rows]) | {"epoch": None},
        "sets": {
            name: _mean([entry["sets"].get(name, _scores(None)) for entry in rows])
            for name in {name for entry in rows for name in entry["sets"]}
        },
        "hours": sum(entry["hours"] or 0 for entry in rows),
        "disk": sum(entry["disk"] for entry in rows),
    }


def _mean(scores: list[dict]) -> dict:
    """The mean of several runs' scores; None if any of them is missing."""
    values = {key: [each[key] for each in scores] for key in ("PSNR", "SSIM")}
    mean = {key: None if None in those else statistics.fmean(those) for key, those in values.items()}
    spread = None if mean["PSNR"] is None else statistics.stdev(values["PSNR"])
    return mean | {"count": scores[0]["count"], "spread": spread}


def test_sets(rows: list[dict]) -> list[str]:
    """The names of all runs' test sets, the published ones first."""
    names = {name for entry in rows for name in entry["sets"]}
    return [name for name in AVERAGED_SETS if name in names] + sorted(names - set(AVERAGED_SETS))


def in_order(rows: list[dict], key: str, sets: list[str]) -> list[dict]:
    """Sort the rows by a column; rows without a value come last.

    Raises:
        UserError: there is no such column.
    """
    if key in ("name", "model", "hours", "disk"):
        value, sign = (lambda entry: entry[key]), 1
    elif key in _SORTS:
        value, sign = (lambda entry: entry[key]["PSNR"]), -1
    elif key in sets:
        value, sign = (lambda entry: entry["sets"].get(key, _scores(None))["PSNR"]), -1
    else:
        raise UserError(f"--sort {key}: there is no such column; there are {', '.join([*_SORTS, *sets])}")
    rows = sorted(rows, key=lambda entry: entry["name"])
    there = [entry for entry in rows if value(entry) not in (None, "")]
    there.sort(key=lambda entry: value(entry) if isinstance(value(entry), str) else sign * value(entry))
    return there + [entry for entry in rows if value(entry) in (None, "")]


def columns(sets: list[str], rows: list[dict]) -> dict[str, Callable[[dict], str]]:
    """The columns: each title with the function that gives a row's text."""
    published = any(entry["published"]["PSNR"] is not None for entry in rows)
    return {
        "run": lambda entry: entry["name"],
        "model": lambda entry: entry["model"] or "?",
        "seed": lambda entry: _or_dash(entry["seed"]),
        "epochs": lambda entry: f"{entry['epochs']}/{_or_dash(entry['epochs_wanted'])}",
        "picked": lambda entry: f"{_or_dash(entry['epoch'])} {entry['picked_by']}" if entry["picked_by"] else "-",
        "average": lambda entry: _pair(entry["average"]),
        **({"published average": lambda entry: _pair(entry["published"])} if published else {}),
        **{name: lambda entry, name=name: _pair(entry["sets"].get(name, _scores(None))) for name in sets},
        "best by test": lambda entry: _best(entry["best_by_test"]),
        "hours": lambda entry: _or_dash(entry["hours"], ".1f"),
        "GB": lambda entry: f"{entry['disk'] / 1e9:.2f}",
        "state": lambda entry: entry["status"],
        "comment": lambda entry: entry["comment"],
        "recipe": lambda entry: entry["recipe"],
    }


def notes(rows: list[dict]) -> list[str]:
    """Warnings for whoever compares the rows."""
    lines = []
    tested = [entry for entry in rows if entry["average"]["PSNR"] is not None]
    images = {tuple(sorted((name, scores["count"]) for name, scores in entry["sets"].items())) for entry in tested}
    if len(images) > 1:
        lines.append("The averages are not of the same images: compare the columns of single sets.")
    if len({entry["aligned"] for entry in tested}) > 1:
        lines.append("Some runs resized their test images to multiples of 32 (--if_align), others did not.")
    if tested:
        lines.append(
            "'best by test' is the average of the epoch that the test sets themselves would pick: it flatters."
        )
    return lines


def terminal_table(rows: list[dict], sets: list[str]) -> str:
    """Aligned columns, below each other where they are too wide; long texts are cut, control characters become '?'."""
    cells = _cells(rows, sets, _for_terminal)
    return tables.as_text(cells, width=tables.TERMINAL)


def markdown_table(rows: list[dict], sets: list[str]) -> str:
    """A Markdown table and the notes below it."""
    cells = _cells(rows, sets, lambda text: " ".join(text.split()))
    return "\n".join([tables.as_markdown(cells, escape="\\`*_[]|<>#&~"), *notes(rows)]) + "\n"


def csv_table(rows: list[dict], sets: list[str]) -> str:
    """A line per run, each figure in its own column."""
    return tables.as_csv([_flat(entry, sets) for entry in rows])


def json_table(rows: list[dict], _: list[str]) -> str:
    """A list of objects, in the table's order."""
    return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_WRITERS = {"markdown": markdown_table, "csv": csv_table, "json": json_table}


def _cells(rows: list[dict], sets: list[str], safe: Callable[[str], str]) -> list[list[str]]:
    shown = columns(sets, rows)
    return [[safe(title) for title in shown], *([safe(tell(entry)) for tell in shown.values()] for entry in rows)]


def _flat(entry: dict, sets: list[str]) -> dict:
    plain = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    groups = {"average": entry["average"], "published": entry["published"], "val": entry["val"]}
    groups |= {name: entry["sets"].get(name, _scores(None)) for name in sets} | {"best_by_test": entry["best_by_test"]}
    return plain | {f"{name}_{key}": value for name, scores in groups.items() for key, value in scores.items()}


def _scores(line: dict | None) -> dict:
    """PSNR, SSIM and number of images of a line; None for a value that is missing or not finite.

    A single run has no spread of the PSNR.
    """
    line = line or {}
    scores = {key: line.get(key) for key in ("PSNR", "SSIM")}
    scores = {key: value if value is not None and math.isfinite(value) else None for key, value in scores.items()}
    return scores | {"count": line.get("count"), "spread": None}


def _pair(scores: dict) -> str:
    if scores["PSNR"] is None:
        return "-"
    spread = "" if scores["spread"] is None else f" +- {scores['spread']:.2f}"
    return f"{scores['PSNR']:.2f}{spread} / {_or_dash(scores['SSIM'], '.3f')}"


def _best(scores: dict) -> str:
    return f"{_pair(scores)} ({scores['epoch']})" if scores["epoch"] is not None else _pair(scores)


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _for_terminal(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 3] + "..."


if __name__ == "__main__":
    sys.exit(run(main))
