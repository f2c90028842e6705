"""Figures of claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flatreg.claims.beyond_flatness import RADII
from flatreg.claims.closed_form import FAINTEST, TOLERANCE
from flatreg.claims.result import ClaimResult
from flatreg.evaluation.attack_path import Band
from flatreg.report.figures.style import COLORS, INK, STYLE, draw_band, log_axis

_MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*"]


def draw_claim(result: ClaimResult, path: Path) -> str:
    """Draw the figure of a claim into the file `path`; its caption."""
    figure_of, caption = _FIGURES[result.kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = figure_of(result)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)
    return caption


def closed_form(result: ClaimResult) -> Figure:
    """Both sides of the equation, and how far they are apart."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    for (title, arm), color, marker in zip(
        result.arrays.items(), _colors(), _MARKERS, strict=False
    ):
        apart = [
            max(abs(c - h) / abs(h), 1e-17)
            for c, h in zip(arm["closed"], arm["hessian"], strict=True)
        ]
        look: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "linestyle": "",
            "markersize": 5,
            "markerfacecolor": "none",
            "label": title,
        }
        left.plot(arm["hessian"], arm["closed"], **look)
        right.plot(arm["doubt"], apart, **look)
    everything = [v for arm in result.arrays.values() for v in arm["hessian"] if v > 0]
    ends = [min(everything), max(everything)]
    left.plot(ends, ends, color=INK, linewidth=0.8, zorder=0)
    left.set(xscale="log", yscale="log", xlabel="sum over blocks of the Hessian, autograd")
    left.set(ylabel="closed form", title="kappa of a sample, twice")
    left.legend(fontsize=8)
    right.axhline(TOLERANCE, color=COLORS[4], linestyle="--", linewidth=1)
    right.text(
        0.98,
        TOLERANCE * 1.5,
        "allowed",
        color=COLORS[4],
        ha="right",
        va="bottom",
        transform=right.get_yaxis_transform(),
        fontsize=8,
    )
    right.axvspan(right.get_xlim()[0] or 1e-17, FAINTEST, color=INK, alpha=0.06, linewidth=0)
    right.set(xscale="log", yscale="log", xlabel="1 - confidence (grey: not judged)")
    right.set(title="relative difference")
    return figure


def local_bound(result: ClaimResult) -> Figure:
    """Bounds and the largest loss found over the radius, a panel an arm."""
    figure, panels = _row(result, 3.4)
    lines = {
        "worst_loss": ("largest loss found", INK, "-"),
        "local_bound": ("local bound, curvature", COLORS[5], "-"),
        "relative_bound": ("local bound, kappa", COLORS[1], "--"),
        "global_bound": ("global bound, no derivative", COLORS[2], "-"),
    }
    for axes, (title, arm) in zip(panels, result.arrays.items(), strict=True):
        at = arm["multiples"]
        for name, (label, color, dash) in lines.items():
            lower, median, upper = (arm[f"{name}.{q}"] for q in ("lower", "median", "upper"))
            axes.fill_between(at, lower, upper, color=color, alpha=0.12, linewidth=0)
            axes.plot(at, median, dash, color=color, label=label)
        certified = result.numbers[title]["local bound certifies, R*"].value
        axes.axhline(math.log(2), color=COLORS[0], linewidth=0.8, linestyle=":")
        axes.axvline(certified, color=COLORS[5], linewidth=0.8, linestyle=":")
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.text(
            certified,
            0.09,
            f"{certified:.2g} ",
            color=COLORS[5],
            fontsize=8,
            ha="right",
            transform=axes.get_xaxis_transform(),
        )
        axes.text(1, 0.02, " R*", color=INK, fontsize=8, transform=axes.get_xaxis_transform())
        axes.set(xscale="log", yscale="log", ylim=(1e-5, 1e3), xlim=(at[1], at[-1]))
        axes.set_xlabel("R / R* of the image")
    panels[0].set_ylabel("cross-entropy")
    _legend_below(figure, panels[0])
    return figure


def uncanny_valley(result: ClaimResult) -> Figure:
    """Kappa along an attack, aligned at the flip, a column an arm."""
    kinds = {"as it is": COLORS[4], "matched": COLORS[5]}
    count = len(result.arrays)
    figure, panels = plt.subplots(
        2,
        count,
        figsize=(1.0 + 2.1 * count, 4.8),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, (title, arm) in zip(panels.T, result.arrays.items(), strict=True):
        column[0].set_title(_broken(title), fontsize=9)
        for axes, (kind, color) in zip(column, kinds.items(), strict=True):
            if f"{kind}.median" in arm:
                lower, median, upper = (arm[f"{kind}.{q}"] for q in ("lower", "median", "upper"))
                offsets = [int(offset) for offset in arm[f"{kind}.offsets"]]
                draw_band(axes, Band(offsets, lower, median, upper), color)
                axes.axhline(
                    _number(result, title, f"kappa clean, {kind}"),
                    color=COLORS[0],
                    linewidth=0.9,
                    linestyle=":",
                )
            holds = result.subjects().get(f"{title}, {kind}", False)
            verdict, ink = ("reproduced", INK) if holds else ("not reproduced", COLORS[4])
            axes.text(
                0.97, 0.04, verdict, fontsize=8, ha="right", transform=axes.transAxes, color=ink
            )
            axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
            log_axis(axes)
            axes.tick_params(labelsize=8)
        column[1].set_xlabel("steps from the flip")
    for axes, name in zip(panels[:, 0], ("kappa", "kappa at matched\nconfidence"), strict=True):
        axes.set_ylabel(f"{name}\n(larger = sharper)")
    return figure


def label_blind(result: ClaimResult) -> Figure:
    """Kappa against 1 - confidence, right, wrong and attacked samples, a panel an arm."""
    figure, panels = _row(result, 3.4)
    groups: dict[str, dict[str, Any]] = {
        "right": {"color": COLORS[2], "marker": "o", "s": 42, "alpha": 0.25, "linewidths": 0},
        "attacked": {"edgecolors": COLORS[1], "marker": "D", "s": 6, "facecolors": "none"},
        "wrong": {"edgecolors": COLORS[4], "marker": "s", "s": 26, "facecolors": "none"},
    }
    for axes, (title, arm) in zip(panels, result.arrays.items(), strict=True):
        for name, look in groups.items():
            axes.scatter(arm[f"{name}.doubt"], arm[f"{name}.kappa"], **look, label=name)
        axes.set(xscale="log", yscale="log", xlabel="1 - confidence", xlim=(1.2, 1e-12))
        ratio = result.numbers[title]["ratio, wrong"]
        axes.text(
            0.97,
            0.96,
            f"wrong / right at equal\nconfidence: {ratio.value:.2f}",
            ha="right",
            va="top",
            fontsize=8,
            transform=axes.transAxes,
        )
    panels[0].set_ylabel("kappa (larger = sharper)")
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 1e-10))
    _legend_below(figure, panels[0])
    return figure


def scaled_head(result: ClaimResult) -> Figure:
    """Kappa over the factor, and accuracies over the factor, a panel an arm."""
    count = len(result.arrays)
    figure, panels = plt.subplots(
        2,
        count,
        figsize=(1.0 + 2.3 * count, 4.8),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    lines = {
        "cascade": ("cascade blind to the scale", COLORS[2], "o-"),
        "PGD on plain cross-entropy": ("PGD, plain cross-entropy", COLORS[1], "s--"),
        "APGD on plain cross-entropy": ("APGD, plain cross-entropy", COLORS[4], "^:"),
    }
    for column, (title, arm) in zip(panels.T, result.arrays.items(), strict=True):
        at = arm["factors"]
        column[0].set_title(_broken(title), fontsize=9)
        column[0].plot(
            at, [max(k, 1e-40) for k in arm["kappa, right.value"]], "o-", color=COLORS[5]
        )
        for name, (label, color, look) in lines.items():
            low, value, high = (
                [100 * v for v in arm[f"{name}.{field}"]] for field in ("low", "value", "high")
            )
            column[1].fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
            column[1].plot(at, value, look, color=color, markersize=4, label=label)
        column[0].set(xscale="log", yscale="log")
        column[1].set(ylim=(-3, 103), xlabel="head multiplied by")
    panels[0, 0].set_ylabel("kappa of right samples\n(from 1e-40)")
    panels[1, 0].set_ylabel("accuracy left, %")
    _legend_below(figure, panels[1, 0])
    return figure


def beyond_flatness(result: ClaimResult) -> Figure:
    """Attacked accuracy of every arm against kappa* and two curvatures; the loss off the manifold.

    The last panel follows the loss away from the images, as the curvatures are taken along it.
    """
    figure, panels = plt.subplots(1, 4, figsize=(13.0, 4.0), layout="constrained")
    names = {
        "kappa*": "kappa* (larger = sharper)",
        "curvature off": "curvature off the manifold",
        f"curvature off, {RADII} radii out": f"the same, {RADII} radii out",
    }
    styles = dict(
        zip(result.numbers, zip(cycle([*COLORS, INK]), cycle(_MARKERS), strict=False), strict=False)
    )
    for axes, (name, label) in zip(panels, names.items(), strict=False):
        for title, numbers in result.numbers.items():
            x, y, (color, marker) = numbers[name], numbers["attacked accuracy"], styles[title]
            axes.errorbar(
                [x.value],
                [100 * y.value],
                xerr=[[x.value - x.low], [x.high - x.value]],
                yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
                fmt=marker,
                color=color,
                markersize=6,
                capsize=2,
                elinewidth=0.8,
                label=title.split(", ")[0],
            )
        if min(numbers[name].low for numbers in result.numbers.values()) > 0:
            _log_x(axes)
        axes.set(xlabel=label, ylim=(-3, 103))
    panels[0].set_ylabel("attacked accuracy, %")
    for title, arrays in result.arrays.items():
        losses, (color, marker) = arrays["loss off"], styles[title]
        panels[3].plot(range(len(losses)), losses, color=color, marker=marker, markersize=3)
    panels[3].set(xlabel="radii off the manifold", ylabel="mean loss")
    _legend_below(figure, panels[0])
    return figure


def _row(result: ClaimResult, height: float) -> tuple[Figure, list[Axes]]:
    """A panel an arm, side by side."""
    count = len(result.arrays)
    figure, panels = plt.subplots(
        1,
        count,
        figsize=(1.0 + 2.9 * count, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, title in zip(panels[0], result.arrays, strict=True):
        axes.set_title(_broken(title), fontsize=9)
    return figure, list(panels[0])


def _log_x(axes: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers where it spans little."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _broken(title: str) -> str:
    """Name and architecture, a line each."""
    return title.replace(", ", "\n")


def _colors() -> Any:
    return cycle(COLORS)


def _number(result: ClaimResult, title: str, name: str) -> float:
    return result.numbers[title][name].value


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9
    )


_FIGURES: dict[str, tuple[Callable[[ClaimResult], Figure], str]] = {
    "ClosedForm": (
        closed_form,
        "Relative flatness of every sample by its closed form and by autograd's Hessian, and their "
        "relative difference; beyond a confidence of 1 - 1e-6 the Hessian has lost its digits.",
    ),
    "LocalBound": (
        local_bound,
        "Bounds on the loss and the largest loss found when features move by R: median and "
        "quartiles. Dotted: log 2, above which the prediction may change; where the local bound "
        "reaches it; and R*, where the prediction can first change.",
    ),
    "UncannyValley": (
        uncanny_valley,
        "Kappa along PGD on the margin, aligned at the flip of the label: median and quartiles "
        "over the paths that flip. Dotted: the median at the clean images.",
    ),
    "LabelBlind": (
        label_blind,
        "Kappa against 1 - confidence, one mark a sample: right, wrong, and wrong after an attack.",
    ),
    "ScaledHead": (
        scaled_head,
        "The last layer multiplied: median kappa of the samples that are right, and what attacks "
        "leave, with Wilson 95% intervals. No prediction changes.",
    ),
    "BeyondFlatness": (
        beyond_flatness,
        "Attacked accuracy of every arm against relative flatness and curvature of the loss off "
        "the data manifold, within the ball and three radii out, with 95% intervals; right, the "
        "loss on the way there. All at a median confidence of 0.9.",
    ),
}
