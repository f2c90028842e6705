"""The table as Markdown, and below it what one must know to read it; nothing typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from flatreg.evaluation.compare import PairedDifference
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.measures.estimate import Estimate
from flatreg.report.arms import Row
from flatreg.report.card import plus_minus
from flatreg.report.runs import Group, Run, Section, read_runs, sections
from flatreg.report.text import flagged_findings

_HEAD = (
    "arm",
    "seed",
    "clean %",
    "attacked %",
    "against plain",
    "kappa",
    "kappa\\*",
    "curvature",
    "curvature\\*",
    "time",
    "flagged findings",
)


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
    return "\n\n".join([*(_section_text(section) for section in found), _legend(found)]) + "\n"


def _section_text(section: Section) -> str:
    lines = [
        f"### {section.title}",
        "",
        f"| {' | '.join(_HEAD)} |",
        f"|---|{'---:|' * (len(_HEAD) - 2)}---|",
    ]
    for group in section.groups:
        for entry in group.entries:
            cells = [group.name, str(entry.run.seed), *_cells(entry.row)]
            lines.append(f"| {' | '.join(cells)} |")
        if len(group.entries) > 1:
            lines.append(f"| {' | '.join(_mean_cells(group))} |")
    attacks = ", then ".join(f"`{stage.attack}`" for stage in section.evaluation.stages)
    lines += ["", f"Cascade: {attacks}.", "", "Runs:", "", *_trained(section.runs)]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    findings = [f"{f.name} {f.value:.2f} > {f.threshold:.2f}" for f in flagged_findings(row)]
    if row.adaptive_check and row.adaptive_check.attacked.value < row.evaluation.attacked.value:
        findings.append(f"scrutiny leaves {100 * row.adaptive_check.attacked.value:.1f}% attacked")
    difference = row.comparison.attacked if row.comparison else None
    flatness, curvature = row.relative_flatness, row.input_curvature
    ratio = "-" if row.time_ratio is None else f"{row.time_ratio:.2f}x"
    return [
        _accuracy(row.evaluation.clean),
        _accuracy(row.evaluation.attacked),
        _difference(difference),
        plus_minus(flatness.clean.raw if flatness else None),
        plus_minus(flatness.clean.matched if flatness else None),
        plus_minus(curvature.raw.off if curvature else None),
        plus_minus(curvature.matched.off if curvature and curvature.matched else None),
        f"{ratio}, {row.training_seconds:.3g} s",
        "; ".join(findings) or "none",
    ]


def _accuracy(accuracy: Estimate) -> str:
    return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return "-"
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _mean_cells(group: Group) -> list[str]:
    """Mean over the seeds, with the least and the greatest."""
    rows = [entry.row for entry in group.entries]

    def cell(of: Callable[[Row], float | None], pattern: str) -> str:
        known = [value for value in map(of, rows) if value is not None]
        if len(known) < len(rows):
            return "-"
        middle, low, high = (pattern.format(x) for x in (mean(known), min(known), max(known)))
        return f"{middle} ({low} to {high})"

    def curvature(row: Row, matched: bool) -> float | None:
        found = row.input_curvature
        sides = found and (found.matched if matched else found.raw)
        return sides.off.value if sides else None

    def kappa(row: Row, matched: bool) -> float | None:
        clean = row.relative_flatness.clean if row.relative_flatness else None
        found = (clean.matched if matched else clean.raw) if clean else None
        return found.value if found else None

    return [
        f"**{group.name}**",
        f"**mean of {len(rows)} seeds**",
        cell(lambda row: 100 * row.evaluation.clean.value, "{:.1f}"),
        cell(lambda row: 100 * row.evaluation.attacked.value, "{:.1f}"),
        cell(lambda r: 100 * r.comparison.attacked.value if r.comparison else None, "{:+.1f}"),
        cell(lambda row: kappa(row, False), "{:.3g}"),
        cell(lambda row: kappa(row, True), "{:.3g}"),
        cell(lambda row: curvature(row, False), "{:.3g}"),
        cell(lambda row: curvature(row, True), "{:.3g}"),
        cell(lambda row: row.time_ratio, "{:.2f}x"),
        "",
    ]


def _trained(runs: Sequence[Run]) -> list[str]:
    """A line a run: what was trained, by what versions, on what machine."""
    lines = []
    for run in runs:
        recipe = run.report.recipe
        models = ", ".join(dict.fromkeys(row.model["name"] for row in run.report.rows))
        limit = recipe["data"].get("limit")
        images = f", {limit} training images" if limit else ""
        machine = ", ".join(f"{key} {value}" for key, value in (run.environment or {}).items())
        lines.append(
            f"- {run.name}: {models}, {recipe['epochs']} epochs, batch size "
            f"{recipe['batch_size']}{images}, seed {run.seed}"
            f"{f'; {machine}' if machine else ''}"
        )
    return lines


def _legend(found: Sequence[Section]) -> str:
    """What the columns mean."""
    groups = [group for section in found for group in section.groups]
    rows = [entry.row for group in groups for entry in group.entries]
    lines = [
        "Columns:",
        "",
        "- clean %, attacked %: share of the n test images, with its Wilson 95% interval. Attacked "
        "is under the cascade: an upper bound on robust accuracy.",
        "- against plain: attacked accuracy minus that of the plain twin (same run, samples and "
        "model, neither penalty nor wrapper), in points, with its paired 95% interval, "
        "which holds 0 where McNemar's exact test has p >= 0.05.",
        "- kappa: relative flatness of the last layer, mean ± standard error over the n clean "
        "images; larger = sharper.",
        *_curvature_legend(rows),
        f"- \\*: at matched confidence, logits scaled to a median confidence of {CONFIDENCE}.",
        "- time: median epoch over the plain twin's in the same run, and seconds of all epochs.",
    ]
    if any(len(group.entries) > 1 for group in groups):
        lines.append("- mean of seeds: mean (least to greatest) of the rows above it.")
    if any("scrutiny leaves" in _cells(row)[-1] for row in rows):
        lines.append(
            "- scrutiny leaves: attacked accuracy less the survivors that images made against the "
            "plain twin, or a longer search, fool."
        )
    flags = {f.name: f for row in rows for f in flagged_findings(row)}
    lines += [f"- {f.name}: {f.meaning} ({f.reference})." for f in flags.values()]
    return "\n".join(lines)


def _curvature_legend(rows: Sequence[Row]) -> list[str]:
    """What the curvature is taken on; images of several sizes differ in it."""
    measured = [row.input_curvature for row in rows if row.input_curvature]
    if not measured:
        return []
    spaces = {
        json.dumps([c.rank, c.pixels]): f"{c.pixels - c.rank} of {c.pixels} directions are off the "
        f"first {c.rank} principal components of the training images"
        for c in measured
    }
    return [
        "- curvature: trace of the Gauss-Newton curvature of the loss in the input, off the data "
        f"manifold, at {measured[0].raw.off.n} clean test images, loss per squared input unit, "
        f"mean ± standard error; larger = sharper; {'; or '.join(spaces.values())}."
    ]
