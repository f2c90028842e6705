"""Figure of attack paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from flatreg.evaluation.attack_path import AttackPath, aligned_bands
from flatreg.measures.estimate import QuantileBand
from flatreg.report.figures.style import COLORS, STYLE

WINDOW = 12  # steps drawn on either side of the flip
INK = "#111827"
TITLES = {
    "kappa": "kappa\n(larger = sharper)",
    "matched kappa": "kappa at matched\nconfidence",
    "confidence": "confidence",
    "loss": "cross-entropy of\nthe true label",
}
_COLORS = dict(zip(TITLES, (COLORS[4], COLORS[5], COLORS[2], COLORS[1]), strict=True))


def draw_path(path: AttackPath | Mapping[str, AttackPath], file: Path) -> None:
    """Draw the geometry along one attack, or along several by name, into `file`.

    Each has two columns of panels, aligned by step (all samples classified right when clean) and
    at the flip of the label (those that flip): median and quartiles of kappa as it is and at
    matched confidence, of the confidence, and of the loss. A dashed line is the (median) flip, the
    grey span has half of the flips.
    """
    paths = path if isinstance(path, Mapping) else {"": path}
    with plt.rc_context(STYLE):
        figure = path_figure(paths)
        figure.savefig(file, bbox_inches="tight")
        plt.close(figure)


def path_figure(paths: Mapping[str, AttackPath]) -> Figure:
    """Figure of `draw_path`."""
    figure = plt.figure(figsize=(5.6 * len(paths), 7.6), layout="constrained")
    blocks = figure.subfigures(1, len(paths), squeeze=False, wspace=0.04)[0]
    for block, (name, path) in zip(blocks, paths.items(), strict=True):
        _draw_block(block, path)
        block.suptitle(name, x=0.02, ha="left", fontweight="bold")
    return figure


def _draw_block(block: SubFigure, path: AttackPath) -> None:
    """Both alignments of one attack, side by side, a row for each quantity."""
    bands = aligned_bands(path, WINDOW)
    shown = [name for name in TITLES if name in bands.by_step or name in bands.by_flip]
    panels = block.subplots(len(shown), 2, sharex="col", sharey="row", squeeze=False)
    for axes in panels.flat:
        axes.margins(x=0)
    for column, aligned in zip(panels.T, (bands.by_step, bands.by_flip), strict=True):
        for axes, quantity in zip(column, shown, strict=True):
            if quantity in aligned:
                draw_band(axes, aligned[quantity], _COLORS[quantity])
    for axes, quantity in zip(panels[:, 0], shown, strict=True):
        axes.set_ylabel(TITLES[quantity])
        if "kappa" in quantity:
            log_axis(axes)
    _mark_flips(panels[:, 0], path)
    for axes in panels[:, 1]:
        axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        axes.xaxis.set_major_locator(MultipleLocator(5))
    right = int((path.flip != 0).sum())
    panels[0, 0].set_title(f"by step (n = {right})")
    panels[0, 1].set_title(f"at the flip (n = {bands.flipped})")
    panels[-1, 0].set_xlabel("step of the attack")
    panels[-1, 1].set_xlabel("steps from the flip")
    block.align_ylabels()


def draw_band(axes: Axes, band: QuantileBand, color: str, label: str | None = None) -> None:
    """Draw the median as a line and the quartiles as a band."""
    axes.fill_between(band.offsets, band.lower, band.upper, color=color, alpha=0.18, linewidth=0)
    axes.plot(band.offsets, band.median, color=color, label=label)


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic; at least a decade long, so that what hardly moves looks flat."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    if high < 1000 * low:  # a power of ten alone would leave one tick or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_flips(column: Iterable[Axes], path: AttackPath) -> None:
    """Where half of the flips fall, and their median."""
    flips = path.flip[path.flip > 0].double()
    if not len(flips):
        return
    lower, median, upper = flips.quantile(flips.new_tensor([0.25, 0.5, 0.75])).tolist()
    for axes in column:
        axes.axvspan(lower, upper, color=INK, alpha=0.07, linewidth=0)
        axes.axvline(median, color=INK, linestyle="--", linewidth=0.8)
