"""Figures of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.report.figures.adaptive import draw_slice
from flatreg.report.figures.path import INK, TITLES, draw_band, log_axis
from flatreg.report.figures.style import COLORS, STYLE
from flatreg.report.rows import Report


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Draw every figure of `report` into `folder/figures`; file names and captions."""
    eps = report.rows[0].evaluation.eps
    figures: dict[str, tuple[Callable[[Report], Figure], str]] = {
        "figures/attacked_accuracy.png": (
            attacked_accuracy,
            "Attacked accuracy against eps with Wilson 95% intervals; the dashed line is the "
            "eps of the table.",
        ),
        "figures/training.png": (
            training,
            "Training: every part of the loss, mean over each epoch.",
        ),
        "figures/attack_path.png": (
            attack_path,
            "Along PGD on the margin: median and quartiles, above by step over all paths, below "
            f"aligned at the step that flips the label, over those that flip. Paths run to "
            f"{2 * eps:.3g}. Beyond the flip the model is wrong. At matched confidence the head is "
            f"scaled so that the clean images have a median confidence of {CONFIDENCE}.",
        ),
    }
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, (figure_of, _) in figures.items():
        with plt.rc_context(STYLE):
            figure = figure_of(report)
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
    captions = {name: caption for name, (_, caption) in figures.items()}
    for row in report.rows:
        if row.adaptive_check and row.adaptive_check.slices:
            name = f"figures/slice-{row.name}.png"
            draw_slice(row.adaptive_check, folder / name)
            captions[name] = (
                f"{row.name}: margin around survivors, in the plane of the attack's direction and "
                "of a random one; the line is where the label changes."
            )
    return captions


def attacked_accuracy(report: Report) -> Figure:
    """Attacked accuracy against eps, one line an arm; eps 0 is clean."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for row, color in zip(report.rows, _colors(report), strict=True):
        result = row.evaluation
        points = {0.0: result.clean, result.eps: result.attacked}
        points |= {point.eps: point.accuracy for point in result.curve}
        eps, accuracies = zip(*sorted(points.items()), strict=True)
        axes.fill_between(
            eps,
            [100 * a.low for a in accuracies],
            [100 * a.high for a in accuracies],
            color=color,
            alpha=0.18,
            linewidth=0,
        )
        values = [100 * a.value for a in accuracies]
        axes.plot(eps, values, "o-", color=color, markersize=4, label=row.name)
    axes.axvline(report.rows[0].evaluation.eps, color="#111827", linestyle="--", linewidth=0.8)
    axes.set(xlabel="eps (Linf, [0,1] pixels)", ylabel="accuracy %", ylim=(-2, 102), xlim=(0, None))
    axes.set_title(f"Attacked accuracy, n = {report.rows[0].evaluation.n}")
    axes.legend()
    return figure


def training(report: Report) -> Figure:
    """Loss parts over the epochs, one panel an arm."""
    figure, panels = plt.subplots(
        1, len(report.rows), figsize=(3.4 * len(report.rows), 3.0), sharey=True, squeeze=False
    )
    for axes, row in zip(panels[0], report.rows, strict=True):
        epochs = [epoch.epoch + 1 for epoch in row.history]
        for part, color in zip(row.history[0].parts, COLORS[2:] + COLORS[:2], strict=False):
            axes.plot(epochs, [e.parts[part] for e in row.history], ".-", color=color, label=part)
        axes.set(title=row.name, xlabel="epoch", yscale="log")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("loss part")
    return figure


def attack_path(report: Report) -> Figure:
    """Kappa, raw and at matched confidence, confidence and loss along attack paths, aligned twice.

    Above by step, below at the flip of the label.
    """
    rows = report.rows
    names = [name for name in TITLES if any(name in row.path | row.path_by_step for row in rows)]
    figure, panels = plt.subplots(
        2,
        max(1, len(names)),
        figsize=(3.1 * max(1, len(names)), 5.4),
        sharex="row",
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for row, color in zip(report.rows, _colors(report), strict=True):
        label = f"{row.name} ({row.path_samples} flip)"
        for bands, line in ((row.path_by_step, panels[0]), (row.path, panels[1])):
            for axes, name in zip(line, names, strict=False):
                if name in bands:
                    draw_band(axes, bands[name], color, label)
    for axes, name in zip(panels[0], names, strict=False):
        axes.set_title(TITLES[name])
        if "kappa" in name:
            log_axis(axes)
    for above, below in panels.T:
        below.axvline(0, color=INK, linestyle="--", linewidth=0.8)
        above.set_xlabel("step of the attack")
        below.set_xlabel("steps from the flip of the label")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _colors(report: Report) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(report.rows))]
