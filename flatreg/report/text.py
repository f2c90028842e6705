"""How reports and sweeps read: in the terminal, as `report.md`, and as the table of many runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import flatreg.report.rows as rows_of
import flatreg.report.tables as tables
from flatreg.data.files import write_whole
from flatreg.data.sources import evaluated_on, source_name, split_images
from flatreg.evaluation.compare import Comparison, PairedDifference
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.evaluation.geometry.input_curvature import InputCurvature
from flatreg.measures.estimate import Estimate
from flatreg.report.card import kappa_cells
from flatreg.report.rows import Group, Report, Row, Run, Section
from flatreg.report.tables import LEGENDS, percent, plus_minus

if TYPE_CHECKING:
    from flatreg.run.sweep import Sweep, Trial

BEGIN, END = "<!-- table -->", "<!-- /table -->"  # between which `insert_table` writes
KAPPA_MEANINGS = {name: LEGENDS[name] for name in ("kappa", "kappa*")} | {
    "attacked": "images that are classified right and that a PGD of 10 steps flips within eps, at "
    "the first image beyond the flip"
}


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    models = ", ".join(dict.fromkeys(row.model["name"] for row in report.rows))
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
        f"{evaluated_on(recipe)}, {models}, {trained_for(recipe)}; "
        f"{first.norm} eps {first.eps:.4g}, n = {first.n}",
        *tables.terminal(heads, rows),
        "",
        *tables.legend("[..]", "attacked"),
        *(f"          {stage.attack}" for stage in first.stages),
        *tables.legend("kappa", "kappa*", "time"),
        *_flagged(flags),
    ]
    return "\n".join(map(tables.fitted, lines))


def trained_for(recipe: Mapping[str, Any], *more: str) -> str:
    """Epochs and seed of a training of ours."""
    epochs, seed = recipe["epochs"], f"seed {recipe['seed']}"
    if not epochs:  # of ours
        return f"trained elsewhere, evaluation {seed}"
    return ", ".join([f"{epochs} epochs", *more, seed])


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
        f"{recipe['epochs']} epochs, seed {recipe['seed']}; "
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
        tables.number(rows_of.clean_kappa(trial.relative_flatness, False)),
        tables.number(rows_of.clean_kappa(trial.relative_flatness, True)),
        f"{trial.seconds:.0f}",
    ]


def write_report(report: Report, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `report.json` and `report.md`; `figures` maps file names to captions."""
    rows_of.write_report_file(report, folder)
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
    lines = [str(row.evaluation)]
    if row.comparison:
        lines.append(f"\nagainst the plain arm, {row.comparison}")
    if row.adaptive_check:
        lines.append(f"\nadaptive check of the survivors, {row.adaptive_check}")
    return "\n".join(lines)


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
        "off": _trace_legend(measured[:1]),
        "on": f"the same on these {measured[0].rank} components, which hold "
        f"{100 * measured[0].explained:.0f}% of the variance of the training images",
        "off*, on*": "the same at matched confidence, as for kappa*",
    }


def _trace_legend(measured: Sequence[InputCurvature]) -> str:
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


class Field(NamedTuple):
    """One column of the results table."""

    cell: Callable[[Row], str]
    value: Callable[[Row], float | None]  # whose mean over the seeds is shown
    form: str


def _accuracy(of: Callable[[Row], Estimate | None]) -> Field:
    """Column of an accuracy with its interval, in percent."""

    def value(row: Row) -> float | None:
        found = of(row)
        return 100 * found.value if found else None

    return Field(lambda row: percent(of(row)), value, "{:.1f}")


def _difference(of: Callable[[Comparison], PairedDifference]) -> Field:
    """Column of a paired difference from the plain arm, in percentage points."""
    return Field(
        lambda row: tables.points(of(row.comparison) if row.comparison else None),
        lambda row: 100 * of(row.comparison).value if row.comparison else None,
        "{:+.1f}",
    )


def _estimate(of: Callable[[Row], Estimate | None]) -> Field:
    """Column of a mean with its standard error."""

    def value(row: Row) -> float | None:
        found = of(row)
        return found.value if found else None

    return Field(lambda row: plus_minus(of(row)), value, "{:.3g}")


FIELDS = {
    "clean %": _accuracy(lambda row: row.evaluation.clean),
    "attacked %": _accuracy(lambda row: row.evaluation.attacked),
    "expected %": _accuracy(lambda row: row.evaluation.expected),
    "against plain": _difference(lambda found: found.attacked),
    "kappa": _estimate(lambda row: row.kappa()),
    "kappa*": _estimate(lambda row: row.kappa(matched=True)),
    "Gauss-Newton trace": _estimate(lambda row: row.gauss_newton_trace()),
    "Gauss-Newton trace*": _estimate(lambda row: row.gauss_newton_trace(matched=True)),
    "time": Field(
        lambda row: (
            f"{tables.ratio(row.time_ratio)}, {row.training_seconds:.3g} s" if row.history else "-"
        ),
        lambda row: row.time_ratio,
        "{:.2f}x",
    ),
}
CLEAN_DIFFERENCE = _difference(lambda found: found.clean)


def results_table(paths: Iterable[str | Path]) -> str:
    """Markdown of the reports at `paths`, folders of runs or `report.json` files.

    A row is an arm of a run. Where several runs differ in their seed alone, a further row has the
    mean over the seeds.

    Raises:
        ValueError: a report of another schema; or, in one section, other cascades or samples.
        OSError: there is no report.
    """
    return sections_text(rows_of.sections(rows_of.read_runs(paths)))


def sections_text(found: Sequence[Section]) -> str:
    """Markdown of sections and, once below them, of what their columns mean."""
    legend = f"Columns:\n\n{tables.bullets(meanings_of(found))}"
    return "\n\n".join([*map(_section_text, found), legend]) + "\n"


class Line(NamedTuple):
    """A line of the results table: an arm with one seed, or the mean over its seeds."""

    group: Group
    row: Row | None
    cells: list[str]


def section_lines(section: Section) -> tuple[list[str], list[Line]]:
    """The heads of a section, and its lines with a cell for each."""
    fields, lines = FIELDS, list[Line]()
    if not any(row.evaluation.expected for group in section.groups for row in group.rows):
        fields = {head: field for head, field in FIELDS.items() if head != "expected %"}
    for group in section.groups:
        for seed, row in zip(group.seeds, group.rows, strict=True):
            cells = [field.cell(row) for field in fields.values()]
            flags = "; ".join(_flags(row)) or "none"
            lines.append(Line(group, row, [group.name, str(seed), *cells, flags]))
        if len(group.rows) > 1:
            cells = [_mean_cell(group, field) for field in fields.values()]
            title = f"mean of {len(group.rows)} seeds"
            lines.append(Line(group, None, [group.name, title, *cells, ""]))
    return ["arm", "seed", *fields, "flagged findings"], lines


def _section_text(section: Section) -> str:
    rows: list[list[str]] = []
    heads, lines = section_lines(section)
    for line in lines:
        name, seed, *cells = line.cells
        rows.append([name, seed, *cells])
        if line.row is None:
            rows[-1][:2] = [tables.strong(name), tables.strong(seed)]
    attacks = ", then ".join(tables.code(stage.attack) for stage in section.evaluation.stages)
    parts = (
        f"### {tables.escaped(section.title)}",
        tables.markdown(heads, rows),
        f"Cascade: {attacks}.",
        "Runs:",
        "\n".join(f"- {tables.escaped(trained(run))}" for run in section.runs),
    )
    return "\n\n".join(parts)


def _flags(row: Row) -> list[str]:
    """What flags the row, and what its adaptive check took from the attacked accuracy."""
    found, check = tables.flags(row.flagged_findings), row.adaptive_check
    if check and check.attacked.value < row.evaluation.attacked.value:
        found.append(f"adaptive check leaves {100 * check.attacked.value:.1f}% attacked")
    return found


def _mean_cell(group: Group, field: Field) -> str:
    """Mean over the seeds, with the least and the greatest."""
    known = [value for row in group.rows if (value := field.value(row)) is not None]
    if len(known) < len(group.rows):
        return "-"
    middle, low, high = (field.form.format(x) for x in (mean(known), min(known), max(known)))
    return f"{middle} ({low} to {high})"


def trained(run: Run) -> str:
    """What was trained, by what versions, on what machine."""
    recipe = run.report.recipe
    models = ", ".join(dict.fromkeys(row.model["name"] for row in run.report.rows))
    limit = recipe["data"].get("limit")
    more = [f"batch size {recipe['batch_size']}"]
    more += [f"{limit} training images"] if limit else []
    machine = ", ".join(f"{key} {value}" for key, value in (run.environment or {}).items())
    machine = f"; {machine}" if machine else ""
    return f"{run.name}: {models}, {trained_for(recipe, *more)}{machine}"


def meanings_of(found: Sequence[Section]) -> dict[str, str]:
    """What the columns mean."""
    groups = [group for section in found for group in section.groups]
    rows = [row for group in groups for row in group.rows]
    runs = [run for section in found for run in section.runs]
    images = " or ".join(dict.fromkeys(split_images(run.report.recipe) for run in runs))
    meanings = {
        "clean %": f"accuracy on the n {images}, in percent; [..]: {LEGENDS['[..]']}",
        "attacked %": LEGENDS["attacked"],
        **({"expected %": _expected_legend(rows)} if _radii(rows) else {}),
        "against plain": "attacked accuracy minus that of the plain arm (same run, samples and "
        "model, neither penalty nor wrapper), in percentage points, with its paired 95% interval, "
        "which holds 0 where McNemar's exact test has p >= 0.05",
        "kappa": f"{LEGENDS['kappa']}; over the n clean images, ± is one standard error",
        "kappa*": LEGENDS["kappa*"],
    }
    measured = [row.input_curvature for row in rows if row.input_curvature]
    if measured:
        meanings["Gauss-Newton trace"] = _trace_legend(measured)
        meanings["Gauss-Newton trace*"] = "the same at matched confidence, as for kappa*"
    meanings["time"] = f"{LEGENDS['time']}; and the seconds of all epochs"
    if any(len(group.rows) > 1 for group in groups):
        meanings["mean of seeds"] = "mean (least to greatest) of the rows above it"
    if any("adaptive check leaves" in flag for row in rows for flag in _flags(row)):
        meanings["adaptive check leaves"] = (
            "attacked accuracy without the survivors that are fooled by images made against the "
            "plain arm, or by a longer search"
        )
    for finding in (f for row in rows for f in row.flagged_findings):
        meanings[finding.name] = f"{finding.meaning} ({finding.reference})"
    return meanings


def _radii(rows: Iterable[Row]) -> set[tuple[float, ...]]:
    """The radii below eps of the arms that have an expected robustness: alike, if there is one."""
    return {
        tuple(point.eps for point in row.evaluation.curve if point.eps < row.evaluation.eps)
        for row in rows
        if row.evaluation.expected
    }


def _expected_legend(rows: Sequence[Row]) -> str:
    unlike = ", which are not the same for all of these arms" if len(_radii(rows)) > 1 else ""
    return f"{LEGENDS['expected']}{unlike}; ± is one standard error over the images"


def insert_table(file: Path, text: str) -> None:
    """Write `text` between the markers of `file`, or into a new file with nothing else.

    Raises:
        ValueError: the file is there and has not one pair of markers.
    """
    before, after = "", "\n"
    if file.exists():
        found = file.read_text(encoding="utf-8")
        before, begin, rest = found.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end) or found.count(BEGIN) + found.count(END) != 2:
            raise ValueError(f"{file}: expected one {BEGIN} and then one {END}, left as it is")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
