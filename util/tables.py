"""Tables as text for a terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

Rows = Sequence[Sequence[str]]
"""Cells by row; the first row has the titles of the columns."""


TERMINAL = 100
"""Columns of text that a table on a terminal takes at the most."""


def as_text(rows: Rows, left: int | None = None, rule: bool = True, width: int | None = None) -> str:
    """Columns as wide as their widest cell, two spaces apart.

    Args:
        rows: the titles first.
        left: how many columns are aligned to the left; the others, numbers, to the right. None means all.
        rule: whether a line of dashes follows the titles.
        width: characters of a line at the most. What is wider goes on below, each part with the first column; a cell
            that is longer than half of it is cut in its middle.
    """
    if width:
        rows = [[_cut(cell, width // 2 - 1) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    parts: list[list[int]] = [[0]]
    for number, needed in enumerate(widths[1:], start=1):
        taken = sum(widths[column] + 2 for column in parts[-1])
        if width and len(parts[-1]) > 1 and taken + needed > width:
            parts.append([0])
        parts[-1].append(number)
    return "\n\n".join(_part(rows, widths, numbers, left, rule) for numbers in parts)


def _part(rows: Rows, widths: Sequence[int], numbers: Sequence[int], left: int, rule: bool) -> str:
    """The columns of these numbers."""
    lines = [
        "  ".join(
            row[number].ljust(widths[number]) if number < left else row[number].rjust(widths[number])
            for number in numbers
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _cut(text: str, most: int) -> str:
    """A text without its middle, if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[len(text) - (most - most // 2 - 2) :]}"


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
