"""Figures of a table of results: what attacked accuracy costs, and what geometry goes with it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import NDArray

from flatreg.data.text import counted
from flatreg.report.figures.style import COLORS, INK, marks, panels, styled
from flatreg.report.rows import Row
from flatreg.report.sections import Group, Section
from flatreg.report.tables import figure_text

Against = Literal["time", "clean", "kappa", "curvature"]

_GEOMETRY = {
    "kappa": "kappa* of the clean images: right is sharper",
    "curvature": "Gauss-Newton trace* off the manifold: right is more curved",
}

# Where a label may go, in points from its mark: the first place that is free is taken.
_PLACES = [(9, 0), (-9, 0)] + [
    (dx, dy)
    for distance in (6, 16, 26, 36, 50, 70, 95)
    for aside in (7, 30)
    for dx, dy in itertools.product((aside, -aside), (distance, -distance))
]
_Point = tuple[float, float]
_Box = NDArray[Any]


@styled
def attacked_against(
    sections: Sequence[Section], against: Against = "time", width: float = 8.6
) -> Figure:
    """Attacked accuracy against a cost, or against geometry; a panel a section.

    A cost is training time or clean accuracy, geometry is kappa or curvature at matched confidence.
    A point is an arm, its mean where there are several seeds; its colour tells the method. Bars are
    Wilson 95% intervals, of several seeds the least and the greatest. Against a cost, a point is
    filled where no other arm is better in both, and the stairs are the greatest accuracy to be had
    at that cost. Attacked accuracy begins at 0 where an arm has less than half of the best. A
    section where nothing is known has no panel, if another has one.
    """
    sections = [section for section in sections if _placed(section, against)] or sections
    heights = [2.8 + 0.13 * min(30, len(section.groups)) for section in sections]
    ratios = {"gridspec_kw": {"height_ratios": heights}}
    figure, grid = panels(len(sections), 1, (width, sum(heights)), constrained=True, **ratios)
    for axes, section in zip(grid.flat, sections, strict=True):
        _draw(axes, section, against)
    key: dict[str, dict[str, Any]] = {}
    if any(group.arm == "plain" for section in sections for group in section.groups):
        key["plain arm"] = {"color": COLORS[0], "marker": "o", "linestyle": ""}
    if against not in _GEOMETRY:
        key |= {
            "filled: no arm is better in both": {"color": INK, "marker": "o", "linestyle": ""},
            "the best to be had at that cost": {"color": INK, "alpha": 0.35, "linewidth": 1},
        }
    lines = [Line2D([], [], label=label, **style) for label, style in key.items()]
    columns = len(lines) if width > 8 else 1
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=9)
    figure.canvas.draw()  # sizes of text are known from here on
    figure.set_layout_engine("none")  # names must not move the panels that they were placed in
    for axes, section in zip(grid.flat, sections, strict=True):
        _label(axes, _placed(section, against), _names(section), against)
    return figure


def pareto_front(points: Sequence[_Point]) -> list[int]:
    """Positions of the points (cost, gain) that none beats in both, by cost.

    >>> pareto_front([(2.0, 0.5), (1.0, 0.1), (3.0, 0.4), (1.0, 0.2)])
    [3, 0]
    """
    front: list[int] = []
    for at in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front


def _placed(section: Section, against: Against) -> list[tuple[_Point, Group]]:
    """The groups of which it is known at (what it is against, attacked %)."""
    places = [_place(group, against) for group in section.groups]
    return [
        ((at, 100 * group.attacked), group)
        for at, group in zip(places, section.groups, strict=True)
        if at is not None
    ]


def _place(group: Group, against: Against) -> float | None:
    """Mean over seeds; None for a time without a plain arm, for geometry not known or zero."""
    if against == "time":
        return group.cost
    if against == "clean":
        return 100 * mean(row.evaluation.clean.value for row in group.rows)
    of = Row.kappa if against == "kappa" else Row.gauss_newton_trace
    found = [of(row, matched=True) for row in group.rows]
    values = [estimate.value for estimate in found if estimate and estimate.value > 0]
    return mean(values) if len(values) == len(found) else None


def _front(points: Sequence[_Point], against: Against) -> list[int]:
    """`pareto_front`, whether the cost is paid or what is left; geometry has none."""
    if against in _GEOMETRY:
        return []
    sign = 1 if against == "time" else -1
    return pareto_front([(sign * at, gain) for at, gain in points])


def _usual_epochs(section: Section) -> int:
    return Counter(group.epochs for group in section.groups).most_common(1)[0][0]


def _names(section: Section) -> dict[str, str]:
    """Labels of the groups but the plain ones; with an unusual number of epochs.

    Of two that would have one label, the other ends with what its recipe's name has besides.
    """
    usual = _usual_epochs(section)
    names = {
        group.name: group.method
        + (f", {counted(group.epochs, 'epoch')}" if group.epochs != usual else "")
        for group in section.groups
        if group.arm != "plain"
    }
    for label in [label for label, times in Counter(names.values()).items() if times > 1]:
        recipes = {name: name.rpartition(" / ")[0] for name, one in names.items() if one == label}
        shortest = min(recipes.values(), key=len)
        own = {name: recipe.removeprefix(shortest) for name, recipe in recipes.items()}
        names |= {name: f"{label}, {one.strip('_')}" for name, one in own.items() if one}
    return names


def _draw(axes: Axes, section: Section, against: Against) -> None:
    placed = _placed(section, against)
    front = _front([point for point, _ in placed], against)
    if front:  # until a costlier arm is better, no more is to be had
        steps = zip(*(placed[i][0] for i in front), strict=True)
        axes.step(*steps, where="post", color=INK, alpha=0.35, linewidth=1, zorder=1)
    drawn = dict(
        zip(map(id, section.groups), marks(g.rows[0] for g in section.groups), strict=True)
    )
    for number, ((at, attacked), group) in enumerate(placed):
        mark = drawn[id(group)]
        low, high = (100 * value for value in group.spread)
        ends = [[max(0.0, attacked - low)], [max(0.0, high - attacked)]]
        style: dict[str, Any] = {"markersize": 6, "capsize": 2.5, "elinewidth": 0.9, "zorder": 2}
        style |= {"color": mark.color, "fmt": mark.marker}
        if number not in front and against not in _GEOMETRY:
            style["markerfacecolor"] = "none"
        axes.errorbar(at, attacked, yerr=ends, **style)
    lowest = min([100 * group.spread[0] for _, group in placed], default=0.0)
    highest = max([100 * group.spread[1] for _, group in placed], default=100.0)
    axes.set(title=figure_text(section.title), ylabel="attacked accuracy %")
    axes.set_ylim(-6, min(104.0, 1.2 * highest + 8))
    if lowest > highest / 2:  # robust arms alone: from 0 on they would lie in a line
        room = 0.3 * max(2.0, highest - lowest)
        axes.set_ylim(lowest - room, min(104.0, highest + room))
    missing = [group.name for group in section.groups if group not in [g for _, g in placed]]
    why = "no plain arm of the same model" if against == "time" else "not measured, or 0"
    note = f"\n({why}: {figure_text(', '.join(missing), 60)})" if missing else ""
    places = [at for (at, _), _ in placed] or [1.0]
    if against == "clean":
        room = 0.3 * max(2.0, max(places) - min(places))
        axes.set_xlim(min(places) - room, max(places) + room)
        axes.set_xlabel("clean accuracy %")
        return
    axes.set_xscale("log")
    axes.set_xlim(min(places) / 1.3, max(places) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    usual = f"; {counted(_usual_epochs(section), 'epoch')} where a name says no other"
    lengths = len({group.epochs for group in section.groups})
    time = f"training time, in epochs of the plain arm{usual if lengths > 1 else ''}"
    axes.set_xlabel(_GEOMETRY.get(against, time) + note)


def _label(
    axes: Axes, placed: Sequence[tuple[_Point, Group]], names: Mapping[str, str], against: Against
) -> None:
    """Name the marks: each at the first place where it covers least of what is drawn.

    A box is (left, bottom, right, top) in pixels.
    """
    written: list[_Box] = []  # by names, which must not lie over each other at all
    taken = [box for point, group in placed for box in _mark(axes, point, group)]
    taken += _stairs(axes, [point for point, _ in placed], against)
    frame = [np.array(axes.get_window_extent().extents)]
    for point, group in sorted(placed, key=lambda item: -item[0][1]):
        if group.name not in names:
            continue
        name, at = names[group.name], axes.transData.transform(point)
        boxes = _boxes(_annotated(axes, name, point, (0, 0)), at, axes.figure.dpi / 72)
        outside = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - _overlap(boxes, frame)
        ends = boxes.reshape(-1, 2, 2).mean(1)
        spots = [at + share * (ends - at) for share in np.linspace(0.2, 0.8, 7)]
        line = [np.concatenate([spot - 2, spot + 2], axis=1) for spot in spots]
        crossed = sum(_overlap(part, written) for part in line)  # names under the line to the mark
        costs = _overlap(boxes, taken) + 100 * (_overlap(boxes, written) + crossed) + outside
        best = int(np.argmax(costs < 1) if (costs < 1).any() else np.argmin(costs))
        written.append(boxes[best] + [-6, -2, 6, 2])  # the room between two names
        led = max(abs(_PLACES[best][0]) - 3, abs(_PLACES[best][1])) > 6
        _annotated(axes, name, point, _PLACES[best], line=led)
        if led:  # later names keep off the line, too
            taken += [part[best] for part in line]


def _boxes(tried: Annotation, at: NDArray[Any], dots: float) -> NDArray[Any]:
    """Where a name would be at each of `_PLACES` from a mark; `dots` are the pixels of a point."""
    extent, places = tried.get_window_extent(), np.array(_PLACES)
    size = np.array([extent.width, extent.height])
    tried.remove()
    share = np.stack([places[:, 0] < 0, np.full(len(places), 0.5)], axis=1)  # left and below it
    corners = at + dots * places - share * size
    return np.concatenate([corners, corners + size], axis=1)


def _overlap(boxes: NDArray[Any], others: Sequence[_Box]) -> NDArray[Any]:
    """Area that each box shares with the others, in square pixels."""
    two = np.reshape(others, (-1, 4))[None]
    one = boxes[:, None]
    sides = np.minimum(one, two)[..., 2:] - np.maximum(one, two)[..., :2]
    area: NDArray[Any] = sides.clip(0).prod(-1).sum(-1)
    return area


def _annotated(
    axes: Axes, name: str, point: _Point, place: tuple[int, int], line: bool = False
) -> Annotation:
    arrow = {"arrowstyle": "-", "color": COLORS[0], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": INK}
    style |= {"va": "center", "ha": "left" if place[0] > 0 else "right"}
    return axes.annotate(
        figure_text(name, 40), point, place, arrowprops=arrow if line else None, **style
    )


def _mark(axes: Axes, point: _Point, group: Group) -> list[_Box]:
    """Where the dot and the bar of a group are."""
    ends = [(point[0], 100 * value) for value in group.spread]
    (x, y), (_, bottom), (_, top) = axes.transData.transform([point, *ends])
    return [np.array([x - 5, y - 5, x + 5, y + 5]), np.array([x - 3, bottom, x + 3, top])]


def _stairs(axes: Axes, points: Sequence[_Point], against: Against) -> list[_Box]:
    """Where the line of the front is."""
    ends = [points[i] for i in _front(points, against)]
    corners = [(later[0], one[1]) for one, later in itertools.pairwise(ends)]
    boxes = []
    for start, corner, end in zip(ends, corners, ends[1:], strict=False):
        for one, other in ((start, corner), (corner, end)):
            drawn = axes.transData.transform([one, other])
            boxes.append(np.concatenate([drawn.min(0) - 1, drawn.max(0) + 1]))
    return boxes
