"""How a report reads: the table in the terminal, and as Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from flatreg.data.sources import source_name
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.report.arms import Report, Row
from flatreg.report.card import outcome_table, pictures, plus_minus
from flatreg.run.checkpoints import flagged

_KAPPA = (
    f"kappa of the last layer, mean ± standard error, larger = sharper; * at median confidence "
    f"{CONFIDENCE}. Attacked: samples classified right that a PGD of 10 steps flips within eps, at "
    "the first image beyond the flip. kappa knows no label, only confidence."
)


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    models = ", ".join(dict.fromkeys(row.model["name"] for row in report.rows))
    lines = [
        f"{source_name(recipe['data'])}, {models}, {recipe['epochs']} epochs, "
        f"seed {recipe['seed']}; {first.norm} eps {first.eps:.4g}, n = {first.n}",
        f"{'':<26}{'clean %':>18}{'attacked %':>20}{'kappa':>9}{'kappa*':>9}{'time':>8}",
    ]
    for row in report.rows:
        result = row.evaluation
        ratio = "" if row.time_ratio is None else f"{row.time_ratio:.2f}x"
        clean = row.relative_flatness.clean if row.relative_flatness else None
        kappa, matched = (
            "-" if estimate is None else f"{estimate.value:.3g}"
            for estimate in ((clean.raw, clean.matched) if clean else (None, None))
        )
        lines.append(
            f"{row.name[:25]:<26}{_percent(result.clean):>18}{_percent(result.attacked):>20}"
            f"{kappa:>9}{matched:>9}{ratio:>8}"
        )
    findings = textwrap.wrap(f"findings  {_findings(report)}", 100, subsequent_indent=" " * 10)
    lines += [
        "",
        "[..]      Wilson 95% interval",
        "attacked  accuracy under the cascade, an upper bound on robust accuracy:",
        *(f"          {stage.attack}" for stage in first.stages),
        "kappa     relative flatness of the last layer, larger = sharper; "
        f"* at median confidence {CONFIDENCE}",
        "time      median epoch over the plain twin's, in this run",
        *findings,
    ]
    return "\n".join(line[:100] for line in lines)


def flagged_findings(row: Row) -> list[Finding]:
    """Flagged findings of an arm: of its training, its evaluation and its scrutiny."""
    found = [
        *flagged(row.history),
        *row.evaluation.findings,
        *(row.adaptive_check.findings if row.adaptive_check else []),
    ]
    return [finding for finding in found if finding.verdict == "flagged"]


def markdown(report: Report, figures: Mapping[str, str]) -> str:
    """The text of `report.md`; `figures` maps file names to captions."""
    stages = "\n\n".join(f"**{row.name}**\n\n```\n{_judgement(row)}\n```" for row in report.rows)
    recipe = json.dumps(report.recipe, indent=1)
    kappa = outcome_table({r.name: r.relative_flatness for r in report.rows if r.relative_flatness})
    return (
        f"# Report\n\n```\n{table(report)}\n```\n\n{pictures(figures)}\n\n"
        f"## Relative flatness by outcome\n\n{kappa}\n\n{_KAPPA}\n\n"
        f"## Curvature in the input\n\n{_curvature_table(report)}\n\n"
        f"## Evaluations\n\n{stages}\n\n## Recipe\n\n```json\n{recipe}\n```\n"
    )


def _curvature_table(report: Report) -> str:
    """Curvature in the input, a row an arm, and what it is."""
    measured = [(row.name, row.input_curvature) for row in report.rows if row.input_curvature]
    if not measured:
        return "Could not be measured."
    lines = ["| | off | off* | on | on* |", "|---|---:|---:|---:|---:|"]
    for name, curvature in measured:
        cells = [
            plus_minus(getattr(sides, side) if sides else None)
            for side in ("off", "on")
            for sides in (curvature.raw, curvature.matched)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = measured[0][1]
    return "\n".join(
        [
            *lines,
            "",
            "Trace of the Gauss-Newton curvature of the loss in the input, loss per squared input "
            f"unit, mean ± standard error of {first.raw.off.n} clean test images; larger = "
            f"sharper; * at median confidence {CONFIDENCE}. On: the {first.rank} principal "
            f"components of the training images, which hold {100 * first.explained:.0f}% of their "
            f"variance. Off: the other {first.pixels - first.rank} directions.",
        ]
    )


def _judgement(row: Row) -> str:
    """All that was found out about an arm."""
    lines = [str(row.evaluation)]
    if row.comparison:
        lines.append(f"\nagainst plain, {row.comparison}")
    if row.adaptive_check:
        lines.append(f"\nsurvivors scrutinised, {row.adaptive_check}")
    return "\n".join(lines)


def _percent(accuracy: Any) -> str:
    return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _findings(report: Report) -> str:
    found = [
        f"{row.name}: {f.name} {f.value:.2f} > {f.threshold:.2f}"
        for row in report.rows
        for f in flagged_findings(row)
    ]
    return "; ".join(found) if found else "none flagged"
