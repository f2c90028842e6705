"""Figure of an adaptive check: the margin around samples that survived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from flatreg.evaluation.adaptive import AdaptiveAttackCheck, Slice
from flatreg.report.figures.style import COLORS, INK, panels, styled

_MOST = 4  # panels that still can be read side by side
_WRONG_TO_RIGHT = LinearSegmentedColormap.from_list("margin", [COLORS[4], "#ffffff", COLORS[2]])


@styled
def margin_slices(adaptive_check: AdaptiveAttackCheck) -> Figure:
    """Margin over the planes around up to four survivors, on one scale.

    Lines are where the label flips, and where the ball ends.

    Raises:
        ValueError: the check holds no slice.
    """
    slices = adaptive_check.slices[:_MOST]
    if not slices:
        raise ValueError("expected an adaptive check with slices, got none: no sample survived")
    size = (1.1 + 2.7 * len(slices), 3.1)
    figure, (line,) = panels(1, len(slices), size, constrained=True, sharex=True, sharey=True)
    # One far corner must not pale all the rest.
    limit = float(np.quantile(np.abs([s.margin for s in slices]), 0.98)) or 1.0
    for axes, drawn in zip(line, slices, strict=True):
        filled = _panel(axes, drawn, limit, adaptive_check.eps)
        axes.set_title(f"image {drawn.index}, class {drawn.label}")
    line[0].set_ylabel("random step / eps")
    figure.supxlabel("step down the margin's gradient / eps", fontsize=10)
    bar = figure.colorbar(filled, ax=line, shrink=0.9, pad=0.01, aspect=25, ticks=MaxNLocator(7))
    bar.set_label("margin (logits)")
    bar.outline.set_visible(False)
    figure.legend(
        handles=[
            Line2D([], [], color=INK, linewidth=1.6, label="the label flips"),
            Line2D([], [], color=INK, linewidth=1.0, linestyle="--", label="end of the ball"),
            Line2D([], [], color=INK, marker="+", linestyle="", label="the image"),
        ],
        loc="outside upper center",
        ncols=3,
    )
    return figure


def _panel(axes: Axes, drawn: Slice, limit: float, eps: float) -> QuadContourSet:
    margins, levels = np.array(drawn.margin), np.linspace(-limit, limit, 21)
    filled = axes.contourf(
        drawn.axis, drawn.axis, margins.clip(-limit, limit), levels=levels, cmap=_WRONG_TO_RIGHT
    )
    _line(axes, drawn.axis, margins, 0.0, linewidths=1.6)
    _line(axes, drawn.axis, np.array(drawn.distance), eps, linewidths=1.0, linestyles="--")
    axes.plot(0, 0, "+", color=INK, markersize=7)
    axes.set(aspect="equal", xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2))
    axes.grid(False)
    return filled


def _line(
    axes: Axes, axis: Sequence[float], values: NDArray[np.float64], level: float, **style: Any
) -> None:
    """Draw a contour, where there is one: matplotlib warns where there is none."""
    if values.min() < level < values.max():
        axes.contour(axis, axis, values, levels=[level], colors=INK, **style)
