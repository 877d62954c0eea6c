"""Tables as text, Markdown and CSV."""

import csv
import io

from util import tables

ROWS = [("set", "images", "PSNR"), ("a|b", "9", "25.1"), ("longer", "120", "7.25")]


def test_text_aligns_columns():
    assert tables.as_text(ROWS, left=1).splitlines() == [
        "set     images  PSNR",
        "--------------------",
        "a|b          9  25.1",
        "longer     120  7.25",
    ]
    assert tables.as_text(ROWS, rule=False).splitlines()[1] == "a|b     9       25.1"


def test_markdown_escapes_what_would_end_a_cell():
    assert tables.as_markdown(ROWS).splitlines()[:3] == [
        "| set | images | PSNR |",
        "| --- | --- | --- |",
        "| a\\|b | 9 | 25.1 |",
    ]
    assert "25\\.1" in tables.as_markdown(ROWS, escape=".")


def test_csv_reads_back():
    rows = [{"name": 'a "quoted", name', "PSNR": 25.5}, {"name": "two\nlines", "PSNR": None}]
    found = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    assert found == [{"name": 'a "quoted", name', "PSNR": "25.5"}, {"name": "two\nlines", "PSNR": ""}]
