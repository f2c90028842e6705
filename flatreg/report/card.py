"""The geometry card as a terminal prints it, and kappa by outcome as a report does."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from flatreg.data.files import write_whole
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.evaluation.geometry.card import (
    SCHEMA,
    BoundsPart,
    CurvaturePart,
    Directions,
    GeometryCard,
    KappaPart,
    LayersPart,
    SharpnessPart,
)
from flatreg.measures.estimate import Estimate, Quartiles

WIDTH = 100
_LAYERS = 12  # printed; all of them are in the JSON
_RADII = 6


def card_text(card: GeometryCard) -> str:
    """The whole card, at most 100 columns wide."""
    lines = [
        f"{card.model}, {card.parameters:,} parameters",
        f"{card.data}: {card.n} images, {card.probed} of them probed; "
        f"{card.norm.capitalize()} eps {card.eps:.4g}, seed {card.seed}",
        "larger = sharper throughout; ± is one standard error, [..] are quartiles over images",
    ]
    if card.kappa:
        lines += ["", *_kappa(card.kappa)]
    if card.layers:
        lines += ["", *_layers(card.layers)]
    if card.curvature:
        lines += ["", *_curvature(card.curvature)]
    if card.bounds:
        lines += ["", *_bounds(card.bounds, card)]
    if card.sharpness:
        lines += ["", *_sharpness(card.sharpness)]
    lines.append("")
    for part, reason in card.refused.items():
        lines += _wrapped(f"refused   {part}: {reason}")
    for note in card.notes:
        lines += _wrapped(f"note      {note}")
    spent = ", ".join(f"{part} {value:.1f}" for part, value in card.seconds.items())
    lines += _wrapped(f"seconds   {spent}")
    return "\n".join(line[:WIDTH] for line in lines)


def outcome_table(arms: Mapping[str, FlatnessByOutcome]) -> str:
    """Markdown table of relative flatness by outcome, a row an arm."""
    outcomes = ("clean", "right", "wrong", "attacked")
    lines = [
        f"| | {' | '.join(f'{name} | {name}*' for name in outcomes)} |",
        f"|---|{'---:|' * 8}",
    ]
    for arm, by_outcome in arms.items():
        cells = []
        for name in outcomes:
            flatness = getattr(by_outcome, name)
            for value in (flatness.raw, flatness.matched):
                cells.append("-" if value is None else plus_minus(value))
            cells[-2] += f" (n = {flatness.n})"
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plus_minus(value: Estimate | None) -> str:
    """Value and standard error to the digits that the error leaves.

    >>> def _mean(value, error):
    ...     return Estimate(value, value - 1.96 * error, value + 1.96 * error, 8, "mean")
    >>> plus_minus(_mean(72.93, 19.2)), plus_minus(_mean(3.349, 0.0532))
    ('73 ± 19', '3.349 ± 0.053')
    >>> plus_minus(_mean(0.0000234, 0.000009))
    '2.3e-05 ± 9e-06'
    """
    if value is None:
        return "-"
    size = max(abs(value.value), value.stderr)
    if not (value.stderr > 0 and math.isfinite(size)):
        return f"{value.value:.3g}"
    if not 1e-3 <= size < 1e6:
        digits = max(0, math.floor(math.log10(size)) - math.floor(math.log10(value.stderr)))
        return f"{value.value:.{digits}e} ± {value.stderr:.0e}"
    decimals = max(0, 1 - math.floor(math.log10(value.stderr)))
    return f"{value.value:.{decimals}f} ± {value.stderr:.{decimals}f}"


def short_names(names: Iterable[str]) -> list[str]:
    """Paths of layers without the wrapper that all of them are in.

    >>> short_names(["model.stem", "model.head.fc"])
    ['stem', 'head.fc']
    """
    paths = list(names)
    first = paths[0].split(".")[0] + "."
    shared = all(path.startswith(first) for path in paths)
    return [path.removeprefix(first) for path in paths] if shared else paths


def _kappa(part: KappaPart) -> list[str]:
    by_outcome = part.by_outcome
    lines = [
        "KAPPA  relative flatness of the last layer",
        f"  {'':<10}{'n':>6}{'raw':>22}{f'at confidence {by_outcome.confidence:g}':>22}",
    ]
    for name in ("clean", "right", "wrong", "attacked"):
        flatness = getattr(by_outcome, name)
        lines.append(
            f"  {name:<10}{flatness.n:>6}{plus_minus(flatness.raw):>22}"
            f"{plus_minus(flatness.matched):>22}"
        )
    lines.append(
        "  attacked: those right that PGD-10 flips within eps, at the first image beyond the flip"
    )
    if by_outcome.scale is None:
        lines.append("  no scale of the logits has that median confidence")
    return lines


def _layers(part: LayersPart) -> list[str]:
    probes = part.hessian.kappa.n
    lines = [
        f"LAYERS  mean loss of {part.n} images, {probes} probes; ± over probes",
        f"  {'':<38}{'kappa':>19}{'Gauss-Newton':>19}{'Hessian trace':>19}",
    ]
    order = sorted(
        part.hessian.layers, key=lambda name: -abs(part.gauss_newton.layers[name].kappa.value)
    )
    shown = set(order[:_LAYERS])
    short = dict(zip(part.hessian.layers, short_names(part.hessian.layers), strict=True))
    for name, layer in part.hessian.layers.items():
        if name in shown:
            path = short[name] if len(short[name]) <= 36 else f"..{short[name][-34:]}"
            flat = part.gauss_newton.layers[name].kappa
            lines.append(
                _row(path, plus_minus(layer.kappa), plus_minus(flat), plus_minus(layer.trace))
            )
    if len(order) > _LAYERS:
        lines.append(f"  .. and {len(order) - _LAYERS} layers of smaller Gauss-Newton kappa")
    total = part.hessian
    lines.append(
        _row(
            f"sum of {len(order)} layers",
            plus_minus(total.kappa),
            plus_minus(part.gauss_newton.kappa),
            plus_minus(total.trace),
        )
    )
    return lines


def _curvature(part: CurvaturePart) -> list[str]:
    share = part.explained_variance
    explained = "" if share is None else f", {share:.1%} of the variance of the training images"
    sides = {"on": part.on, "off": part.off} if part.on else {"off": part.off}
    lines = [
        "CURVATURE  of the loss in the input, per squared unit of L2; median [quartiles]",
        f"  manifold: {part.manifold.split('(')[0]}{explained}",
        f"  {'':<26}"
        + "".join(
            f"{f'{name} the manifold, {side.dimension} dim.':>34}" for name, side in sides.items()
        ),
    ]
    rows = {
        "length of the gradient": "slope",
        "mean, trace / dimension": "curvature",
        "along the gradient": "along_gradient",
        "largest": "top",
    }
    for label, field in rows.items():
        cells = "".join(f"{_quartiles(getattr(side, field)):>34}" for side in sides.values())
        lines.append(f"  {label:<26}{cells}")
    if any(_unsure(side) for side in sides.values()):
        residuals = ", ".join(f"{side.residual:.2g} {name}" for name, side in sides.items())
        lines.append(f"  largest: Lanczos left residuals of {residuals} (median)")
    return lines


def _unsure(side: Directions) -> bool:
    return side.residual > 0.01 * abs(side.top.median)


def _bounds(part: BoundsPart, card: GeometryCard) -> list[str]:
    count = len(part.radii)
    picks = sorted(
        {round(i * (count - 1) / max(1, _RADII - 1)) for i in range(_RADII)} & {*range(count)}
    )
    curves = {
        "largest loss found": part.worst_loss,
        "global bound": part.global_bound,
        "local bound": part.local_bound,
        "the same from kappa": part.relative_bound,
    }
    lines = [
        f"BOUNDS  on the loss, features moved by R; median over {card.probed} images",
        f"  {'R':<26}" + "".join(f"{part.radii[i]:>11.3g}" for i in picks),
        *(
            f"  {label:<26}" + "".join(f"{band.median[i]:>11.3g}" for i in picks)
            for label, band in curves.items()
        ),
        f"  prediction fixed within R = {_quartiles(part.feature_radius)}; exact, < 0 where wrong",
    ]
    if part.lipschitz is not None and part.reach is not None:
        lines += [
            f"  Lipschitz number of the features, {part.lipschitz_kind} (no bound): "
            f"{_quartiles(part.lipschitz)}",
            f"  by that {part.lipschitz_kind} the {card.norm.capitalize()} ball of eps reaches R = "
            f"{part.reach:.3g}",
        ]
    if part.lipschitz_refused:
        lines += _wrapped(f"  Lipschitz refused: {part.lipschitz_refused}")
    return lines


def _sharpness(part: SharpnessPart) -> list[str]:
    lines = [f"SHARPNESS  of the mean loss of {part.n} images, in all weights"]
    for rise in part.rises:
        unit = " |w|" if rise.radius.adaptive else ""
        what = "noise of" if rise.kind == "average" else "L2 ball of"
        over = "draws" if rise.kind == "average" else "blocks of 16 images"
        found = rise.rise
        error = "" if math.isnan(found.stderr) else f" ± {found.stderr:.1g}"
        lines.append(
            f"  {rise.kind + ' rise':<18}{f'{what} {rise.radius.rho:g}{unit}':<24}"
            f"{found.value:>10.3g}{error:<10} over {found.n} {over}"
        )
    if part.trace and part.top_eigenvalue:
        lines.append(f"  {'Hessian':<18}{'trace':<24}{plus_minus(part.trace):>20}")
        lines.append(f"  {'':<18}{'largest eigenvalue':<24}{part.top_eigenvalue!s:>20}")
    if part.hessian_refused:
        lines += _wrapped(f"  Hessian refused: {part.hessian_refused}")
    return lines


def _row(name: str, *cells: str) -> str:
    return f"  {name:<38}" + "".join(f"{cell:>19}" for cell in cells)


def _quartiles(spread: Quartiles) -> str:
    return f"{spread.median:.3g} [{spread.lower:.3g}, {spread.upper:.3g}]"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 10)


_CARD = TypeAdapter(GeometryCard)


def write_card(card: GeometryCard, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `card.json` and `card.md`; `figures` maps file names to captions."""
    write_whole(folder / "card.json", _CARD.dump_json(card, indent=1).decode())
    write_whole(
        folder / "card.md",
        f"# Geometry of {card.model}\n\n```\n{card_text(card)}\n```\n\n{pictures(figures)}\n",
    )


def read_card(folder: Path) -> GeometryCard:
    """Read `card.json` back.

    Raises:
        ValueError: it has another schema.
    """
    text = (folder / "card.json").read_text()
    found = json.loads(text).get("schema")
    if found != SCHEMA:
        raise ValueError(f"{folder}/card.json: expected schema {SCHEMA}, got {found}")
    return _CARD.validate_json(text)


def pictures(figures: Mapping[str, str]) -> str:
    """Markdown of figures, given as file name to caption."""
    return "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items())
