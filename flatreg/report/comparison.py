"""The page of several runs: all arms side by side, what they cost, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flatreg.report.tables as tables
from flatreg.data.files import write_whole
from flatreg.evaluation.compare import compare
from flatreg.report.figures.attacked_against import Against, attacked_against
from flatreg.report.figures.report import attacked_accuracy
from flatreg.report.figures.style import marks
from flatreg.report.page import Share, inline, render, with_bars
from flatreg.report.results_table import Line, meanings_of, section_lines, trained
from flatreg.report.sections import Group, Section, read_runs, sections

_CURVATURE = ("kappa", "Gauss-Newton")  # how the heads of the second table begin
_AGAINST: dict[Against, str] = {
    "time": "training time",
    "clean": "clean accuracy",
    "kappa": "kappa at matched confidence",
    "curvature": "curvature at matched confidence",
}
_CAPTION = (
    "Attacked accuracy against {}. A point is an arm, its mean where there are several seeds. Bars "
    "are Wilson 95% intervals, of several seeds the least and the greatest."
)
_EPS = (
    "Attacked accuracy against eps, of {} of {} arms: the plain one and those that keep most. "
    "Bands are Wilson 95% intervals; an arm of several seeds has a line for each."
)
_CURVES = 8  # arms whose curves can still be told apart


def write_comparison(paths: Iterable[str | Path], file: Path) -> None:
    """Write the page of the reports at `paths`, folders of runs or `report.json` files.

    Raises:
        ValueError: as in `flatreg.report.results_table.results_table`; or `file` is no `.html`.
        OSError: there is no report.
    """
    if file.suffix != ".html":
        raise ValueError(f"output: expected a file FILE.html, got {file}")
    text = comparison_page(sections(read_runs(paths)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def comparison_page(found: Sequence[Section]) -> str:
    """The page of sections, as HTML."""
    runs = [run for section in found for run in section.runs]
    every = [(group, row) for section in found for group in section.groups for row in group.rows]
    return render(
        "comparison.html",
        title=f"Comparison of {len(runs)} run{'s' * (len(runs) > 1)}",
        setting="; ".join(section.title for section in found),
        findings=[(group.name, flag) for group, row in every for flag in row.flagged_findings],
        sections=[_section(section) for section in found],
        meanings_of_heads=meanings_of(found),
        runs=[trained(run) for run in runs],
    )


def _section(section: Section) -> dict[str, Any]:
    """What the template shows of a section."""
    groups = section.groups
    of_group = dict(zip(map(id, groups), marks(g.rows[0] for g in groups), strict=True))
    heads, lines = section_lines(section)
    best = max(groups, key=lambda group: group.attacked)
    others = [group for group in groups if group is not best]
    plain = [group for group in groups if group.arm == "plain"]
    drawn = plain[:1] + [group for group in groups if group.arm != "plain"][:_CURVES]
    arms = {group.name: group.rows for group in drawn}
    return {
        "title": section.title,
        "n": section.evaluation.n,
        "unchecked": _unchecked(section),
        "result": _columns(heads, lines, [h for h in heads if not h.startswith(_CURVATURE)]),
        "curvature": _columns(
            heads, lines, ["arm", "seed", *(h for h in heads if h.startswith(_CURVATURE))]
        ),
        "marks": [of_group[id(line.group)] for line in lines],
        "best": best.name,
        "differences": _differences(best, others),
        "difference_marks": [of_group[id(group)] for group in others for _ in group.rows],
        "attacks": [stage.attack for stage in section.evaluation.stages],
        "legend": [(group.name, of_group[id(group)]) for group in drawn],
        "figures": {
            "eps": inline(attacked_accuracy(arms), _EPS.format(len(arms), len(groups)), wide=True),
            **{
                against: inline(
                    attacked_against([section], against, 5.8), _CAPTION.format(name), wide=True
                )
                for against, name in _AGAINST.items()
            },
        },
    }


def _unchecked(section: Section) -> list[str]:
    """Runs of which it is not known whether their images are those of the others."""
    if len(section.runs) == 1:
        return []
    rows = {run.name: run.report.rows for run in section.runs}
    return [name for name, own in rows.items() if not all(r.evaluation.samples_digest for r in own)]


def _columns(
    heads: Sequence[str], lines: Sequence[Line], chosen: Sequence[str]
) -> tuple[Sequence[str], list[Sequence[str | Share]]]:
    """Some columns of the lines of a section."""
    rows: list[Sequence[str | Share]] = []
    for line in lines:
        cells = dict(zip(heads, line.cells, strict=True))
        known = [cells[head] for head in chosen]
        rows.append(with_bars(line.row, chosen, known) if line.row else known)
    return chosen, rows


def _differences(best: Group, others: Sequence[Group]) -> tables.Cells:
    """Every other arm minus the best one of the same seed, or of its first, on the same images."""
    of_seed = dict(zip(best.seeds, best.rows, strict=True))
    cells = []
    for group in others:
        for own, row in zip(group.seeds, group.rows, strict=True):
            seed = own if own in of_seed else best.seeds[0]
            pair = [of_seed[seed].evaluation, row.evaluation]
            if not all(evaluation.labels for evaluation in pair):  # small copies of reports
                pair = [replace(evaluation, labels=[]) for evaluation in pair]
            found = compare(*pair)
            cells.append(
                [
                    group.name,
                    str(own),
                    str(seed),
                    tables.points(found.attacked),
                    f"{found.attacked.only_other} won, {found.attacked.only_one} lost",
                    f"{found.attacked.p_value:.2g}",
                    tables.points(found.clean),
                ]
            )
    heads = ["arm", "seed", "seed of the other", "attacked", "images under attack", "p", "clean"]
    return heads, cells
