"""How a report reads: the table in the terminal, and `report.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flatreg.data.files import write_whole
from flatreg.data.sources import source_name
from flatreg.evaluation.geometry.input_curvature import InputCurvature
from flatreg.report.card import outcome_table
from flatreg.report.rows import Report, Row, write_report_file
from flatreg.report.tables import (
    LEGENDS,
    bullets,
    flags,
    legend,
    markdown,
    number,
    percent,
    pictures,
    plus_minus,
    ratio,
    terminal,
    wrapped,
)

_HEADS = ("", "clean %", "attacked %", "kappa", "kappa*", "time")
_ATTACKED = (
    "images that are classified right and that a PGD of 10 steps flips within eps, at the first "
    "image beyond the flip"
)


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    models = ", ".join(dict.fromkeys(row.model["name"] for row in report.rows))
    rows = [
        [
            row.name,
            percent(row.evaluation.clean),
            percent(row.evaluation.attacked),
            number(row.kappa()),
            number(row.kappa(matched=True)),
            ratio(row.time_ratio),
        ]
        for row in report.rows
    ]
    found = [f"{row.name}: {flag}" for row in report.rows for flag in flags(row.flagged_findings)]
    lines = [
        f"{source_name(recipe['data'])}, {models}, {recipe['epochs']} epochs, "
        f"seed {recipe['seed']}; {first.norm} eps {first.eps:.4g}, n = {first.n}",
        *terminal(_HEADS, rows),
        "",
        *legend("[..]", "attacked"),
        *(f"          {stage.attack}" for stage in first.stages),
        *legend("kappa", "kappa*", "time"),
        *wrapped("findings", "; ".join(found) or "none flagged"),
    ]
    return "\n".join(line[:100] for line in lines)


def write_report(report: Report, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `report.json` and `report.md`; `figures` maps file names to captions."""
    write_report_file(report, folder)
    stages = "\n\n".join(f"**{row.name}**\n\n```\n{_evaluated(row)}\n```" for row in report.rows)
    kappa = outcome_table({r.name: r.relative_flatness for r in report.rows if r.relative_flatness})
    meanings = {name: LEGENDS[name] for name in ("kappa", "kappa*")} | {"attacked": _ATTACKED}
    write_whole(
        folder / "report.md",
        f"# Report\n\n```\n{table(report)}\n```\n\n{pictures(figures)}\n\n"
        f"## Relative flatness by outcome\n\n{kappa}\n\n" + "\n".join(bullets(meanings)) + "\n\n"
        "kappa knows no label, only confidence.\n\n"
        f"## Gauss-Newton trace\n\n{_trace_table(report)}\n\n"
        f"## Evaluations\n\n{stages}\n\n"
        f"## Recipe\n\n```json\n{json.dumps(report.recipe, indent=1)}\n```\n",
    )


def trace_legend(measured: Sequence[InputCurvature]) -> str:
    """What the Gauss-Newton traces of a table are; images of several sizes differ in it."""
    spaces = dict.fromkeys(
        f"{c.pixels - c.rank} of {c.pixels} directions are off the first {c.rank} principal "
        "components of the training images"
        for c in measured
    )
    return (
        "trace of the Gauss-Newton matrix of the loss in the input, off the data manifold, at "
        f"{measured[0].raw.off.n} clean test images, in loss per squared input unit, mean ± "
        f"standard error; larger = sharper; {'; or '.join(spaces)}"
    )


def _trace_table(report: Report) -> str:
    """The Gauss-Newton trace, a row an arm, and what it is."""
    measured = [(row.name, row.input_curvature) for row in report.rows if row.input_curvature]
    if not measured:
        return "Could not be measured."
    rows = [
        [name]
        + [
            plus_minus(getattr(sides, side) if sides else None)
            for side in ("off", "on")
            for sides in (trace.raw, trace.matched)
        ]
        for name, trace in measured
    ]
    first = measured[0][1]
    meanings = {
        "off": trace_legend([first]),
        "on": f"the same on these {first.rank} components, which hold {100 * first.explained:.0f}% "
        "of the variance of the training images",
        "off*, on*": "the same at matched confidence, as for kappa*",
    }
    return (
        markdown(("arm", "off", "off*", "on", "on*"), rows) + "\n\n" + "\n".join(bullets(meanings))
    )


def _evaluated(row: Row) -> str:
    """All that was found out about an arm."""
    lines = [str(row.evaluation)]
    if row.comparison:
        lines.append(f"\nagainst the plain arm, {row.comparison}")
    if row.adaptive_check:
        lines.append(f"\nadaptive check of the survivors, {row.adaptive_check}")
    return "\n".join(lines)
