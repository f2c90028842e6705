"""Figures of a geometry card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flatreg.evaluation.geometry.card import (
    BoundsPart,
    CurvaturePart,
    GeometryCard,
    KappaPart,
    LayersPart,
)
from flatreg.measures.estimate import QuantileBand
from flatreg.report.card import short_names
from flatreg.report.figures.style import COLORS, STYLE

_OUTCOMES = {"right": (COLORS[2], "o"), "wrong": (COLORS[4], "s"), "attacked": (COLORS[1], "D")}


def draw_card(card: GeometryCard, folder: Path) -> dict[str, str]:
    """Draw every part of `card` that was taken into `folder`; file names and captions."""
    figures: dict[str, tuple[Any, Callable[[Any], Figure], str]] = {
        "card_kappa.png": (
            card.kappa,
            kappa_against_confidence,
            "Relative flatness against confidence, mean ± standard error in bins. kappa knows no "
            "label: compare wrong and attacked samples with right ones of the same confidence.",
        ),
        "card_layers.png": (
            card.layers,
            layer_profile,
            "Relative flatness of every layer with its standard error over probes. The Hessian's "
            "may be negative below the head.",
        ),
        "card_curvature.png": (
            card.curvature,
            curvature_on_and_off,
            "Curvature of the loss in the input along and away from the data manifold: median and "
            "quartiles over images.",
        ),
        "card_bounds.png": (
            card.bounds,
            loss_bounds,
            "Bounds on the loss when the features move by R, and the largest loss found: median "
            "over images, with quartiles of the latter and of the global bound. The local bound, "
            "that of flatness, is tight near 0 and loses beyond.",
        ),
    }
    drawn = {name: figure for name, figure in figures.items() if figure[0] is not None}
    for name, (part, figure_of, _) in drawn.items():
        with plt.rc_context(STYLE):
            figure = figure_of(part)
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
    return {name: caption for name, (_, _, caption) in drawn.items()}


def kappa_against_confidence(part: KappaPart) -> Figure:
    """Relative flatness against 1 - confidence, right, wrong and attacked samples apart."""
    raw, matched = part.by_confidence, part.by_confidence_matched
    titles = {"as it is": raw, f"at median confidence {part.by_outcome.confidence:g}": matched}
    titles = {title: bins for title, bins in titles.items() if bins}
    figure, panels = plt.subplots(
        1, len(titles), figsize=(4.4 * len(titles), 3.6), sharex=True, sharey=True, squeeze=False
    )
    for axes, (title, bins) in zip(panels[0], titles.items(), strict=True):
        for outcome, (color, marker) in _OUTCOMES.items():
            points = [(b.uncertainty[outcome], b.kappa[outcome]) for b in bins if b.kappa[outcome]]
            if points:
                axes.errorbar(
                    [x for x, _ in points],
                    [k.value for _, k in points if k],
                    yerr=[k.stderr for _, k in points if k],
                    fmt=f"{marker}-",
                    color=color,
                    markersize=5,
                    markerfacecolor="none",
                    linewidth=0.8,
                    capsize=2,
                    label=outcome,
                )
        axes.set(title=title, xscale="log", yscale="log", xlabel="1 - confidence")
    panels[0][0].invert_xaxis()  # shared: confidence grows to the right
    panels[0][0].set_ylabel("relative flatness (larger = sharper)")
    panels[0][0].legend()
    figure.tight_layout()
    return figure


def layer_profile(part: LayersPart) -> Figure:
    """Relative flatness of every layer, the first on top."""
    names = list(part.hessian.layers)
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.24 * len(names)))
    for shift, color, label, flatness in (
        (-0.14, COLORS[5], "Hessian", part.hessian),
        (0.14, COLORS[1], "Gauss-Newton", part.gauss_newton),
    ):
        kappas = [flatness.layers[name].kappa for name in names]
        axes.errorbar(
            [k.value for k in kappas],
            [row + shift for row in range(len(names))],
            xerr=[k.stderr for k in kappas],
            fmt="o",
            color=color,
            markersize=4,
            capsize=2,
            label=label,
        )
    axes.axvline(0, color="#111827", linewidth=0.8)
    axes.set_yticks(range(len(names)), short_names(names), fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("relative flatness kappa (larger = sharper)")
    axes.set_title(f"Layers, mean loss of {part.n} images")
    axes.legend()
    return figure


def curvature_on_and_off(part: CurvaturePart) -> Figure:
    """Mean, along the gradient and largest curvature, on and off the manifold."""
    labels = {
        "mean": "curvature",
        "along the gradient": "along_gradient",
        "largest": "top",
    }
    figure, axes = plt.subplots(figsize=(6.0, 3.6))
    smallest, medians = [], []
    sides = (("on", -0.1, COLORS[5], part.on), ("off", 0.1, COLORS[4], part.off))
    for name, shift, color, side in sides:
        if side is None:
            continue
        spreads = [getattr(side, field) for field in labels.values()]
        smallest += [spread.lower for spread in spreads]
        medians += [spread.median for spread in spreads]
        below = [spread.median - spread.lower for spread in spreads]
        above = [spread.upper - spread.median for spread in spreads]
        axes.errorbar(
            [i + shift for i in range(len(labels))],
            [spread.median for spread in spreads],
            yerr=(below, above),
            fmt="o",
            color=color,
            capsize=3,
            label=f"{name} the manifold, {side.dimension} dimensions",
        )
    if min(smallest) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=max(min(map(abs, medians)), 1e-3 * max(medians), 1e-30))
        axes.axhline(0, color="#111827", linewidth=0.8)
    axes.set_xticks(range(len(labels)), list(labels))
    axes.set(xlim=(-0.5, len(labels) - 0.5), ylabel="loss per squared unit of L2")
    axes.set_title("Curvature of the loss in the input")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure


def loss_bounds(part: BoundsPart) -> Figure:
    """Bounds on the loss and the largest loss found, over radii in feature space."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    curves: list[tuple[str, QuantileBand, str, str]] = [
        ("local bound", part.local_bound, COLORS[5], "-"),
        ("local bound, by kappa", part.relative_bound, COLORS[1], "--"),
        ("global bound", part.global_bound, COLORS[2], "-"),
        ("largest loss found", part.worst_loss, "#111827", "-"),
    ]
    kept = [i for i, radius in enumerate(part.radii) if radius > 0]
    radii = [part.radii[i] for i in kept]
    for label, band, color, style in curves:
        lower, median, upper = ([q[i] for i in kept] for q in (band.lower, band.median, band.upper))
        if band is part.worst_loss or band is part.global_bound:
            axes.fill_between(radii, lower, upper, color=color, alpha=0.15, linewidth=0)
        axes.plot(radii, median, style, color=color, label=label)
    if 0 < part.feature_radius.median < float("inf"):
        axes.axvline(
            part.feature_radius.median,
            color="#6b7280",
            linestyle=":",
            linewidth=1,
            label="half of the predictions may change",
        )
    axes.set(xscale="log", yscale="log", xlabel="R, L2 length in feature space", ylabel="loss")
    axes.set_title("What flatness promises, and what happens")
    axes.legend()
    return figure
