"""Colours that can be told apart, one for each method; labels that do not lie over each other."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from flatreg.measures.estimate import Estimate
from flatreg.optimizers.methods import METHODS
from flatreg.report.figures import style
from flatreg.report.figures.attacked_against import Against, attacked_against
from flatreg.report.figures.report import (
    attack_path,
    attacked_accuracy,
    draw,
    monitored,
    training,
    was_monitored,
)
from flatreg.report.page import inline
from flatreg.report.rows import read_report
from flatreg.report.sections import read_runs, sections
from flatreg.terms import Criterion, Penalty

STORED = sorted((Path(__file__).parent.parent / "recipes" / "results").iterdir())
PAPERS = {"light": "#ffffff", "dark": "#14171c"}  # of flatreg/report/pages/page.html
# What people see who lack a kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(color):
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ rgb.clip(1e-3, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_any_two_colours_differ_for_everyone(eyes):
    found = {color: lab(np.array(SEEN[eyes]) @ linear(color)) for color in style.COLORS}
    near = [
        (one, other)
        for one, other in itertools.combinations(found, 2)
        if np.linalg.norm(found[one] - found[other]) < 18
    ]
    assert not near


@pytest.mark.parametrize("scheme", PAPERS)
def test_every_colour_is_seen_on_its_page(scheme):
    light = [float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (*style.COLORS, PAPERS[scheme])]
    *colors, paper = (value + 0.05 for value in light)
    assert all(max(color, paper) / min(color, paper) > 2.5 for color in colors)


def test_a_method_has_one_colour_whatever_stands_beside_it():
    by_method = {}
    for path in STORED:
        rows = read_report(path).rows
        found = style.marks(rows)
        assert len(set(found)) == len(rows)  # two arms of one figure differ
        for row, mark in zip(rows, found, strict=True):
            parts = [*row.penalties, *([row.wrapper] if row.wrapper else []), row.criterion]
            key = row.name == "plain" or tuple(part["kind"] for part in parts)
            assert by_method.setdefault(key, mark.color) == mark.color
            assert style.marks([row])[0].color == mark.color
    assert by_method[True] == style.COLORS[0] and len(set(by_method.values())) == 7


def test_listed_kinds_exist_and_others_have_a_colour_too():
    unions = [get_args(get_args(union)[0]) for union in (Criterion, Penalty)]
    kinds = [kind.__name__ for union in unions for kind in union]
    kinds += [method.__name__ for method in METHODS]
    listed = " ".join(style._METHODS).split()
    assert len(set(listed)) == len(listed) and set(listed) <= set(kinds)
    assert style.kind_color("CrossEntropy") == style.COLORS[0]
    for kind in set(kinds) - set(listed) - {"CrossEntropy"}:
        assert style.kind_color(kind) in style.COLORS[1:]


@pytest.mark.parametrize("against", get_args(Against))
def test_labels_of_all_stored_results_lie_apart(against):
    found = sections(read_runs(STORED))
    for width in (8.6, 5.8):
        figure = attacked_against(found, against, width)
        figure.canvas.draw()
        for axes in figure.axes:
            names = [text for text in axes.texts if isinstance(text, Annotation)]
            boxes = [Text.get_window_extent(text) for text in names]
            assert len(boxes) > 1
            assert len({text.get_text() for text in names}) == len(names), axes.get_title()
            pairs = itertools.combinations(zip(names, boxes, strict=True), 2)
            over = [
                (one.get_text(), other.get_text())
                for (one, a), (other, b) in pairs
                if (shared := Bbox.intersection(a, b)) and shared.width * shared.height > 1
            ]
            assert not over, (axes.get_title(), over)


def test_a_legend_of_many_long_names_takes_no_room_of_the_curves():
    row = read_report(STORED[0]).rows[1]
    arms = {f"{'a-long-name-' * 3}{i}": [replace(row, name=str(i))] for i in range(12)}
    heights = []
    for some in (dict(list(arms.items())[:1]), arms):
        figure = attacked_accuracy(some)
        figure.canvas.draw()
        (axes,) = figure.axes
        heights.append(axes.get_window_extent().height)
        assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())
    assert heights[1] > 0.85 * heights[0]


def test_figures_are_written_as_png_svg_and_pdf_and_are_the_same_each_time(tmp_path):
    report = read_report(STORED[0])
    for folder in ("a", "b"):
        captions = draw(report, tmp_path / folder)
    for name in captions:
        for suffix, end in ((".png", b""), (".svg", b"</svg>"), (".pdf", b"%%EOF")):
            one, two = ((tmp_path / f / name).with_suffix(suffix).read_bytes() for f in "ab")
            assert one == two and two.rstrip().endswith(end)


@pytest.mark.parametrize(
    "parts",
    [
        [{"A": 0.0}],
        [{"A": -1.0, "": 2.0}, {"A": -2.0, "": 3.0}],
        [{"A": math.nan}],
        [{}],
        [{"A": 1}] * 2,
    ],
)
def test_parts_of_the_loss_may_be_zero_negative_or_missing(tmp_path, parts):
    row = read_report(STORED[0]).rows[0]
    history = [replace(row.history[0], epoch=i, parts=part) for i, part in enumerate(parts)]
    figure = training([replace(row, history=history)])
    style.save(figure, tmp_path / "a.png")  # a warning of matplotlib is an error here
    (axes,) = figure.axes
    assert len(axes.lines) == len(parts[0]) and axes.get_yscale() in ("log", "symlog")
    assert axes.get_yscale() == "log" or any(v <= 0 for part in parts for v in part.values())


def test_the_accuracy_of_monitored_epochs_is_drawn_and_the_best_one_has_a_ring():
    row, values = read_report(STORED[0]).rows[0], [(0.2, 0.3), None, (0.6, 0.5), (0.4, 0.9)]
    history = [
        replace(
            row.history[0],
            epoch=epoch,
            monitored=two and Estimate.share(round(20 * two[0]), 20),
            fgsm=two and Estimate.share(round(20 * two[1]), 20),
        )
        for epoch, two in enumerate(values)
    ]
    rows = [replace(row, history=history), replace(row, name="another", history=[])]
    for number, axes in enumerate(monitored(rows).axes):
        line, ring = axes.lines
        assert line.get_xdata().tolist() == [1, 3, 4]
        assert line.get_ydata() == pytest.approx([100 * two[number] for two in values if two])
        assert ring.get_xydata() == pytest.approx(np.array([[3, 100 * values[2][number]]]))
    assert was_monitored(rows) and not was_monitored(rows[1:])
    assert len(monitored(rows, ["fgsm"]).axes) == 1


@pytest.mark.parametrize("make", [training, attack_path])
def test_a_figure_of_a_page_takes_its_colours_and_its_ids(make):
    text = str(inline(make(read_report(STORED[-1]).rows), "what <b> it shows"))
    assert 'aria-label="what &lt;b&gt; it shows"' in text and "<style" not in text
    assert style.INK not in text and "var(--ink)" in text
    ids = re.findall(r' id="([^"]*)"', text)
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', text)
    assert len(set(ids)) == len(ids) and set(used) <= set(ids)
