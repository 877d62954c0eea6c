"""Tables as text for a terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

Rows = Sequence[Sequence[str]]
"""Cells by row; the first row has the titles of the columns."""


def as_text(rows: Rows, left: int | None = None, rule: bool = True) -> str:
    """Columns as wide as their widest cell, two spaces apart.

    Args:
        rows: the titles first.
        left: how many columns are aligned to the left; the others, numbers, to the right. None means all.
        rule: whether a line of dashes follows the titles.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(rows: Rows, escape: str = "|") -> str:
    """A table of Markdown.

    Args:
        rows: the titles first.
        escape: characters that get a backslash, so that they are shown as they are.
    """
    head, *body = [["".join("\\" * (c in escape) + c for c in cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """A line per row, below the keys of the first row."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
