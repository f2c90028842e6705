"""Figure of a table of results: what attacked accuracy costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

from flatreg.report.figures.style import COLORS, INK, panels, styled
from flatreg.report.rows import Group, Section
from flatreg.report.tables import figure_text

# Where a label may go, in points from its mark: the first place that is free is taken.
_PLACES = [
    (dx, dy)
    for distance in (0, 9, 18, 27, 40, 60, 85)
    for dx, dy in ((7, 5 + distance), (7, -5 - distance), (-7, 5 + distance), (-7, -5 - distance))
]
_Point = tuple[float, float]


@styled
def pareto(sections: Sequence[Section]) -> Figure:
    """Attacked accuracy against training time, a panel a section.

    A point is an arm, its mean where there are several seeds. Bars are Wilson 95% intervals, of
    several seeds the least and the greatest. The stairs are the greatest accuracy within that time.
    """
    across = 1 if len(sections) < 4 else 2
    down = -(-len(sections) // across)
    figure, grid = panels(down, across, (8.6 * across, 5.6 * down), constrained=True)
    for axes in [*grid.flat][len(sections) :]:
        axes.set_visible(False)
    for axes, section in zip(grid.flat, sections, strict=False):
        _draw(axes, section)
    figure.canvas.draw()  # sizes of text are known from here on
    for axes, section in zip(grid.flat, sections, strict=False):
        _label(axes, _placed(section), _names(section))
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


def _placed(section: Section) -> list[tuple[_Point, Group]]:
    """The groups that have a plain arm to take the time of, at (time, attacked %)."""
    return [
        ((group.cost, 100 * group.attacked), group)
        for group in section.groups
        if group.cost is not None
    ]


def _names(section: Section) -> dict[str, str]:
    """Labels of the groups but the plain ones; with the number of epochs where that differs."""
    lengths = len({group.epochs for group in section.groups})
    return {
        group.name: group.method + (f", {group.epochs} epochs" if lengths > 1 else "")
        for group in section.groups
        if group.arm != "plain"
    }


def _draw(axes: Axes, section: Section) -> None:
    placed = _placed(section)
    front = pareto_front([point for point, _ in placed])
    if front:  # until a costlier arm is better, no more is to be had
        steps = zip(*(placed[i][0] for i in front), strict=True)
        axes.step(*steps, where="post", color=COLORS[2], alpha=0.5, zorder=1)
    labels = {COLORS[0]: "plain", COLORS[2]: "on the front", COLORS[1]: "not on it"}
    for number, ((time, attacked), group) in enumerate(placed):
        low, high = (100 * value for value in group.spread)
        ends = [[max(0.0, attacked - low)], [max(0.0, high - attacked)]]
        color = COLORS[0] if group.arm == "plain" else COLORS[2 if number in front else 1]
        style: dict[str, Any] = {"fmt": "o", "markersize": 5, "capsize": 2.5, "elinewidth": 0.9}
        label = labels.pop(color, None)
        axes.errorbar(time, attacked, yerr=ends, color=color, zorder=2, label=label, **style)
    times = [time for (time, _), _ in placed] or [1.0]
    highest = max([100 * group.spread[1] for _, group in placed], default=100.0)
    axes.set(title=figure_text(section.title), ylabel="attacked accuracy %", xscale="log")
    axes.set_ylim(-6, min(102.0, 1.35 * highest + 8))
    axes.set_xlim(min(times) / 1.3, max(times) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    missing = [group.name for group in section.groups if group.cost is None]
    note = (
        f"\n(no plain arm of the same model: {figure_text(', '.join(missing))})" if missing else ""
    )
    axes.set_xlabel(f"training time, in epochs of the plain arm{note}")
    if placed:
        axes.legend(loc="upper left", fontsize=8, ncols=3)


def _label(axes: Axes, placed: Sequence[tuple[_Point, Group]], names: Mapping[str, str]) -> None:
    """Name the marks: each at the first place where it covers least of what is drawn."""
    taken = [box for point, group in placed for box in _mark(axes, point, group)]
    taken += _stairs(axes, [point for point, _ in placed])
    legend, frame = axes.get_legend(), axes.get_window_extent()
    taken += [legend.get_window_extent()] if legend else []
    for point, group in sorted(placed, key=lambda item: -item[0][1]):
        if group.name not in names:
            continue
        name, boxes = names[group.name], []
        for place in _PLACES:
            tried = _annotated(axes, name, point, place)
            boxes.append(Bbox(tried.get_window_extent().get_points()))
            tried.remove()
        costs = [
            sum(_overlap(box, other) for other in taken)
            + box.width * box.height
            - _overlap(box, frame)
            for box in boxes
        ]
        best = next((i for i, cost in enumerate(costs) if cost < 1), costs.index(min(costs)))
        taken.append(boxes[best])
        _annotated(axes, name, point, _PLACES[best], line=abs(_PLACES[best][1]) > 6)


def _annotated(
    axes: Axes, name: str, point: _Point, place: tuple[int, int], line: bool = False
) -> Annotation:
    arrow = {"arrowstyle": "-", "color": COLORS[0], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": INK}
    style |= {"va": "center", "ha": "left" if place[0] > 0 else "right"}
    return axes.annotate(
        figure_text(name), point, place, arrowprops=arrow if line else None, **style
    )


def _mark(axes: Axes, point: _Point, group: Group) -> list[Bbox]:
    """Where the dot and the bar of a group are, in pixels."""
    low, high = (100 * value for value in group.spread)
    (x, y), (_, bottom), (_, top) = axes.transData.transform(
        [point, (point[0], low), (point[0], high)]
    )
    return [Bbox([[x - 5, y - 5], [x + 5, y + 5]]), Bbox([[x - 3, bottom], [x + 3, top]])]


def _stairs(axes: Axes, points: Sequence[_Point]) -> list[Bbox]:
    """Where the line of the front is, in pixels."""
    ends = [points[i] for i in pareto_front(points)]
    corners = [(later[0], one[1]) for one, later in pairwise(ends)]
    boxes = []
    for start, corner, end in zip(ends, corners, ends[1:], strict=False):
        for one, other in ((start, corner), (corner, end)):
            (left, bottom), (right, top) = axes.transData.transform([one, other])
            boxes.append(Bbox([[left, bottom - 1], [right + 1, top + 1]]))
    return boxes


def _overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    shared = Bbox.intersection(one, other)
    return float(shared.width * shared.height) if shared is not None else 0.0
