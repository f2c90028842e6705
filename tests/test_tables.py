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
    Column,
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

COLUMNS = [Column("arm", 8, left=True), Column("n", 4), Column("kappa*", 9)]


def test_a_terminal_table_is_aligned_and_cut():
    lines = terminal(COLUMNS, [["plain", "20", "3.1"], ["a-long-name", "7", "-"]], indent=2)
    assert lines == [
        "  arm        n   kappa*",
        "  plain     20      3.1",
        "  a-long-    7        -",
    ]
    assert len(terminal(COLUMNS, [["x", "y" * 200]])[1]) == WIDTH


def test_a_short_row_says_its_last_cell_in_full():
    assert terminal(COLUMNS, [["3", "failed: the loss is nan"]])[1] == (
        "3         failed: the loss is nan"
    )
    assert terminal(COLUMNS, [[".. and 12 layers more"]])[1] == ".. and 12 layers more"


def test_a_table_without_heads_has_no_line_of_heads():
    assert terminal([Column("", 4), Column("", 4)], [["1", "2"]]) == ["   1   2"]


def test_markdown_escapes_stars_in_heads_and_legends_only():
    assert markdown(COLUMNS, [["**a**", "1", "2"]]).split("\n") == [
        "| arm | n | kappa\\* |",
        "|---|---:|---:|",
        "| **a** | 1 | 2 |",
    ]
    assert bullets({"kappa*": "as kappa*"}) == ["- kappa\\*: as kappa\\*."]


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
    assert points(PairedDifference(0.65, 0.545, 0.68, 0, 9, 0.1)) == "+65.0 [+54.5, +68.0]"
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
