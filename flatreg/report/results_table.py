"""The table of many runs, in Markdown: an arm a row, and what the columns mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import flatreg.report.tables as tables
from flatreg.data.files import write_whole
from flatreg.data.sources import split_images
from flatreg.report.rows import Row
from flatreg.report.sections import Group, Run, Section, read_runs, sections
from flatreg.report.tables import LEGENDS, percent, plus_minus
from flatreg.report.text import trace_legend, trained_for

BEGIN, END = "<!-- table -->", "<!-- /table -->"  # between which `insert_table` writes


class Field(NamedTuple):
    """One column of the results table."""

    cell: Callable[[Row], str]
    value: Callable[[Row], float | None]  # whose mean over the seeds is shown
    form: str


def _field(of: Callable[[Row], Any], cell: Callable[[Any], str], form: str, unit: int = 1) -> Field:
    """Column of an estimate or of a paired difference, a mean over the seeds in parts of `unit`."""
    return Field(
        lambda row: cell(of(row)),
        lambda row: unit * found.value if (found := of(row)) else None,
        form,
    )


_accuracy = partial(_field, cell=percent, form="{:.1f}", unit=100)
_difference = partial(_field, cell=tables.points, form="{:+.1f}", unit=100)
_estimate = partial(_field, cell=plus_minus, form="{:.3g}")
FIELDS = {
    "clean %": _accuracy(lambda row: row.evaluation.clean),
    "attacked %": _accuracy(lambda row: row.evaluation.attacked),
    "expected %": _accuracy(lambda row: row.evaluation.expected),
    "against plain": _difference(lambda row: row.comparison and row.comparison.attacked),
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
CLEAN_DIFFERENCE = _difference(lambda row: row.comparison and row.comparison.clean)


def results_table(paths: Iterable[str | Path]) -> str:
    """Markdown of the reports at `paths`, folders of runs or `report.json` files.

    A row is an arm of a run. Where several runs differ in their seed alone, a further row has the
    mean over the seeds.

    Raises:
        ValueError: a report of another schema; or, in one section, other cascades or samples.
        OSError: there is no report.
    """
    return sections_text(sections(read_runs(paths)))


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
    heads, lines = section_lines(section)
    rows = [
        line.cells if line.row else [*map(tables.strong, line.cells[:2]), *line.cells[2:]]
        for line in lines
    ]
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
    limit = recipe["data"].get("limit")
    more = [f"batch size {recipe['batch_size']}"]
    more += [f"{limit} training images"] if limit else []
    machine = ", ".join(f"{key} {value}" for key, value in (run.environment or {}).items())
    machine = f"; {machine}" if machine else ""
    return f"{run.name}: {run.report.networks}, {trained_for(recipe, *more)}{machine}"


def meanings_of(found: Sequence[Section]) -> dict[str, str]:
    """What the columns mean."""
    groups = [group for section in found for group in section.groups]
    rows = [row for group in groups for row in group.rows]
    runs = [run for section in found for run in section.runs]
    images = " or ".join(dict.fromkeys(split_images(run.report.recipe) for run in runs))
    radii = {  # below eps, of the arms that have an expected robustness
        tuple(point.eps for point in row.evaluation.curve if point.eps < row.evaluation.eps)
        for row in rows
        if row.evaluation.expected
    }
    unlike = ", which are not the same for all of these arms" if len(radii) > 1 else ""
    expected = f"{LEGENDS['expected']}{unlike}; ± is one standard error over the images"
    meanings = {
        "clean %": f"accuracy on the n {images}, in percent; [..]: {LEGENDS['[..]']}",
        "attacked %": LEGENDS["attacked"],
        **({"expected %": expected} if radii else {}),
        "against plain": "attacked accuracy minus that of the plain arm (same run, samples and "
        "model, neither penalty nor wrapper), in percentage points, with its paired 95% interval, "
        "which holds 0 where McNemar's exact test has p >= 0.05",
        "kappa": f"{LEGENDS['kappa']}; over the n clean images, ± is one standard error",
        "kappa*": LEGENDS["kappa*"],
    }
    measured = [row.input_curvature for row in rows if row.input_curvature]
    if measured:
        meanings["Gauss-Newton trace"] = trace_legend(measured)
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
