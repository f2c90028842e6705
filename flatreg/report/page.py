"""`report.html`: the report of a run as one file, for people; it needs no network and no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

import flatreg.report.figures.report as draw
import flatreg.report.tables as tables
from flatreg.data.files import write_whole
from flatreg.data.sources import source_name, split_images
from flatreg.data.text import printable
from flatreg.evaluation.compare import compare
from flatreg.evaluation.results import spot_checks
from flatreg.measures.estimate import Estimate
from flatreg.report.card import kappa_cells
from flatreg.report.figures.style import GRID, INK, marks, svg
from flatreg.report.gallery import Example, shown
from flatreg.report.results_table import CLEAN_DIFFERENCE, FIELDS, meanings_of
from flatreg.report.rows import Row
from flatreg.report.sections import Run, read_runs, sections
from flatreg.report.tables import LEGENDS, Cells
from flatreg.report.text import KAPPA_MEANINGS, kappas, trace_cells, trace_meanings, trained_for
from flatreg.run.recipe import yaml_text


def write_page(
    folder: Path, examples: Sequence[Example] = (), class_names: Sequence[str] | None = None
) -> Path:
    """Write `report.html` beside the `report.json` in `folder`.

    Args:
        folder: of a report.
        examples: images to show, of `flatreg.report.gallery`.
        class_names: of the classes, which have numbers without.
    """
    file = folder / "report.html"
    write_whole(file, run_page(read_runs([folder])[0], examples, class_names))
    return file


def run_page(
    run: Run, examples: Sequence[Example] = (), class_names: Sequence[str] | None = None
) -> str:
    """The page of one run, as HTML."""
    report, rows = run.report, run.report.rows
    first, arm_marks = rows[0].evaluation, marks(rows)
    mark_of = {row.name: mark for row, mark in zip(rows, arm_marks, strict=True)}
    kappa, trace = kappa_cells(kappas(rows)), trace_cells(rows)
    checks = [(row.name, row.adaptive_check) for row in rows if row.adaptive_check]
    bands = [band for row in rows for band in row.path_by_step.values()]
    recipe, found = report.recipe, sections([run])
    environment = run.environment or first.versions
    processes = environment.get("processes", "1").split(", then ")[-1]
    return render(
        "run.html",
        title=f"{run.name}: accuracy under attack",
        setting=f"{source_name(recipe['data'])}, {report.networks}, {trained_for(recipe)}; "
        f"attacked at {first.norm} eps {first.eps:.4g}, n = {first.n} {split_images(recipe)}",
        n=first.n,
        findings=[(row.name, finding) for row in rows for finding in row.flagged_findings],
        marks=arm_marks,
        mark_of=mark_of,
        headline=_headline(rows, split_images(recipe)),
        result=_result_cells(rows),
        result_meanings=meanings_of(found) | _CLEAN_MEANING,
        curve=any(row.evaluation.curve for row in rows),
        cost=(["arm", *_COST], [[r.name, *(of(r) for of, _ in _COST.values())] for r in rows]),
        cost_meanings={name: meaning for name, (_, meaning) in _COST.items()},
        kappa=kappa,
        kappa_marks=[mark_of[cells[0]] for cells in kappa[1]],
        kappa_meanings=KAPPA_MEANINGS,
        trace=trace,
        trace_marks=[mark_of[cells[0]] for cells in trace[1]],
        trace_meanings=trace_meanings(rows),
        figures=_figures(rows),
        path_steps=max((max(band.offsets) for band in bands), default=0),
        path_arms=[(f"{r.name} ({r.path_samples} flip)", mark_of[r.name]) for r in rows],
        images=shown(list(examples)),
        names=lambda label: dict(enumerate(class_names or ())).get(label, str(label)),
        cascade=_cascade_cells(rows),
        spot_checks=[
            f"{row.name}, {threat.norm} eps {threat.eps:.4g}: {attack} {check}."
            for row in rows
            for threat, attack, check in spot_checks(row.evaluation)
        ],
        other_threats=_other_threats(rows),
        checks=[(name, str(check)) for name, check in checks],
        all_findings=_all_findings(rows),
        recipe=yaml_text(recipe),
        environment=environment | {"seed": str(run.seed)},
        trained_here=bool(recipe["epochs"]),
        launch="flatreg"
        if processes == "1"
        else f"accelerate launch --num_processes {processes} -m flatreg",
    )


@dataclass(frozen=True)
class Share:
    """A cell with an accuracy, which a page also draws as a bar."""

    text: str
    share: Estimate | None


_RESULT = {name: FIELDS[name] for name in ("clean %", "attacked %", "expected %", "against plain")}
_RESULT |= {"clean against plain": CLEAN_DIFFERENCE}
_RESULT |= {name: FIELDS[name] for name in ("time", "kappa", "kappa*")}
_ACCURACIES: dict[str, Callable[[Row], Estimate | None]] = {
    "clean %": lambda row: row.evaluation.clean,
    "attacked %": lambda row: row.evaluation.attacked,
    "expected %": lambda row: row.evaluation.expected,
}


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


_CLEAN_MEANING = {"clean against plain": "the same difference, of the accuracy without an attack"}
_COST: dict[str, tuple[Callable[[Row], str], str]] = {
    "epoch": (lambda row: _seconds(row.seconds_per_epoch), "median time of an epoch"),
    "time": (lambda row: tables.ratio(row.time_ratio), LEGENDS["time"]),
    "training": (
        lambda row: _seconds(row.training_seconds if row.history else None),
        "time of all epochs",
    ),
    "forward": (
        lambda row: f"{row.evaluation.forwards / row.evaluation.n:.1f}",
        "passes forward that the attack took, for each image of the evaluation",
    ),
    "backward": (
        lambda row: f"{row.evaluation.backwards / row.evaluation.n:.1f}",
        "passes backward that the attack took, for each image of the evaluation",
    ),
    "evaluation": (
        lambda row: f"{row.evaluation.seconds:.3g} s",
        "time of the evaluation, with its findings, other eps and other threats",
    ),
    "waiting": (
        lambda row: f"{row.evaluation.waiting_seconds:.3g} s",
        "part of the time of the evaluation in which it waited for images to be read",
    ),
}


def with_bars(row: Row, heads: Sequence[str], cells: Sequence[str]) -> list[str | Share]:
    """The cells of a row, those of accuracies with what a bar needs."""
    return [
        Share(cell, _ACCURACIES[head](row)) if head in _ACCURACIES else cell
        for head, cell in zip(heads, cells, strict=True)
    ]


def _result_cells(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str | Share]]]:
    """The numbers of each arm that come first; a column that no arm has is left out."""
    cells = {head: [field.cell(row) for row in rows] for head, field in _RESULT.items()}
    known = ["arm", *(head for head, column in cells.items() if set(column) != {"-"})]
    cells["arm"] = [row.name for row in rows]
    return known, [
        with_bars(row, known, [cells[head][at] for head in known]) for at, row in enumerate(rows)
    ]


def _headline(rows: Sequence[Row], images: str) -> list[str]:
    """What the best arm keeps under attack, and what this costs, in sentences."""
    best = max(rows, key=lambda r: (r.evaluation.attacked.value, r.evaluation.clean.value))
    result, found = best.evaluation, best.comparison
    several = f", the most of {len(rows)} arms" if len(rows) > 1 else ""
    ball = f"{result.norm} eps {result.eps:.4g}"
    if not result.attacked.value:
        return [
            f"Under attack at {ball} no arm keeps one of the {result.n} {images} right. Without "
            f"an attack {best.name} has {result.clean} right{several}."
        ]
    said = [
        f"{best.name} keeps {result.attacked} of the {result.n} {images} right under attack "
        f"at {ball}{several}. Without an attack it has {result.clean} right."
    ]
    if found:
        time = f" An epoch takes {best.time_ratio:.2f} times as long." if best.time_ratio else ""
        under, without = tables.points(found.attacked), tables.points(found.clean)
        holds_zero = max(found.attacked.p_value, found.clean.p_value) >= 0.05
        unclear = "; no difference is shown where the interval holds 0" if holds_zero else ""
        said.append(
            f"Against the plain arm this is a difference of {under} points under attack and of "
            f"{without} points without one{unclear}.{time}"
        )
    others = {r.name: compare(result, r.evaluation) for r in rows if r is not best}
    alike = [name for name, other in others.items() if other.attacked.p_value >= 0.05]
    if alike:
        said.append(
            f"Under attack no difference from {best.name} is shown for: {', '.join(alike)}."
        )
    return said


def _cascade_cells(rows: Sequence[Row]) -> Cells:
    """A row an attack, a column an arm: how many images it fooled, and what was left."""
    attacks = dict.fromkeys(stage.attack for row in rows for stage in row.evaluation.stages)
    cells = []
    for attack in attacks:
        line = [attack]
        for row in rows:
            result = row.evaluation
            number = next((i for i, s in enumerate(result.stages) if s.attack == attack), None)
            if number is None:
                line.append("-")
                continue
            fooled, left = result.verdicts.count(number), result.stages[number].accuracy
            line.append(f"{fooled} fooled, {100 * left.value:.1f}% left")
        cells.append(line)
    return ["attack", *(row.name for row in rows)], cells


def _other_threats(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[Any]]]:
    threats = dict.fromkeys((t.norm, t.eps) for row in rows for t in row.evaluation.other_threats)
    if not threats:
        return [], []
    cells = []
    for row in rows:
        found = {(t.norm, t.eps): t.attacked for t in row.evaluation.other_threats}
        accuracies = [*(found.get(threat) for threat in threats), row.evaluation.union]
        cells.append([row.name, *(Share(tables.percent(value), value) for value in accuracies)])
    return ["arm", *(f"{norm} eps {eps:.4g}" for norm, eps in threats), "all at once"], cells


def _all_findings(rows: Sequence[Row]) -> Cells:
    heads = ["arm", "check", "value", "threshold", "n", "verdict", "meaning of a flag"]
    return heads, [
        [row.name, f.name, f"{f.value:.3f}", f"{f.threshold:.3f}", str(f.n), f.verdict, f.meaning]
        for row in rows
        for of in (row.evaluation, row.adaptive_check)
        for f in (of.findings if of else [])
    ]


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Inline figures, a panel each, so that on a phone they stand below each other."""
    return {
        "accuracy": inline(
            draw.attacked_accuracy({row.name: [row] for row in rows}),
            draw.ACCURACY_CAPTION,
            wide=True,
        ),
        "training": [
            inline(draw.training([row]), f"loss parts of {row.name}") for row in rows if row.history
        ],
        "monitored": [
            inline(draw.monitored(rows, [attack]), f"{what}, by epoch")
            for attack, what in draw.MONITORED.items()
            if draw.was_monitored(rows)
        ],
        "path": [
            inline(draw.attack_path(rows, [quantity]), f"{quantity} along the attack")
            for quantity in draw.path_quantities(rows)
        ],
        "slices": [
            inline(
                draw.margin_slices(row.adaptive_check),
                draw.SLICES_CAPTION.format(row.name),
                wide=True,
            )
            for row in rows
            if row.adaptive_check and row.adaptive_check.slices
        ],
    }


def inline(figure: Figure, caption: str, *, wide: bool = False) -> Markup:
    """A figure as a part of a page, in the colours of the page's light or dark scheme."""
    figure.legends.clear()  # the page has its own, in text
    text = svg(figure)
    text = text[text.index("<svg") :]  # without the declaration and the document type
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # the page says the same
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    # One page has several figures, and an id only once.
    prefix = f"f{crc32(text.encode()):x}-"
    text = re.sub(r'(?<= id=")|(?<="#)|(?<=url\(#)', prefix, text)
    label = Markup('<svg role="img" aria-label="{}" ').format(printable(caption))
    # matplotlib escapes the names that it draws, and draws them as curves.
    body = Markup(text.replace("<svg ", "", 1))  # noqa: S704
    if not wide:  # one of several panels, which has a title
        return Markup("<figure>{}{}</figure>").format(label, body)
    below = Markup("<figcaption>{}</figcaption>").format(printable(caption))
    return Markup('<figure class="one">{}{}{}</figure>').format(label, body, below)


def render(template: str, **content: Any) -> str:
    """A page from its template; all that is not markup already is escaped."""
    return _environment().get_template(template).render(version=version("flatreg"), **content)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("flatreg.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters are spelt out, as everywhere.
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
        ),
    )
