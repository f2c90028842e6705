"""Figures of a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.report.figures.adaptive import margin_slices
from flatreg.report.figures.path import TITLES
from flatreg.report.figures.style import (
    COLORS,
    INK,
    NORMS,
    arm_colors,
    draw_band,
    draw_range,
    log_axis,
    panels,
    save_all,
    styled,
)
from flatreg.report.rows import Report


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Draw every figure of `report` into `folder/figures`; file names and captions."""
    figures = {
        "figures/attacked_accuracy.png": (
            partial(attacked_accuracy, report),
            "Attacked accuracy against eps with Wilson 95% intervals; the dashed line is the "
            "eps of the table.",
        ),
        "figures/training.png": (
            partial(training, report),
            "Training: every part of the loss, mean over each epoch.",
        ),
        "figures/attack_path.png": (
            partial(attack_path, report),
            "Along PGD on the margin: median and quartiles, above by step over all paths, below "
            "aligned at the step that flips the label, over those that flip. Paths run to "
            f"{2 * report.rows[0].evaluation.eps:.3g}. Beyond the flip the model is wrong. At "
            "matched confidence the head is scaled so that the clean images have a median "
            f"confidence of {CONFIDENCE}.",
        ),
    }
    for row in report.rows:
        if row.adaptive_check and row.adaptive_check.slices:
            figures[f"figures/slice-{row.name}.png"] = (
                partial(margin_slices, row.adaptive_check),
                f"{row.name}: margin around survivors, in the plane of the attack's direction and "
                "of a random one; the line is where the label changes.",
            )
    return save_all(figures, folder)


@styled
def attacked_accuracy(report: Report) -> Figure:
    """Attacked accuracy against eps, one line an arm; eps 0 is clean."""
    figure, ((axes,),) = panels(1, 1, (6.4, 3.8))
    colors, first = arm_colors(row.name for row in report.rows), report.rows[0].evaluation
    for row in report.rows:
        result = row.evaluation
        found = {0.0: result.clean, result.eps: result.attacked}
        found |= {point.eps: point.accuracy for point in result.curve}
        eps = sorted(found)
        low, middle, high = (
            [100 * getattr(found[radius], end) for radius in eps]
            for end in ("low", "value", "high")
        )
        draw_range(axes, eps, (low, high), middle, colors[row.name], row.name, "o-")
    axes.axvline(first.eps, color=INK, linestyle="--", linewidth=0.8)
    axes.set(ylabel="accuracy %", ylim=(-2, 102), xlim=(0, None))
    axes.set_xlabel(f"eps ({NORMS[first.norm]}, [0,1] pixels)")
    axes.set_title(f"Attacked accuracy, n = {first.n}")
    axes.legend()
    return figure


@styled
def training(report: Report) -> Figure:
    """Loss parts over the epochs, one panel an arm."""
    figure, (line,) = panels(1, len(report.rows), (3.4 * len(report.rows), 3.0), sharey=True)
    for axes, row in zip(line, report.rows, strict=True):
        epochs = [epoch.epoch + 1 for epoch in row.history]
        for part, color in zip(row.history[0].parts, COLORS[2:] + COLORS[:2], strict=False):
            axes.plot(epochs, [e.parts[part] for e in row.history], ".-", color=color, label=part)
        axes.set(title=row.name, xlabel="epoch", yscale="log")
        axes.legend(fontsize=8)
    line[0].set_ylabel("loss part")
    return figure


@styled
def attack_path(report: Report) -> Figure:
    """Kappa, raw and at matched confidence, confidence and loss along attack paths, aligned twice.

    Above by step, below at the flip of the label.
    """
    rows, colors = report.rows, arm_colors(row.name for row in report.rows)
    names = [name for name in TITLES if any(name in row.path | row.path_by_step for row in rows)]
    columns = max(1, len(names))
    figure, grid = panels(
        2, columns, (3.1 * columns, 5.4), constrained=True, sharex="row", sharey="col"
    )
    for row in rows:
        label = f"{row.name} ({row.path_samples} flip)"
        for bands, line in zip((row.path_by_step, row.path), grid, strict=True):
            for axes, name in zip(line, names, strict=False):
                if name in bands:
                    draw_band(axes, bands[name], colors[row.name], label)
    for axes, name in zip(grid[0], names, strict=False):
        axes.set_title(TITLES[name])
        if "kappa" in name:
            log_axis(axes)
    for above, below in grid.T:
        below.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        above.set_xlabel("step of the attack")
        below.set_xlabel("steps from the flip of the label")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
