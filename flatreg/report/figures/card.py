"""Figures of a geometry card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import flatreg.evaluation.geometry.card as geometry
from flatreg.measures.estimate import QuantileBand
from flatreg.report.card import short_names
from flatreg.report.figures.style import (
    COLORS,
    INK,
    OUTCOME_COLORS,
    draw_range,
    panels,
    save_formats,
    styled,
)
from flatreg.report.tables import figure_text

_POINTS: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2}
_MARKERS = {"right": "o", "wrong": "s", "attacked": "D"}


def draw_card(card: geometry.GeometryCard, folder: Path) -> dict[str, str]:
    """Draw every part of `card` that was measured into `folder`; names of the PNG, and captions."""
    figures: dict[str, tuple[Any, Callable[[Any], Figure], str]] = {
        "card_kappa.png": (
            card.kappa,
            kappa_against_confidence,
            "kappa against confidence, mean ± standard error in bins. kappa knows no "
            "label: compare wrong and attacked samples with right ones of the same confidence.",
        ),
        "card_layers.png": (
            card.layers,
            layer_profile,
            "kappa of every layer with its standard error over probes. That of the Hessian "
            "may be negative below the head.",
        ),
        "card_curvature.png": (
            card.curvature,
            curvature_on_and_off,
            "Curvature of the loss in the input on and off the data manifold: median and quartiles "
            "over images.",
        ),
        "card_bounds.png": (
            card.bounds,
            loss_bounds,
            "Bounds on the loss when the features move by R, and the largest loss found: median "
            "over images, with quartiles of the latter and of the global bound. The local bound "
            "follows from flatness; it is tight near 0 and loose further out.",
        ),
    }
    drawn = {name: entry for name, entry in figures.items() if entry[0] is not None}
    for name, (part, figure_of, _) in drawn.items():
        save_formats(figure_of(part), folder / name)
    return {name: caption for name, (_, _, caption) in drawn.items()}


@styled
def kappa_against_confidence(part: geometry.KappaPart) -> Figure:
    """Relative flatness against 1 - confidence, right, wrong and attacked samples apart."""
    raw, matched = part.by_confidence, part.by_confidence_matched
    titles = {"kappa": raw, f"kappa*: at median confidence {part.by_outcome.confidence:g}": matched}
    titles = {title: bins for title, bins in titles.items() if bins}
    size = (4.4 * len(titles), 3.6)
    figure, (line,) = panels(1, len(titles), size, sharex=True, sharey=True)
    for axes, (title, bins) in zip(line, titles.items(), strict=True):
        for outcome, marker in _MARKERS.items():
            points = [
                (b.uncertainty[outcome], kappa.value, kappa.stderr)
                for b in bins
                if (kappa := b.kappa[outcome])
            ]
            if points:
                x, y, error = zip(*points, strict=True)
                style = _POINTS | {"fmt": f"{marker}-", "color": OUTCOME_COLORS[outcome]}
                style |= {"markersize": 5, "markerfacecolor": "none", "linewidth": 0.8}
                axes.errorbar(x, y, yerr=error, label=outcome, **style)
        axes.set(title=title, xscale="log", yscale="log", xlabel="1 - confidence")
    line[0].invert_xaxis()  # shared: confidence grows to the right
    line[0].set_ylabel("kappa (larger = sharper)")
    line[0].legend()
    figure.tight_layout()
    return figure


@styled
def layer_profile(part: geometry.LayersPart) -> Figure:
    """Relative flatness of every layer, the first on top."""
    names = list(part.hessian.layers)
    figure, ((axes,),) = panels(1, 1, (7.2, 1.2 + 0.24 * len(names)))
    for shift, color, label, flatness in (
        (-0.14, COLORS[5], "Hessian", part.hessian),
        (0.14, COLORS[1], "Gauss-Newton", part.gauss_newton),
    ):
        kappas = [flatness.layers[name].kappa for name in names]
        x, y = [k.value for k in kappas], [row + shift for row in range(len(names))]
        error = [k.stderr for k in kappas]
        axes.errorbar(x, y, xerr=error, color=color, label=label, **_POINTS)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), list(map(figure_text, short_names(names))), fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("kappa (larger = sharper)")
    axes.set_title(f"Layers, mean loss of {part.n} images")
    axes.legend()
    return figure


@styled
def curvature_on_and_off(part: geometry.CurvaturePart) -> Figure:
    """Mean curvature, curvature along the gradient and the largest, on and off the manifold."""
    labels = {
        "mean curvature\n(Hessian trace / dimension)": "curvature",
        "along the gradient": "along_gradient",
        "largest": "top",
    }
    figure, ((axes,),) = panels(1, 1, (6.0, 3.6))
    smallest, medians = list[float](), list[float]()
    sides = (("on", -0.1, COLORS[5], part.on), ("off", 0.1, COLORS[4], part.off))
    for name, shift, color, side in sides:
        if side is None:
            continue
        spreads = [getattr(side, field) for field in labels.values()]
        x, y = [i + shift for i in range(len(labels))], [spread.median for spread in spreads]
        below, above = [s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]
        label = f"{name} the manifold, {side.dimension} dimensions"
        axes.errorbar(x, y, yerr=(below, above), fmt="o", color=color, capsize=3, label=label)
        smallest += [spread.lower for spread in spreads]
        medians += y
    if min(smallest) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=max(min(map(abs, medians)), 1e-3 * max(medians), 1e-30))
        axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(labels)), list(labels))
    axes.set(xlim=(-0.5, len(labels) - 0.5), ylabel="loss per squared unit of L2")
    axes.set_title("Curvature of the loss in the input")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


@styled
def loss_bounds(part: geometry.BoundsPart) -> Figure:
    """Bounds on the loss and the largest loss found, over radii in feature space."""
    figure, ((axes,),) = panels(1, 1, (6.4, 4.0))
    curves: list[tuple[str, QuantileBand, str, str]] = [
        ("local bound", part.local_bound, COLORS[5], "-"),
        ("local bound, by kappa", part.relative_bound, COLORS[1], "--"),
        ("global bound", part.global_bound, COLORS[2], "-"),
        ("largest loss found", part.worst_loss, INK, "-"),
    ]
    kept = [i for i, radius in enumerate(part.radii) if radius > 0]
    radii = [part.radii[i] for i in kept]
    for label, band, color, line in curves:
        lower, median, upper = ([q[i] for i in kept] for q in (band.lower, band.median, band.upper))
        banded = band is part.worst_loss or band is part.global_bound
        ends = (lower, upper) if banded else (median, median)
        draw_range(axes, radii, ends, median, color, label, line)
    if 0 < (half := part.feature_radius.median) < float("inf"):
        style = {"color": COLORS[0], "linestyle": ":", "linewidth": 1}
        axes.axvline(half, label="half of the predictions may change", **style)
    axes.set(xscale="log", yscale="log", xlabel="R, L2 length in feature space", ylabel="loss")
    axes.set_title("Bounds from flatness, and the largest loss found")
    axes.legend()
    return figure
