"""How a report and a sweep read: in the terminal, and as `report.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flatreg.report.tables as tables
from flatreg.data.files import write_whole
from flatreg.data.sources import evaluated_on, source_name
from flatreg.data.text import counted
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.evaluation.geometry.input_curvature import InputCurvature
from flatreg.evaluation.results import spot_checks
from flatreg.report.card import kappa_cells
from flatreg.report.rows import Report, Row, clean_kappa, write_report_file
from flatreg.report.tables import LEGENDS, percent, plus_minus

if TYPE_CHECKING:
    from flatreg.run.sweep import Sweep, Trial

KAPPA_MEANINGS = {name: LEGENDS[name] for name in ("kappa", "kappa*")} | {
    "attacked": "images that are classified right and that a PGD of 10 steps flips within eps, at "
    "the first image beyond the flip"
}


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    heads = ("", "clean %", "attacked %", "kappa", "kappa*", "time")
    rows = [
        [
            row.name,
            percent(row.evaluation.clean),
            percent(row.evaluation.attacked),
            tables.number(row.kappa()),
            tables.number(row.kappa(matched=True)),
            tables.ratio(row.time_ratio),
        ]
        for row in report.rows
    ]
    flags = [(row.name, flag) for row in report.rows for flag in tables.flags(row.flagged_findings)]
    lines = [
        f"{evaluated_on(recipe)}, {report.networks}, {trained_for(recipe)}; "
        f"{first.norm} eps {first.eps:.4g}, n = {first.n}",
        *tables.terminal(heads, rows),
        "",
        *tables.legend("[..]", "attacked"),
        *(f"          {stage.attack}" for stage in first.stages),
        *(line for row in report.rows for line in _bounds(row)),
        *tables.legend("kappa", "kappa*", "time"),
        *_flagged(flags),
    ]
    return "\n".join(map(tables.fitted, lines))


def _bounds(row: Row) -> list[str]:
    """What a spot check leaves open of an arm, under each threat."""
    return [
        line
        for threat, _, check in spot_checks(row.evaluation)
        if check.at_most
        for line in tables.wrapped(
            "bound", f"{row.name}, {threat.norm} eps {threat.eps:.4g}: the last stage {check}"
        )
    ]


def trained_for(recipe: Mapping[str, Any], *more: str) -> str:
    """Epochs and seed of a training of ours."""
    epochs, seed = recipe["epochs"], f"seed {recipe['seed']}"
    if not epochs:  # of ours
        return f"trained elsewhere, evaluation {seed}"
    return ", ".join([counted(epochs, "epoch"), *more, seed])


def _flagged(flags: Iterable[tuple[object, str]]) -> list[str]:
    """Lines of the findings, each with what it is about."""
    text = "; ".join(f"{name}: {flag}" for name, flag in flags)
    return tables.wrapped("findings", text or "none flagged")


def sweep_table(result: Sweep) -> str:
    """All trials and the best of them, at most 100 columns wide."""
    recipe, threat = result.recipe, result.recipe["evaluation"]
    n = next((trial.evaluation.n for trial in result.trials if trial.evaluation), 0)
    heads = (result.key, "clean %", "attacked %", "kappa", "kappa*", "seconds")
    if result.best is None:
        best = "none: every training failed"
    else:
        tied = f"also: {', '.join(map(str, result.tied))}" if result.tied else "no other value"
        best = f"{result.best} by attacked accuracy; its interval covers {tied}"
    lines = [
        f"{source_name(recipe['data'])}, {recipe['model']['name']}, arm {result.arm}, "
        f"{counted(recipe['epochs'], 'epoch')}, seed {recipe['seed']}; "
        f"{threat['norm']} eps {threat['eps']:.4g}, n = {n} validation images",
        *tables.terminal(heads, map(_trial, result.trials)),
        "",
        *tables.wrapped("best", best),
        *tables.legend("[..]", "kappa", "kappa*"),
        *tables.wrapped("seed", "another seed may move a number by more than its interval"),
        *_flagged((t.value, flag) for t in result.trials for flag in tables.flags(t.findings)),
    ]
    return "\n".join(map(tables.fitted, lines))


def _trial(trial: Trial) -> list[str]:
    if trial.evaluation is None:
        return [str(trial.value), f"failed: {trial.failure}"]
    return [
        str(trial.value),
        percent(trial.evaluation.clean),
        percent(trial.evaluation.attacked),
        tables.number(clean_kappa(trial.relative_flatness, False)),
        tables.number(clean_kappa(trial.relative_flatness, True)),
        f"{trial.seconds:.0f}",
    ]


def write_report(report: Report, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `report.json` and `report.md`; `figures` maps file names to captions."""
    write_report_file(report, folder)
    stages = "\n\n".join(
        f"{tables.strong(row.name)}\n\n{tables.fenced(_evaluated(row))}" for row in report.rows
    )
    traces = trace_cells(report.rows)
    parts = (
        f"# Report\n\n{tables.fenced(table(report))}",
        tables.pictures(figures),
        f"## Kappa by outcome\n\n{tables.markdown(*kappa_cells(kappas(report.rows)))}",
        tables.bullets(KAPPA_MEANINGS),
        "kappa knows no label, only confidence.",
        "## Gauss-Newton trace",
        tables.markdown(*traces) if traces[1] else "Could not be measured.",
        tables.bullets(trace_meanings(report.rows)),
        f"## Evaluations\n\n{stages}",
        f"## Recipe\n\n{tables.fenced(json.dumps(report.recipe, indent=1), 'json')}\n",
    )
    write_whole(folder / "report.md", "\n\n".join(parts))


def _evaluated(row: Row) -> str:
    """Everything that was found on an arm."""
    against = f"\n\nagainst the plain arm, {row.comparison}" if row.comparison else ""
    check = row.adaptive_check
    checked = f"\n\nadaptive check of the survivors, {check}" if check else ""
    return f"{row.evaluation}{against}{checked}"


def kappas(rows: Iterable[Row]) -> dict[str, FlatnessByOutcome]:
    """Kappa by outcome of every arm that has it."""
    return {row.name: row.relative_flatness for row in rows if row.relative_flatness}


def trace_cells(rows: Iterable[Row]) -> tables.Cells:
    """The Gauss-Newton trace, a row an arm where it was measured."""
    measured = [(row.name, row.input_curvature) for row in rows if row.input_curvature]
    cells = [
        [name]
        + [
            plus_minus(getattr(sides, side) if sides else None)
            for side in ("off", "on")
            for sides in (trace.raw, trace.matched)
        ]
        for name, trace in measured
    ]
    return ("arm", "off", "off*", "on", "on*"), cells


def trace_meanings(rows: Iterable[Row]) -> dict[str, str]:
    """What the columns of `trace_cells` are; nothing where it was not measured."""
    measured = [row.input_curvature for row in rows if row.input_curvature]
    if not measured:
        return {}
    return {
        "off": trace_legend(measured[:1]),
        "on": f"the same on these {measured[0].rank} components, which hold "
        f"{100 * measured[0].explained:.0f}% of the variance of the training images",
        "off*, on*": "the same at matched confidence, as for kappa*",
    }


def trace_legend(measured: Sequence[InputCurvature]) -> str:
    """What the Gauss-Newton traces of a table are; images of several sizes differ in it."""
    spaces = dict.fromkeys(
        f"{c.pixels - c.rank} of {c.pixels} directions are off the first {c.rank} principal "
        "components of the training images"
        for c in measured
    )
    return (
        "trace of the Gauss-Newton matrix of the loss in the input, off the data manifold, at "
        f"{measured[0].raw.off.n} clean images, in loss per squared input unit, mean ± "
        f"standard error; larger = sharper; {'; or '.join(spaces)}"
    )
