"""Figure of a sweep."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatreg.report.figures.style import COLORS, NORMS, panels, styled
from flatreg.run.sweep import Sweep


@styled
def sweep_curve(sweep: Sweep) -> Figure:
    """Clean and attacked accuracy of every value of a sweep; a cross where training failed.

    The axis is logarithmic where all values are positive numbers, and linear below the smallest
    positive one where some are zero; what is no number stands side by side.
    """
    figure, ((axes,),) = panels(1, 1, (6.4, 3.8))
    numbers = [_number(trial.value) for trial in sweep.trials]
    numeric = all(number is not None for number in numbers)
    at = [n if n is not None and numeric else i for i, n in enumerate(numbers)]
    placed = sorted(zip(at, sweep.trials, strict=True), key=lambda pair: pair[0])
    for name, color in (("clean", COLORS[0]), ("attacked", COLORS[2])):
        points = [(x, getattr(t.evaluation, name)) for x, t in placed if t.evaluation]
        below = [100 * (a.value - a.low) for _, a in points]
        above = [100 * (a.high - a.value) for _, a in points]
        axes.errorbar(
            [x for x, _ in points],
            [100 * a.value for _, a in points],
            yerr=(below, above),
            fmt="o-",
            color=color,
            markersize=4,
            capsize=3,
            label=name,
        )
    failed = [x for x, trial in placed if trial.evaluation is None]
    if failed:
        axes.plot(failed, [0.0] * len(failed), "x", color=COLORS[4], label="failed")
    if numeric:
        _spread_out(axes, at)
    axes.set_xticks(at, [str(trial.value) for trial in sweep.trials])
    axes.minorticks_off()
    axes.set(xlabel=sweep.key, ylabel="accuracy %", ylim=(-2, 102))
    n = next((trial.evaluation.n for trial in sweep.trials if trial.evaluation), 0)
    threat = sweep.recipe["evaluation"]
    ball = f"{NORMS[threat['norm']]} eps {threat['eps']:.4g}"
    axes.set_title(f"Sweep, n = {n} held-back images, {ball}")
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
