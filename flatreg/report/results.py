"""The results table in Markdown, and below it what one must know to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from flatreg.data.files import write_whole
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.report.rows import Row
from flatreg.report.runs import Group, Run, Section, read_runs, sections
from flatreg.report.tables import (
    LEGENDS,
    bullets,
    flags,
    markdown,
    percent,
    plus_minus,
    points,
    ratio,
)
from flatreg.report.text import trace_legend


@dataclass(frozen=True)
class _Field:
    """One column: its cell of a row, and the number whose mean over seeds is shown."""

    head: str
    cell: Callable[[Row], str]
    value: Callable[[Row], float | None]
    form: str


def _accuracy(head: str, of: Callable[[Evaluation], Estimate]) -> _Field:
    """The column of an accuracy with its interval."""
    return _Field(
        head,
        lambda row: percent(of(row.evaluation)),
        lambda row: 100 * of(row.evaluation).value,
        "{:.1f}",
    )


def _estimate(head: str, of: Callable[[Row], Estimate | None]) -> _Field:
    """The column of a mean with its standard error."""

    def value(row: Row) -> float | None:
        found = of(row)
        return found.value if found else None

    return _Field(head, lambda row: plus_minus(of(row)), value, "{:.3g}")


_FIELDS = (
    _accuracy("clean %", lambda evaluation: evaluation.clean),
    _accuracy("attacked %", lambda evaluation: evaluation.attacked),
    _Field(
        "against plain",
        lambda row: points(row.comparison.attacked if row.comparison else None),
        lambda row: 100 * row.comparison.attacked.value if row.comparison else None,
        "{:+.1f}",
    ),
    _estimate("kappa", lambda row: row.kappa()),
    _estimate("kappa*", lambda row: row.kappa(matched=True)),
    _estimate("Gauss-Newton trace", lambda row: row.gauss_newton_trace()),
    _estimate("Gauss-Newton trace*", lambda row: row.gauss_newton_trace(matched=True)),
    _Field(
        "time",
        lambda row: f"{ratio(row.time_ratio)}, {row.training_seconds:.3g} s",
        lambda row: row.time_ratio,
        "{:.2f}x",
    ),
)
_HEADS = ("arm", "seed", *(field.head for field in _FIELDS), "flagged findings")


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
    return "\n\n".join([*map(_section_text, found), _legend(found)]) + "\n"


def _section_text(section: Section) -> str:
    rows = []
    for group in section.groups:
        for seed, row in zip(group.seeds, group.rows, strict=True):
            cells = [field.cell(row) for field in _FIELDS]
            rows.append([group.name, str(seed), *cells, "; ".join(_flags(row)) or "none"])
        if len(group.rows) > 1:
            title = [f"**{group.name}**", f"**mean of {len(group.rows)} seeds**"]
            rows.append([*title, *(_mean_cell(group, field) for field in _FIELDS), ""])
    attacks = ", then ".join(f"`{stage.attack}`" for stage in section.evaluation.stages)
    runs = "\n".join(map(_trained, section.runs))
    return (
        f"### {section.title}\n\n{markdown(_HEADS, rows)}\n\nCascade: {attacks}.\n\nRuns:\n\n{runs}"
    )


def _flags(row: Row) -> list[str]:
    """What flags the row, and what its adaptive check took from the attacked accuracy."""
    found, check = flags(row.flagged_findings), row.adaptive_check
    if check and check.attacked.value < row.evaluation.attacked.value:
        found.append(f"adaptive check leaves {100 * check.attacked.value:.1f}% attacked")
    return found


def _mean_cell(group: Group, field: _Field) -> str:
    """Mean over the seeds, with the least and the greatest."""
    known = [value for row in group.rows if (value := field.value(row)) is not None]
    if len(known) < len(group.rows):
        return "-"
    middle, low, high = (field.form.format(x) for x in (mean(known), min(known), max(known)))
    return f"{middle} ({low} to {high})"


def _trained(run: Run) -> str:
    """What was trained, by what versions, on what machine."""
    recipe = run.report.recipe
    models = ", ".join(dict.fromkeys(row.model["name"] for row in run.report.rows))
    limit = recipe["data"].get("limit")
    images = f", {limit} training images" if limit else ""
    machine = ", ".join(f"{key} {value}" for key, value in (run.environment or {}).items())
    return (
        f"- {run.name}: {models}, {recipe['epochs']} epochs, batch size {recipe['batch_size']}"
        f"{images}, seed {run.seed}{f'; {machine}' if machine else ''}"
    )


def _legend(found: Sequence[Section]) -> str:
    """What the columns mean."""
    groups = [group for section in found for group in section.groups]
    rows = [row for group in groups for row in group.rows]
    meanings = {
        "clean %": f"accuracy on the n test images, in percent; [..]: {LEGENDS['[..]']}",
        "attacked %": LEGENDS["attacked"],
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
    return "\n".join(["Columns:", "", *bullets(meanings)])


BEGIN, END = "<!-- table -->", "<!-- /table -->"


def insert_table(file: Path, text: str) -> None:
    """Write `text` between the markers of `file`, or into a new file with nothing else.

    Raises:
        ValueError: the file is there and has not one pair of markers.
    """
    before, after = "", "\n"
    if file.exists():
        found = file.read_text()
        before, begin, rest = found.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end) or found.count(BEGIN) + found.count(END) != 2:
            raise ValueError(f"{file}: expected one {BEGIN} and then one {END}, left as it is")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
