"""Cells, tables, legends, and JSON files with a schema."""

import math
from dataclasses import dataclass

import pytest
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from flatreg.data.files import read_json, write_json
from flatreg.evaluation.compare import PairedDifference
from flatreg.measures.estimate import Estimate
from flatreg.report.tables import (
    LEGENDS,
    WIDTH,
    bullets,
    code,
    escaped,
    fenced,
    figure_text,
    legend,
    markdown,
    number,
    percent,
    pictures,
    points,
    ratio,
    strong,
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


def test_markdown_escapes_every_cell_that_is_not_markdown_already():
    assert markdown(HEADS, [[strong("a*"), "*1*", "2"]]).split("\n") == [
        "| arm | n | kappa\\* |",
        "|---|---:|---:|",
        "| **a\\*** | \\*1\\* | 2 |",
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a|b", r"a\|b"),
        ("a`b`c", r"a\`b\`c"),
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
        ("<!-- /table -->", r"\<!-- /table -->"),
        ("<javascript:x>", r"\<javascript:x>"),
        ("[x](javascript:alert(1))", r"[x\](javascript:alert(1))"),
        ("![x](http://a/b.png)", r"![x\](http://a/b.png)"),
        ("[x][1]", r"[x\][1]"),
        ("*a* _b_ c_d ~~e~~", r"\*a\* \_b\_ c_d \~\~e\~\~"),
        ("$x^2$", r"\$x^2\$"),
        ("&lt;b&gt; a & b", r"\&lt;b\&gt; a & b"),
        ("a\\", r"a\\"),
        ("a\n\n# b\r\nc", "a  # b c"),
        ("# a", r"\# a"),
        ("> a", r"\> a"),
        ("a\x1b[2Jb\x00", r"a\\x1b[2Jb\\x00"),
        ("a\u202eb\u2028c", r"a\\u202eb c"),
        ("50.0 [40.4, 59.6] p < 0.05", "50.0 [40.4, 59.6] p < 0.05"),
        ("-", "-"),
    ],
)
def test_names_mean_nothing_to_markdown_or_html(name, expected):
    assert escaped(name) == expected and escaped(escaped(name)) == expected
    (row,) = markdown(["a"], [[name]]).split("\n")[2:]
    assert row == f"| {expected} |"
    assert bullets({name: "is"}).startswith("- ") and "\n" not in bullets({name: "is"})
    assert pictures({"a b.png": name}).startswith(f"![{expected}](a%20b.png)\n\n")


def test_code_ends_where_it_should():
    assert code("a`b\nc") == "`a'b c`"
    assert fenced("a\n```\nb\x1b", "json") == "````json\na\n```\nb\\x1b\n````"


def test_names_mean_nothing_to_a_terminal():
    lines = terminal(["", "n"], [["a\x1b[31m\nb", "1"], ["c", "2"]])
    assert lines[1] == r"a\x1b[31m b  1" and lines[2].startswith("c ")
    assert wrapped("note", "a\x1b]0;x\x07") == [r"note      a\x1b]0;x\x07"]


def test_names_mean_nothing_to_a_figure():
    figure = Figure()
    axes = figure.subplots()
    for name in ("$x^2$", "$\\frac", "a$b", "$\\nosuchmacro{$"):
        title = axes.set_title(figure_text(name))
        figure.canvas.draw()
        assert title._preprocess_math(title.get_text()) == (name, False)
