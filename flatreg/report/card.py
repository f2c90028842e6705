"""The geometry card in the terminal and on disk, and the table of kappa by outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import flatreg.evaluation.geometry.card as geometry
import flatreg.report.tables as tables
from flatreg.data.files import read_json, write_json, write_whole
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.report.tables import WIDTH, number, plus_minus, quartiles, terminal, wrapped

_LAYERS = 12  # printed; all of them are in the JSON
_RADII = 6
_OUTCOMES = ("clean", "right", "wrong", "attacked")


def card_text(card: geometry.GeometryCard) -> str:
    """The whole card, at most 100 columns wide."""
    lines = [
        f"{card.model}, {card.parameters:,} parameters",
        f"{card.data}: {card.n} images, {card.probed} of them probed; "
        f"{card.norm.capitalize()} eps {card.eps:.4g}, seed {card.seed}",
        "larger = sharper throughout; ± is one standard error, [..] are quartiles over images",
    ]
    for name, lines_of in _LINES.items():
        found = getattr(card, name)
        lines += ["", *lines_of(found, card)] if found else []
    lines.append("")
    for refused, reason in card.refused.items():
        lines += wrapped("refused", f"{refused}: {reason}")
    for note in card.notes:
        lines += wrapped("note", note)
    spent = ", ".join(f"{part} {value:.1f}" for part, value in card.seconds.items())
    lines += wrapped("seconds", spent)
    return "\n".join(tables.flat(line)[:WIDTH] for line in lines)


def kappa_cells(arms: Mapping[str, FlatnessByOutcome]) -> tables.Cells:
    """Table of kappa by outcome, a row an arm."""
    heads = [head for outcome in _OUTCOMES for head in (outcome, f"{outcome}*")]
    rows = []
    for arm, by_outcome in arms.items():
        found = [getattr(by_outcome, outcome) for outcome in _OUTCOMES]
        pairs = [(f"{plus_minus(f.raw)} (n = {f.n})", plus_minus(f.matched)) for f in found]
        rows.append([arm, *(cell for pair in pairs for cell in pair)])
    return ["arm", *heads], rows


def short_names(names: Iterable[str]) -> list[str]:
    """Paths of layers without the wrapper that all of them are in.

    >>> short_names(["model.stem", "model.head.fc"])
    ['stem', 'head.fc']
    """
    paths = list(names)
    first = paths[0].split(".")[0] + "."
    shared = all(path.startswith(first) for path in paths)
    return [path.removeprefix(first) for path in paths] if shared else paths


def _kappa(part: geometry.KappaPart, card: geometry.GeometryCard) -> list[str]:
    by_outcome = part.by_outcome
    heads = ("", "n", "kappa", "kappa*")
    found = [(outcome, getattr(by_outcome, outcome)) for outcome in _OUTCOMES]
    rows = [[name, str(f.n), plus_minus(f.raw), plus_minus(f.matched)] for name, f in found]
    lines = [
        "KAPPA  relative flatness of the last layer",
        *terminal(heads, rows, indent=2),
        f"  kappa*: at one scale of the logits, with median confidence {by_outcome.confidence:g}",
        "  attacked: those right that PGD-10 flips within eps, at the first image beyond the flip",
    ]
    if by_outcome.scale is None:
        lines.append("  no scale of the logits has that median confidence")
    return lines


def _layers(part: geometry.LayersPart, card: geometry.GeometryCard) -> list[str]:
    """Those of the largest Gauss-Newton kappa, in the order of the network, and the sum."""
    hessian, flat = part.hessian.layers, part.gauss_newton.layers
    order = sorted(hessian, key=lambda name: -abs(flat[name].kappa.value))
    shown = set(order[:_LAYERS])
    rows = []
    for path, (name, layer) in zip(short_names(hessian), hessian.items(), strict=True):
        if name in shown:
            short = path if len(path) <= 36 else f"..{path[-34:]}"
            rows.append([short, *map(plus_minus, (layer.kappa, flat[name].kappa, layer.trace))])
    if len(order) > _LAYERS:
        rest = len(order) - _LAYERS
        rows.append([f".. and {rest} layers of smaller Gauss-Newton kappa"])
    total = (part.hessian.kappa, part.gauss_newton.kappa, part.hessian.trace)
    rows.append([f"sum of {len(order)} layers", *map(plus_minus, total)])
    heads = ("", "kappa", "Gauss-Newton kappa", "Hessian trace")
    probes = part.hessian.kappa.n
    return [
        f"LAYERS  mean loss of {part.n} images, {probes} probes; ± over probes",
        *terminal(heads, rows, cut=36, indent=2),
    ]


def _curvature(part: geometry.CurvaturePart, card: geometry.GeometryCard) -> list[str]:
    share = part.explained_variance
    explained = "" if share is None else f", {share:.1%} of the variance of the training images"
    sides = {"on": part.on, "off": part.off} if part.on else {"off": part.off}
    heads = ["", *(f"{name} the manifold, {side.dimension} dim." for name, side in sides.items())]
    fields = {
        "length of the gradient": "slope",
        "mean curvature": "curvature",
        "along the gradient": "along_gradient",
        "largest": "top",
    }
    rows = [
        [label, *(quartiles(getattr(side, field)) for side in sides.values())]
        for label, field in fields.items()
    ]
    lines = [
        "CURVATURE  of the loss in the input, per squared unit of L2; median [quartiles]",
        f"  manifold: {part.manifold.split('(')[0]}{explained}",
        *terminal(heads, rows, indent=2),
        "  mean curvature: Hessian trace / dimension",
    ]
    if any(side.residual > 0.01 * abs(side.top.median) for side in sides.values()):
        residuals = ", ".join(f"{side.residual:.2g} {name}" for name, side in sides.items())
        lines.append(f"  largest: Lanczos left residuals of {residuals} (median)")
    return lines


def _bounds(part: geometry.BoundsPart, card: geometry.GeometryCard) -> list[str]:
    last = len(part.radii) - 1
    picks = sorted({round(i * last / (_RADII - 1)) for i in range(_RADII)} & {*range(last + 1)})
    curves = {
        "largest loss found": part.worst_loss,
        "global bound": part.global_bound,
        "local bound": part.local_bound,
        "the same from kappa": part.relative_bound,
    }
    heads = ["R", *(number(part.radii[i]) for i in picks)]
    rows = [[label, *(number(band.median[i]) for i in picks)] for label, band in curves.items()]
    lines = [
        f"BOUNDS  on the loss, features moved by R; median over {card.probed} images",
        *terminal(heads, rows, indent=2),
        f"  prediction fixed within R = {quartiles(part.feature_radius)}; exact, < 0 where wrong",
    ]
    if part.lipschitz is not None and part.reach is not None:
        lines += [
            f"  Lipschitz number of the features, {part.lipschitz_kind} (no bound): "
            f"{quartiles(part.lipschitz)}",
            f"  by that {part.lipschitz_kind} the {card.norm.capitalize()} ball of eps reaches "
            f"R = {part.reach:.3g}",
        ]
    if part.lipschitz_refused:
        lines += wrapped("  Lipschitz", f"refused: {part.lipschitz_refused}")
    return lines


def _sharpness(part: geometry.SharpnessPart, card: geometry.GeometryCard) -> list[str]:
    rows = []
    for rise in part.rises:
        average, n = rise.kind == "average", rise.rise.n
        size = f"{rise.radius.size:g}{' |w|' if rise.radius.adaptive else ''}"
        what = f"noise of {size}" if average else f"L2 ball of {size}"
        block = f"block{'s' * (n > 1)} of {min(16, part.n)} images"  # the only one may be smaller
        over = "draws" if average else block
        rows.append([f"{rise.kind} rise", what, plus_minus(rise.rise), f"over {n} {over}"])
    if part.trace and part.top_eigenvalue:
        rows.append(["Hessian", "trace", plus_minus(part.trace), ""])
        rows.append(["", "largest eigenvalue", str(part.top_eigenvalue), ""])
    lines = [
        f"SHARPNESS  of the mean loss of {part.n} images, in all weights",
        *terminal([""] * 4, rows, left=2, indent=2),
    ]
    if part.hessian_refused:
        lines += wrapped("  Hessian", f"refused: {part.hessian_refused}")
    return lines


_LINES: dict[geometry.Part, Callable[[Any, geometry.GeometryCard], list[str]]] = {
    "kappa": _kappa,
    "layers": _layers,
    "curvature": _curvature,
    "bounds": _bounds,
    "sharpness": _sharpness,
}
_CARD = TypeAdapter(geometry.GeometryCard)


def write_card(card: geometry.GeometryCard, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `card.json` and `card.md`; `figures` maps file names to captions."""
    write_json(folder / "card.json", card, _CARD)
    write_whole(
        folder / "card.md",
        f"# Geometry of {tables.escaped(card.model)}\n\n{tables.fenced(card_text(card))}\n\n"
        f"{tables.pictures(figures)}\n",
    )


def read_card(folder: Path) -> geometry.GeometryCard:
    """Read `card.json` back.

    Raises:
        ValueError: it has another schema, or is no card.
        OSError: there is none.
    """
    return read_json(folder / "card.json", _CARD, what="a geometry card", schema=geometry.SCHEMA)
