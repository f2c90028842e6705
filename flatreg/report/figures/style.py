"""What all figures share: style, colours, axes, bands, and how a figure is made and saved.

Figures are made without `pyplot`: no window is opened, no global state is kept, and nothing has to
be closed.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zlib import crc32

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from flatreg.data.files import replacing
from flatreg.measures.estimate import QuantileBand
from flatreg.report.rows import Row

# Grey, orange, green, violet, red, blue, light blue. They were searched so that any two differ also
# for people who do not see red, green or blue, and that each is seen on white and on black;
# tests/test_figures.py measures both.
COLORS = ["#6b7280", "#ed8703", "#22b771", "#8405fe", "#c7011f", "#2b62a5", "#6189ff"]
_METHODS = (  # the terms and wrappers of each colour but grey, which is that of the plain arm
    "NFGSM FGSMRS FGSMRSCS FGSMPGI LIET NUAT",
    "MarginBound",
    "RelativeFlatness LayerFlatness OffManifoldConfidence",
    "OffManifoldCurvature TRADES MART",
    "PGDAT APGDAT InputGradient GradAlign LocalLinearity JacobianNorm",
    "SAM ASAM RelativeSAM RandomSAM MomentumSAM StaleSAM FriendlySAM GSAM WSAM GNP LookSAM AWP",
)
_MARKERS, _DASHES = "osD^vPX", ("-", "--", ":", "-.")
OUTCOME_COLORS = {"right": COLORS[2], "wrong": COLORS[4], "attacked": COLORS[1]}
INK, GRID = "#111827", "#e5e7eb"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
    "svg.hashsalt": "flatreg",  # the same figure is the same file
    "pdf.fonttype": 42,  # TrueType, which journals ask for and editors of figures can edit
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


def save(figure: Figure, path: Path, bounds: Bbox | Literal["tight"] = "tight") -> None:
    """Write `figure` into the file `path`, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        date = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
        style: dict[str, Any] = {"metadata": {date: None}} if date else {}
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], bbox_inches=bounds, **style)


def save_formats(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG into `path`, and as SVG and PDF beside it, all in one layout."""
    with rc_context(STYLE):
        figure.draw_without_rendering()  # where the layout is found, which takes most of the time
        figure.set_layout_engine(None)  # kept as it is
        bounds = figure.get_tightbbox().padded(rcParams["savefig.pad_inches"])
    for suffix in (".png", ".svg", ".pdf"):
        save(figure, path.with_suffix(suffix), bounds)


def svg(figure: Figure) -> str:
    """The figure as SVG; its text is drawn as curves, so that it needs no font."""
    written = io.StringIO()
    with rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        style: dict[str, Any] = {"format": "svg", "transparent": True, "metadata": nothing}
        figure.savefig(written, bbox_inches="tight", **style)
    return written.getvalue()


class Mark(NamedTuple):
    """How an arm is drawn: its colour tells the method, marker and dashes tell arms of one colour.

    Attributes:
        color: of lines and points.
        marker: of points.
        dashes: of lines.
    """

    color: str
    marker: str
    dashes: str


def marks(rows: Iterable[Row]) -> list[Mark]:
    """The mark of each arm of a figure: grey for the plain ones, one colour for a method."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        parts = [*row.added, row.criterion]
        kinds = [kind for part in parts if (kind := str(part.get("kind", ""))) != "CrossEntropy"]
        plain = row.name == "plain"
        color = COLORS[0] if plain else kind_color((*filter(None, kinds), row.name)[0])
        number, seen[color] = seen[color], seen[color] + 1
        marker, dashes = _MARKERS[number % len(_MARKERS)], _DASHES[number % len(_DASHES)]
        found.append(Mark(color, marker, dashes))
    return found


def kind_color(kind: str) -> str:
    """The colour of a criterion, penalty or wrapper: in every figure the same one."""
    if kind == "CrossEntropy":
        return COLORS[0]
    for color, kinds in zip(COLORS[1:], _METHODS, strict=True):
        if kind in kinds.split():
            return color
    return COLORS[1 + crc32(ascii(kind).encode()) % (len(COLORS) - 1)]


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend of `axes` below everything, in as many columns as fit the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        widest = 0.5 + 0.08 * max(map(len, labels))  # in inches, at 10 points
        columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def draw_range(
    axes: Axes,
    at: Sequence[float],
    ends: tuple[Sequence[float], Sequence[float]],
    middle: Sequence[float],
    color: str,
    label: str | None = None,
    line: str = "-",
    marker: str = "",
) -> None:
    """Draw `middle` as a line, and what lies between `ends`, the lower and the upper, as a band."""
    axes.fill_between(at, *ends, color=color, alpha=0.15, linewidth=0)
    style: dict[str, Any] = {"color": color, "linestyle": line, "marker": marker, "markersize": 4}
    axes.plot(at, middle, label=label, **style)


def draw_band(
    axes: Axes, band: QuantileBand, color: str, label: str | None = None, line: str = "-"
) -> None:
    """Draw the median as a line and the quartiles as a band."""
    draw_range(axes, band.offsets, (band.lower, band.upper), band.median, color, label, line)


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
