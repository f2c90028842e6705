"""Cells, tables, legends, and JSON files with a schema."""

import math
from dataclasses import dataclass

import pytest
from pydantic import TypeAdapter

from flatreg.data.files import read_json, write_json
from flatreg.evaluation.compare import PairedDifference
from flatreg.measures.estimate import Estimate
from flatreg.report.tables import (
    LEGENDS,
    WIDTH,
    bullets,
    legend,
    markdown,
    number,
    percent,
    points,
    ratio,
    terminal,
    with_error,
    wrapped,
)

HEADS = ["arm", "n", "kappa*"]


def test_a_terminal_table_is_aligned_and_cut():
    rows = [["plain", "20", "3.1"], ["a-long-name", "7", "-"]]
    assert terminal(HEADS, rows, cut=7, indent=2) == [
        "  arm       n  kappa*",
        "  plain    20     3.1",
        "  a-long-   7       -",
    ]
    assert rows[1][0] == "a-long-name"
    assert len(terminal(HEADS, [["x", "1", "y" * 200]])[1]) == WIDTH


def test_a_short_row_says_its_last_cell_in_full():
    full, reason = ["plain", "20", "3.1"], "failed: the loss is nan"
    assert terminal(HEADS, [full, ["3", reason], ["x" * 40]]) == [
        "arm     n  kappa*",
        "plain  20     3.1",
        f"3      {reason}",
        "x" * 40,
    ]
    assert terminal(HEADS, [["3", reason]])[1] == f"3    {reason}"


def test_the_widest_row_of_a_report_fits():
    cells = ["x" * 99, "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]", "1.22e+03", "1.22e+03"]
    heads = ["", "clean %", "attacked %", "kappa", "kappa*", "seconds"]
    (_, line) = terminal(heads, [[*cells, "99999"]])
    assert line.endswith("  99999") and len(line) <= WIDTH


def test_a_table_without_heads_has_no_line_of_heads():
    assert terminal(["", ""], [["1", "2"], ["11", "3"]]) == ["1   2", "11  3"]


def test_markdown_escapes_stars_in_heads_and_legends_only():
    assert markdown(HEADS, [["**a**", "1", "2"]]).split("\n") == [
        "| arm | n | kappa\\* |",
        "|---|---:|---:|",
        "| **a** | 1 | 2 |",
    ]
    assert bullets({"kappa*": "as kappa*"}) == "- kappa\\*: as kappa\\*."


def test_lines_are_wrapped_with_a_hanging_indent():
    lines = wrapped("findings", "word " * 60)
    assert max(map(len, lines)) <= WIDTH and lines[0].startswith("findings  word")
    assert all(line.startswith(" " * 10 + "word") for line in lines[1:])


def test_every_legend_fits_the_terminal():
    lines = legend(*LEGENDS)
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("[..]      ")
    assert "kappa at matched confidence" in LEGENDS["kappa*"]


def test_cells():
    assert percent(Estimate.share(50, 100)) == "50.0 [40.4, 59.6]"
    assert points(PairedDifference(0.65, 0.545, 0.68, 0, 13, 20, 0.1)) == "+65.0 [+54.5, +68.0]"
    assert [f(None) for f in (points, number, ratio)] == ["-", "-", "-"]
    assert (number(0.12345), ratio(2.5)) == ("0.123", "2.50x")
    assert number(Estimate.exact(1234.5, 3)) == "1.23e+03"
    assert with_error(2.0, math.nan) == "2" and with_error(2.0, 0.3) == "2.00 ± 0.30"


@dataclass
class Thing:
    schema: int
    size: float


ADAPTER = TypeAdapter(Thing)


def test_json_reads_back_and_is_checked_in_one_line(tmp_path):
    file = tmp_path / "thing.json"
    for indent in (None, 1):
        write_json(file, Thing(2, 0.5), ADAPTER, indent=indent)
        assert read_json(file, ADAPTER, what="a thing", schema=2) == Thing(2, 0.5)
    write_json(file, {"schema": 2, "size": 0.5}, indent=None)
    assert file.read_text() == '{"schema":2,"size":0.5}\n'
    for text, message in (
        ('{"schema": 2', "thing.json: not JSON: "),
        ('{"schema": 1, "size": 0.5}', "thing.json: expected schema 2, got 1"),
        ("[]", "thing.json: expected schema 2, got None"),
        ('{"schema": 2, "size": "x"}', "thing.json: not a thing: size: "),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_json(file, ADAPTER, what="a thing", schema=2)
        assert "\n" not in str(error.value)
