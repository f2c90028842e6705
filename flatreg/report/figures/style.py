"""What all figures share: style, colours, axes, bands, and how a figure is made and saved.

Figures are made without `pyplot`: no window is opened, no global state is kept, and nothing has to
be closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from flatreg.measures.estimate import QuantileBand

COLORS = ["#6b7280", "#d97706", "#0f766e", "#7c3aed", "#be123c", "#1d4ed8"]
OUTCOME_COLORS = {"right": COLORS[2], "wrong": COLORS[4], "attacked": COLORS[1]}
INK = "#111827"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
}
styled = rc_context(STYLE)  # decorates a function that makes a figure


def new_figure(width: float, height: float, *, constrained: bool = False) -> Figure:
    """An empty figure, in inches; where `constrained`, panels and legends do not overlap."""
    figure = Figure(figsize=(width, height), layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)  # the sizes of texts are asked for before the figure is saved
    return figure


def panels(
    rows: int, columns: int, size: tuple[float, float], *, constrained: bool = False, **shared: Any
) -> tuple[Figure, NDArray[Any]]:
    """A figure of `size` inches and its axes `(rows, columns)`; `shared` as in `subplots`."""
    figure = new_figure(*size, constrained=constrained)
    axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write `figure` into the file `path`, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(path, bbox_inches="tight")


def arm_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm of a report: grey for the plain one, the others in their order."""
    others = [name for name in names if name != "plain"]
    rest = {name: COLORS[1 + i % (len(COLORS) - 1)] for i, name in enumerate(others)}
    return {"plain": COLORS[0], **rest}


def draw_range(
    axes: Axes,
    at: Sequence[float],
    ends: tuple[Sequence[float], Sequence[float]],
    middle: Sequence[float],
    color: str,
    label: str | None = None,
    line: str = "-",
) -> None:
    """Draw `middle` as a line, and what lies between `ends`, the lower and the upper, as a band."""
    axes.fill_between(at, *ends, color=color, alpha=0.18, linewidth=0)
    axes.plot(at, middle, line, color=color, markersize=4, label=label)


def draw_band(axes: Axes, band: QuantileBand, color: str, label: str | None = None) -> None:
    """Draw the median as a line and the quartiles as a band."""
    draw_range(axes, band.offsets, (band.lower, band.upper), band.median, color, label)


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, and at least a decade long: small changes stay small."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    if high < 1000 * low:
        plain_ticks(axes.yaxis)


def plain_ticks(axis: Axis) -> None:
    """Label a short logarithmic axis with plain numbers: powers of ten leave one tick or two."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
