"""Figure of attack paths."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MultipleLocator

from flatreg.evaluation.attack_path import AttackPath, aligned_bands
from flatreg.report.figures.style import COLORS, INK, draw_band, log_axis, new_figure, styled

WINDOW = 12  # steps drawn on either side of the flip
TITLES = {
    "kappa": "kappa\n(larger = sharper)",
    "matched kappa": "kappa at matched\nconfidence",
    "confidence": "confidence",
    "loss": "cross-entropy of\nthe true label",
}
_COLORS = dict(zip(TITLES, (COLORS[4], COLORS[5], COLORS[2], COLORS[1]), strict=True))


@styled
def path_figure(path: AttackPath | Mapping[str, AttackPath]) -> Figure:
    """The geometry along one attack, or along several by name.

    Each has two columns of panels, aligned by step (all samples classified right when clean) and
    at the flip of the label (those that flip): median and quartiles of kappa as it is and at
    matched confidence, of the confidence, and of the loss. A dashed line is the (median) flip, the
    grey span has half of the flips.
    """
    paths = path if isinstance(path, Mapping) else {"": path}
    figure = new_figure(5.6 * len(paths), 7.6, constrained=True)
    blocks = figure.subfigures(1, len(paths), squeeze=False, wspace=0.04)[0]
    for block, (name, one) in zip(blocks, paths.items(), strict=True):
        _draw_block(block, one)
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
    flips = path.flip[path.flip > 0].double()
    if len(flips):
        lower, median, upper = flips.quantile(flips.new_tensor([0.25, 0.5, 0.75])).tolist()
        for axes in panels[:, 0]:
            axes.axvspan(lower, upper, color=INK, alpha=0.07, linewidth=0)
            axes.axvline(median, color=INK, linestyle="--", linewidth=0.8)
    for axes in panels[:, 1]:
        axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        axes.xaxis.set_major_locator(MultipleLocator(5))
    right = int((path.flip != 0).sum())
    panels[0, 0].set_title(f"by step (n = {right})")
    panels[0, 1].set_title(f"at the flip (n = {bands.flipped})")
    panels[-1, 0].set_xlabel("step of the attack")
    panels[-1, 1].set_xlabel("steps from the flip")
    block.align_ylabels()
