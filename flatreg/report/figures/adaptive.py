"""Figure of a scrutiny: the loss around samples that survived."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from flatreg.evaluation.adaptive import AdaptiveAttackCheck, Slice
from flatreg.report.figures.style import COLORS, STYLE

_MOST = 4  # panels that still can be read side by side
_INK = "#111827"
_WRONG_TO_RIGHT = LinearSegmentedColormap.from_list("margin", [COLORS[4], "#ffffff", COLORS[2]])


def draw_slice(adaptive_check: AdaptiveAttackCheck, file: Path) -> None:
    """Draw the margin around up to four samples of `scrutiny` into `file`.

    Raises:
        ValueError: it holds no slice.
    """
    if not adaptive_check.slices:
        raise ValueError("expected a scrutiny with slices, got none: no sample survived")
    with plt.rc_context(STYLE):
        figure = margin_slices(adaptive_check)
        figure.savefig(file, bbox_inches="tight")
        plt.close(figure)


def margin_slices(adaptive_check: AdaptiveAttackCheck) -> Figure:
    """Margin over the planes, on one scale; where the label flips, and where the ball ends."""
    slices = adaptive_check.slices[:_MOST]
    figure, panels = plt.subplots(
        1,
        len(slices),
        figsize=(1.1 + 2.7 * len(slices), 3.1),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # One far corner must not pale all the rest.
    limit = float(np.quantile(np.abs([s.margin for s in slices]), 0.98)) or 1.0
    for axes, drawn in zip(panels[0], slices, strict=True):
        filled = _panel(axes, drawn, limit, adaptive_check.eps)
        axes.set_title(f"image {drawn.index}, class {drawn.label}")
    panels[0][0].set_ylabel("random step / eps")
    figure.supxlabel("step down the margin's gradient / eps", fontsize=10)
    bar = figure.colorbar(
        filled, ax=panels[0], shrink=0.9, pad=0.01, aspect=25, ticks=MaxNLocator(7)
    )
    bar.set_label("margin (logits)")
    bar.outline.set_visible(False)
    figure.legend(
        handles=[
            Line2D([], [], color=_INK, linewidth=1.6, label="the label flips"),
            Line2D([], [], color=_INK, linewidth=1.0, linestyle="--", label="end of the ball"),
            Line2D([], [], color=_INK, marker="+", linestyle="", label="the image"),
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
    axes.plot(0, 0, "+", color=_INK, markersize=7)
    axes.set(aspect="equal", xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2))
    axes.grid(False)
    return filled


def _line(
    axes: Axes, axis: Sequence[float], values: NDArray[np.float64], level: float, **style: Any
) -> None:
    """Draw a contour, where there is one: matplotlib warns where there is none."""
    if values.min() < level < values.max():
        axes.contour(axis, axis, values, levels=[level], colors=_INK, **style)
