"""Figures of a report and of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatreg.report import Report, Row
from flatreg.sweep import Sweep

COLORS = ["#6b7280", "#d97706", "#0f766e", "#7c3aed", "#be123c", "#1d4ed8"]
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
            "Along PGD on the margin, aligned at the step that flips the label: median and "
            f"quartiles. Paths run to {2 * eps:.3g}; n counts those that flip. Beyond the flip the "
            "model is wrong.",
        ),
    }
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, (figure_of, _) in figures.items():
        with plt.rc_context(STYLE):
            figure = figure_of(report)
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
    return {name: caption for name, (_, caption) in figures.items()}


def attacked_accuracy(report: Report) -> Figure:
    """Attacked accuracy against eps, one line an arm; eps 0 is clean."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for row, color in zip(report.rows, _colors(report), strict=True):
        result = row.evaluation
        points = {0.0: result.clean, result.eps: result.attacked}
        points |= {point.eps: point.accuracy for point in result.curve}
        eps, accuracies = zip(*sorted(points.items()), strict=True)
        axes.fill_between(
            eps, [100 * a.low for a in accuracies], [100 * a.high for a in accuracies],
            color=color, alpha=0.18, linewidth=0,
        )  # fmt: skip
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
    """Kappa, confidence and loss along attack paths, aligned at the flip."""
    figure, panels = plt.subplots(1, 3, figsize=(10.2, 3.2))
    titles = {
        "kappa": "relative flatness (larger = sharper)",
        "confidence": "confidence",
        "loss": "cross-entropy of the true label",
    }
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for row, color in zip(report.rows, _colors(report), strict=True):
            _band(axes, row, quantity, color)
        axes.axvline(0, color="#111827", linestyle="--", linewidth=0.8)
        axes.set(title=title, xlabel="steps from the flip of the label")
    panels[0].set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=max(1, len(labels))
    )
    figure.tight_layout()
    return figure


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Draw a sweep into the file `path`."""
    with plt.rc_context(STYLE):
        figure = sweep_curve(sweep)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def sweep_curve(sweep: Sweep) -> Figure:
    """Clean and attacked accuracy of every value of a sweep; a cross where training failed.

    The axis is logarithmic where all values are positive numbers, and linear below the smallest
    positive one where some are zero; what is no number stands side by side.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    numbers = [_number(trial.value) for trial in sweep.trials]
    numeric = all(number is not None for number in numbers)
    at = [n if n is not None and numeric else i for i, n in enumerate(numbers)]
    placed = sorted(zip(at, sweep.trials, strict=True), key=lambda pair: pair[0])
    for name, color in (("clean", COLORS[0]), ("attacked", COLORS[2])):
        points = [(x, getattr(t.evaluation, name)) for x, t in placed if t.evaluation]
        below = [100 * (a.value - a.low) for _, a in points]
        above = [100 * (a.high - a.value) for _, a in points]
        axes.errorbar(
            [x for x, _ in points], [100 * a.value for _, a in points], yerr=(below, above),
            fmt="o-", color=color, markersize=4, capsize=3, label=name,
        )  # fmt: skip
    failed = [x for x, trial in placed if trial.evaluation is None]
    if failed:
        axes.plot(failed, [0.0] * len(failed), "x", color=COLORS[4], label="failed")
    if numeric:
        _spread_out(axes, at)
    axes.set_xticks(at, [str(trial.value) for trial in sweep.trials])
    axes.minorticks_off()
    axes.set(xlabel=sweep.key, ylabel="accuracy %", ylim=(-2, 102))
    n = next((trial.evaluation.n for trial in sweep.trials if trial.evaluation), 0)
    axes.set_title(f"Sweep, n = {n} held-back images, eps {sweep.recipe['evaluation']['eps']:.4g}")
    axes.legend()
    return figure


def _spread_out(axes: Axes, values: list[float]) -> None:
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        axes.set_xscale("log")
    elif positive and min(values) == 0:
        axes.set_xscale("symlog", linthresh=min(positive))


def _number(value: Any) -> float | None:
    """A number, or a fraction such as "8/255"; None for anything else."""
    try:
        return None if isinstance(value, bool) else float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return None


def _band(axes: Axes, row: Row, quantity: str, color: str) -> None:
    if quantity not in row.path:
        return
    band = row.path[quantity]
    axes.fill_between(band.offsets, band.lower, band.upper, color=color, alpha=0.18, linewidth=0)
    label = f"{row.name} (n = {row.path_samples})"
    axes.plot(band.offsets, band.median, color=color, label=label)


def _colors(report: Report) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(report.rows))]
