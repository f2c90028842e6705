"""Figures of a report, of its attack paths and adaptive checks, and of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from flatreg.evaluation.adaptive import AdaptiveAttackCheck, Slice
from flatreg.evaluation.attack_path import AttackPath, aligned_bands
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.report.figures.style import (
    COLORS,
    INK,
    draw_band,
    draw_range,
    kind_color,
    legend_below,
    log_axis,
    marks,
    new_figure,
    panels,
    save_formats,
    styled,
)
from flatreg.report.rows import Report, Row
from flatreg.report.tables import NORM_NAMES, figure_text

if TYPE_CHECKING:
    from flatreg.run.sweep import Sweep

TITLES = {
    "kappa": "kappa\n(larger = sharper)",
    "matched kappa": "kappa*\n(at matched confidence)",
    "confidence": "confidence",
    "loss": "cross-entropy of\nthe true label",
}
_PATH_COLORS = dict(zip(TITLES, (COLORS[4], COLORS[5], COLORS[2], COLORS[1]), strict=True))
ACCURACY_CAPTION = (
    "Attacked accuracy against eps with Wilson 95% intervals; the dashed line is the eps of the "
    "table."
)
SLICES_CAPTION = (
    "{}: margin around survivors, in the plane of the attack's direction and of a random one; the "
    "line is where the label changes."
)
MONITORED_CAPTION = (
    "Accuracy on held-back images in each monitored epoch, under the fast cascade and under one "
    "step, with Wilson 95% intervals; the ring is the best epoch. Where only the second one stays "
    "high, the training has over-fitted its own attack."
)
MONITORED = {"monitored": "under the fast cascade", "fgsm": "under one step"}
_NAME = 40  # characters of the name of an arm that a figure shows
_MOST_SLICES = 4  # panels that still can be read side by side
_WRONG_TO_RIGHT = LinearSegmentedColormap.from_list("margin", [COLORS[4], "#ffffff", COLORS[2]])


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Draw every figure into `folder/figures`, as PNG and SVG; names of the PNG and captions."""
    figures = {
        "figures/attacked_accuracy.png": (
            partial(attacked_accuracy, {row.name: [row] for row in report.rows}),
            ACCURACY_CAPTION,
        ),
        "figures/training.png": (
            partial(training, report.rows),
            "Training: every part of the loss, mean over each epoch.",
        ),
        "figures/monitored.png": (partial(monitored, report.rows), MONITORED_CAPTION),
        "figures/attack_path.png": (
            partial(attack_path, report.rows),
            "Along PGD on the margin: median and quartiles, above by step over all paths, below "
            "aligned at the step that flips the label, over those that flip. Paths run to "
            f"{2 * report.rows[0].evaluation.eps:.3g}. Beyond the flip the model is wrong. For "
            "kappa* the head is scaled so that the clean images have a median confidence of "
            f"{CONFIDENCE}.",
        ),
    }
    if not all(row.history for row in report.rows):
        del figures["figures/training.png"]
    if not was_monitored(report.rows):
        del figures["figures/monitored.png"]
    for row in report.rows:
        if row.adaptive_check and row.adaptive_check.slices:
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", row.name)  # of a stored report it may be a path
            figures[f"figures/slice-{name}.png"] = (
                partial(margin_slices, row.adaptive_check),
                SLICES_CAPTION.format(row.name),
            )
    for name, (figure_of, _) in figures.items():
        save_formats(figure_of(), folder / name)
    return {name: caption for name, (_, caption) in figures.items()}


@styled
def attacked_accuracy(arms: Mapping[str, Sequence[Row]]) -> Figure:
    """Attacked accuracy against eps; eps 0 is clean.

    Args:
        arms: by name, each trained once, or once with every seed. One line is one training.
    """
    figure, ((axes,),) = panels(1, 1, (5.8, 4.0), constrained=True)
    arm_marks = marks(rows[0] for rows in arms.values())
    for (name, rows), mark in zip(arms.items(), arm_marks, strict=True):
        for number, row in enumerate(rows):
            result = row.evaluation
            found = {0.0: result.clean, result.eps: result.attacked}
            found |= {point.eps: point.accuracy for point in result.curve}
            low, middle, high = (
                [100 * getattr(found[radius], end) for radius in sorted(found)]
                for end in ("low", "value", "high")
            )
            label = None if number else figure_text(name, _NAME)
            style = (mark.color, label, mark.dashes, mark.marker)
            draw_range(axes, sorted(found), (low, high), middle, *style)
    first = next(iter(arms.values()))[0].evaluation
    axes.axvline(first.eps, color=INK, linestyle="--", linewidth=0.8)
    axes.set(ylabel="accuracy %", ylim=(-2, 102), xlim=(0, None))
    axes.set_xlabel(f"eps ({NORM_NAMES[first.norm]}, [0,1] pixels)")
    axes.set_title(f"Attacked accuracy, n = {first.n}")
    legend_below(figure, axes)
    return figure


@styled
def training(rows: Sequence[Row]) -> Figure:
    """Loss parts over the epochs, one panel an arm."""
    size = (3.4 * len(rows), 3.0)
    figure, (line,) = panels(1, len(rows), size, constrained=True, sharey=True)
    for axes, row in zip(line, rows, strict=True):
        epochs = [epoch.epoch + 1 for epoch in row.history]
        for part in row.history[0].parts:
            losses = [epoch.parts.get(part, math.nan) for epoch in row.history]
            color = kind_color(part.partition(" ")[0])
            axes.plot(epochs, losses, ".-", color=color, label=figure_text(part, 24))
        axes.set(title=figure_text(row.name, 30), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if row.history[0].parts:
            axes.legend(fontsize=8)
    every = (part for row in rows for epoch in row.history for part in epoch.parts.values())
    known = list(filter(math.isfinite, every))
    if min(known, default=1.0) > 0:
        log_axis(line[0])
    else:  # a curvature may be negative, and a weight that rises begins at 0
        line[0].set_yscale("symlog", linthresh=1e-3 * max(map(abs, known)) or 1.0)
    line[0].set_ylabel("loss part")
    return figure


def was_monitored(rows: Sequence[Row]) -> bool:
    """Whether an arm was attacked during its training, in two epochs at least."""
    return any(sum(epoch.monitored is not None for epoch in row.history) > 1 for row in rows)


@styled
def monitored(rows: Sequence[Row], attacks: Iterable[str] = MONITORED) -> Figure:
    """Accuracy on held-back images over the epochs, a panel an attack; a ring at the best epoch.

    Args:
        rows: arms; those that were not monitored are left out.
        attacks: of "monitored" (the fast cascade) and "fgsm" (one step).
    """
    names = list(attacks)
    figure, (line,) = panels(1, len(names), (4.4 * len(names), 3.6), constrained=True, sharey=True)
    for row, mark in zip(rows, marks(rows), strict=True):
        epochs = [epoch for epoch in row.history if epoch.monitored]
        if not epochs:
            continue
        at = [epoch.epoch + 1 for epoch in epochs]
        attacked = [epoch.monitored.value for epoch in row.history if epoch.monitored]
        best = attacked.index(max(attacked))
        for axes, name in zip(line, names, strict=True):
            low, middle, high = (
                [100 * getattr(getattr(epoch, name), end) for epoch in epochs]
                for end in ("low", "value", "high")
            )
            style = (mark.color, figure_text(row.name, _NAME), mark.dashes, mark.marker)
            draw_range(axes, at, (low, high), middle, *style)
            axes.plot(at[best], middle[best], "o", color=mark.color, mfc="none", markersize=9)
    for axes, name in zip(line, names, strict=True):
        axes.set(title=MONITORED[name], xlabel="epoch", ylim=(-2, 102))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    line[0].set_ylabel("accuracy on held-back images %")
    legend_below(figure, line[0])
    return figure


@styled
def attack_path(rows: Sequence[Row], quantities: Iterable[str] = TITLES) -> Figure:
    """Kappa, raw and at matched confidence, confidence and loss along attack paths, aligned twice.

    Above by step, below at the flip of the label.
    """
    names = [name for name in quantities if name in path_quantities(rows)]
    columns = max(1, len(names))
    size = (3.1 * columns, 5.4)
    figure, grid = panels(2, columns, size, constrained=True, sharex="row", sharey="col")
    for row, mark in zip(rows, marks(rows), strict=True):
        label = f"{figure_text(row.name, _NAME)} ({row.path_samples} flip)"
        for bands, line in zip((row.path_by_step, row.path), grid, strict=True):
            for axes, name in zip(line, names, strict=False):
                if name in bands:
                    draw_band(axes, bands[name], mark.color, label, mark.dashes)
    for axes, name in zip(grid[0], names, strict=False):
        axes.set_title(TITLES[name])
        if "kappa" in name:
            log_axis(axes)
    for above, below in grid.T:
        below.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        above.set_xlabel("step of the attack")
        below.set_xlabel("steps from the flip of the label")
    legend_below(figure, grid[0, 0])
    return figure


def path_quantities(rows: Iterable[Row]) -> list[str]:
    """Names of what was followed along the attack of an arm at least, in their order."""
    known = {name for row in rows for name in row.path | row.path_by_step}
    return [name for name in TITLES if name in known]


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
        block.suptitle(figure_text(name), x=0.02, ha="left", fontweight="bold")
    return figure


def _draw_block(block: SubFigure, path: AttackPath) -> None:
    """Both alignments of one attack, side by side, a row for each quantity."""
    bands = aligned_bands(path)
    shown = [name for name in TITLES if name in bands.by_step or name in bands.by_flip]
    panels = block.subplots(len(shown), 2, sharex="col", sharey="row", squeeze=False)
    for axes in panels.flat:
        axes.margins(x=0)
    for column, aligned in zip(panels.T, (bands.by_step, bands.by_flip), strict=True):
        for axes, quantity in zip(column, shown, strict=True):
            if quantity in aligned:
                draw_band(axes, aligned[quantity], _PATH_COLORS[quantity])
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


@styled
def margin_slices(adaptive_check: AdaptiveAttackCheck) -> Figure:
    """Margin over the planes around up to four survivors, on one scale.

    Lines are where the label flips, and where the ball ends.

    Raises:
        ValueError: the check holds no slice.
    """
    slices = adaptive_check.slices[:_MOST_SLICES]
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
    lines = [
        Line2D([], [], color=INK, linewidth=1.6, label="the label flips"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle="--", label="end of the ball"),
        Line2D([], [], color=INK, marker="+", linestyle="", label="the image"),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=3)
    return figure


def _panel(axes: Axes, drawn: Slice, limit: float, eps: float) -> QuadContourSet:
    margins, levels = np.array(drawn.margin), np.linspace(-limit, limit, 21)
    axis, clipped = drawn.axis, margins.clip(-limit, limit)
    filled = axes.contourf(axis, axis, clipped, levels=levels, cmap=_WRONG_TO_RIGHT)
    for values, level, width, line in (
        (margins, 0.0, 1.6, "-"),
        (np.array(drawn.distance), eps, 1.0, "--"),
    ):
        if values.min() < level < values.max():  # matplotlib warns where there is no such line
            style: dict[str, Any] = {"colors": INK, "linewidths": width, "linestyles": line}
            axes.contour(axis, axis, values, levels=[level], **style)
    axes.plot(0, 0, "+", color=INK, markersize=7)
    axes.set(aspect="equal", xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2))
    axes.grid(False)
    return filled


@styled
def sweep_curve(sweep: Sweep) -> Figure:
    """Clean and attacked accuracy of every value of a sweep; a cross where training failed.

    The axis is logarithmic where all values are positive numbers, and linear below the smallest
    positive one where some are zero; other values are drawn in their order.
    """
    figure, ((axes,),) = panels(1, 1, (6.4, 3.8))
    numbers = [_number(trial.value) for trial in sweep.trials]
    numeric = all(number is not None for number in numbers)
    at = [n if n is not None and numeric else i for i, n in enumerate(numbers)]
    placed = sorted(zip(at, sweep.trials, strict=True), key=lambda pair: pair[0])
    for name, color in (("clean", COLORS[0]), ("attacked", COLORS[2])):
        points = [(x, getattr(t.evaluation, name)) for x, t in placed if t.evaluation]
        middle = [100 * a.value for _, a in points]
        ends = [[100 * (a.value - a.low), 100 * (a.high - a.value)] for _, a in points]
        style: dict[str, Any] = {"fmt": "o-", "color": color, "markersize": 4, "capsize": 3}
        bars = np.reshape(ends, (-1, 2)).T
        axes.errorbar([x for x, _ in points], middle, yerr=bars, label=name, **style)
    failed = [x for x, trial in placed if trial.evaluation is None]
    if failed:
        axes.plot(failed, [0.0] * len(failed), "x", color=COLORS[4], label="failed")
    positive = [value for value in at if value > 0]
    if numeric and len(positive) == len(at):
        axes.set_xscale("log")
    elif numeric and positive and min(at) == 0:
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_xticks(at, [figure_text(str(trial.value)) for trial in sweep.trials])
    axes.minorticks_off()
    axes.set(xlabel=figure_text(sweep.key), ylabel="accuracy %", ylim=(-2, 102))
    n = next((trial.evaluation.n for trial in sweep.trials if trial.evaluation), 0)
    threat = sweep.recipe["evaluation"]
    ball = f"{NORM_NAMES[threat['norm']]} eps {threat['eps']:.4g}"
    axes.set_title(f"Sweep, n = {n} validation images, {ball}")
    axes.legend()
    return figure


def _number(value: Any) -> float | None:
    """A number, or a fraction such as "8/255"; None for anything else."""
    try:
        return None if isinstance(value, bool) else float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return None
