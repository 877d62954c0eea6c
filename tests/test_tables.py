"""Tables as text, Markdown and CSV."""

import csv
import io

from dereflect.util import tables

ROWS = [("set", "images", "PSNR"), ("a|b", "9", "25.1"), ("longer", "120", "7.25")]


def test_text_aligns_columns():
    assert tables.as_text(ROWS, left=1).splitlines() == [
        "set     images  PSNR",
        "--------------------",
        "a|b          9  25.1",
        "longer     120  7.25",
    ]
    assert tables.as_text(ROWS, rule=False).splitlines()[1] == "a|b     9       25.1"


def test_text_that_is_too_wide_goes_on_below():
    rows = [("set", "images", "PSNR", "SSIM"), ("real20", "20", "25.1", "0.9"), ("x" * 30, "120", "7.25", "0.8")]
    assert tables.as_text(rows, left=1, width=26).splitlines() == [
        "set           images  PSNR",
        "--------------------------",
        "real20            20  25.1",
        "xxxxx...xxxx     120  7.25",
        "",
        "set           SSIM",
        "------------------",
        "real20         0.9",
        "xxxxx...xxxx   0.8",
    ]
    assert tables.as_text(rows, width=200) == tables.as_text(rows)


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
