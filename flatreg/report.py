"""What came out: all arms side by side, as JSON, Markdown and a table in the terminal."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.atomic import write_whole
from flatreg.attacks.bands import AlignedBands, Band, aligned_bands
from flatreg.attacks.path import attack_path
from flatreg.attacks.pgd import pgd
from flatreg.checkpoints import Epoch, flagged
from flatreg.data import ImageArrays, Splits, source_name
from flatreg.evaluation.compare import Comparison, compare
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.export import model_info
from flatreg.evaluation.results import Evaluation
from flatreg.evaluation.scrutiny import Scrutiny, scrutinise
from flatreg.geometry.files import pictures
from flatreg.geometry.outcomes import (
    CONFIDENCE,
    FlatnessByOutcome,
    measured_by_outcome,
)
from flatreg.geometry.text import outcome_table
from flatreg.isolation import untouched
from flatreg.recipe import Recipe
from flatreg.sharding import subset
from flatreg.threat import to_unit_range

SCHEMA = 3
_KAPPA = (
    f"kappa of the last layer, mean ± standard error, larger = sharper; * at median confidence "
    f"{CONFIDENCE}. Attacked: samples classified right that a PGD of 10 steps flips within eps, at "
    "the first image beyond the flip. kappa knows no label, only confidence."
)
_PATH_SAMPLES, _PATH_STEPS, _PATH_WINDOW = 128, 40, 12


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: of the arm.
        criterion, penalties, wrapper: what it was trained with.
        evaluation: clean and attacked accuracy.
        comparison: with the plain twin on the same samples, if there is one.
        scrutiny: of the survivors, where the recipe asks for it; never of the plain twin.
        model_info: RobustBench's keys.
        relative_flatness: kappa on the evaluated samples by outcome; larger means sharper. Its
            attack is a PGD of 10 steps within the same eps, not the cascade of `evaluation`. None
            where the model has no head that is one linear map.
        seconds_per_epoch: median over the epochs.
        time_ratio: that over the plain twin's in the same run, if there is a twin.
        history: its training.
        path: "kappa", "matched kappa" (at median confidence 0.9, where a scale reaches it),
            "confidence" and "loss" along attack paths, aligned at the flip.
        path_samples: how many paths flip.
        path_by_step: the same by step, over all paths, whether they flip or not.
    """

    name: str
    criterion: dict[str, Any]
    penalties: list[dict[str, Any]]
    wrapper: dict[str, Any] | None
    evaluation: Evaluation
    comparison: Comparison | None
    scrutiny: Scrutiny | None
    model_info: dict[str, Any]
    relative_flatness: FlatnessByOutcome | None
    seconds_per_epoch: float
    time_ratio: float | None
    history: list[Epoch]
    path: dict[str, Band]
    path_samples: int
    path_by_step: dict[str, Band] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All arms of a recipe; `schema` is raised when a field changes its meaning."""

    schema: int
    recipe: dict[str, Any]
    rows: list[Row]


_REPORT = TypeAdapter(Report)


def make_report(
    recipe: Recipe,
    splits: Splits,
    models: Mapping[str, nn.Module],
    histories: Mapping[str, list[Epoch]],
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> Report:
    """Judge the trained arms on the test split; every process of a launch must call it.

    With `folder` each evaluation keeps its state and its samples there, and goes on after a kill.
    """
    threat, resolved = recipe.evaluation, recipe.model_dump(mode="json")
    rows: list[Row] = []
    for name, arm in recipe.arms().items():
        model = models[name]
        evaluation = evaluate(
            model, splits.test, **threat.settings(), folder=folder and folder / name,
            save_inputs=threat.save_inputs, progress=progress,
        )  # fmt: skip
        flatness = measured_by_outcome(
            model, splits.test, evaluation.indices, eps=threat.eps, norm=threat.norm,
            seed=threat.seed, batch_size=threat.batch_size,
        )  # fmt: skip
        nothing = AlignedBands({}, {}, 0)
        paths = _paths(model, splits.test, evaluation) if flatness else nothing
        seconds = statistics.median(epoch.seconds for epoch in histories[name])
        twin = next((row for row in rows if row.name == "plain"), None)
        twin_seconds = seconds if name == "plain" else twin and twin.seconds_per_epoch
        settings = arm.model_dump(mode="json")
        rows.append(
            Row(
                name=name,
                criterion=settings["criterion"],
                penalties=settings["penalties"],
                wrapper=settings["wrapper"],
                evaluation=evaluation,
                comparison=compare(twin.evaluation, evaluation) if twin else None,
                scrutiny=_scrutiny(recipe, splits, models, name, evaluation, progress),
                model_info=model_info(
                    evaluation,
                    name=name,
                    architecture=recipe.model.name,
                    dataset=source_name(resolved["data"]),
                ),
                relative_flatness=flatness,
                seconds_per_epoch=seconds,
                time_ratio=seconds / twin_seconds if twin_seconds else None,
                history=histories[name],
                path=paths.by_flip,
                path_samples=paths.flipped,
                path_by_step=paths.by_step,
            )
        )
    return Report(SCHEMA, resolved, rows)


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    lines = [
        f"{source_name(recipe['data'])}, {recipe['model']['name']}, {recipe['epochs']} epochs, "
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


def write_report(report: Report, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `report.json` and `report.md`; `figures` maps file names to captions."""
    write_whole(folder / "report.json", _REPORT.dump_json(report, indent=1).decode())
    stages = "\n\n".join(f"**{row.name}**\n\n```\n{_judgement(row)}\n```" for row in report.rows)
    recipe = json.dumps(report.recipe, indent=1)
    kappa = outcome_table({r.name: r.relative_flatness for r in report.rows if r.relative_flatness})
    write_whole(
        folder / "report.md",
        f"# Report\n\n```\n{table(report)}\n```\n\n{pictures(figures)}\n\n"
        f"## Relative flatness by outcome\n\n{kappa}\n\n{_KAPPA}\n\n## Evaluations\n\n{stages}\n\n"
        f"## Recipe\n\n```json\n{recipe}\n```\n",
    )


def read_report(folder: Path) -> Report:
    """Read `report.json` back.

    Raises:
        ValueError: it has another schema.
    """
    raw = json.loads((folder / "report.json").read_text())
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"{folder}/report.json: expected schema {SCHEMA}, got {raw.get('schema')}")
    return _REPORT.validate_python(raw)


def _judgement(row: Row) -> str:
    """All that was found out about an arm."""
    lines = [str(row.evaluation)]
    if row.comparison:
        lines.append(f"\nagainst plain, {row.comparison}")
    if row.scrutiny:
        lines.append(f"\nsurvivors scrutinised, {row.scrutiny}")
    return "\n".join(lines)


def _scrutiny(
    recipe: Recipe,
    splits: Splits,
    models: Mapping[str, nn.Module],
    name: str,
    evaluation: Evaluation,
    progress: bool,
) -> Scrutiny | None:
    if not recipe.evaluation.scrutinise or name == "plain":
        return None
    return scrutinise(
        models[name], splits.test, evaluation, twin=models.get("plain"),
        batch_size=recipe.evaluation.batch_size, progress=progress,
    )  # fmt: skip


def _percent(accuracy: Any) -> str:
    return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _findings(report: Report) -> str:
    found = [
        f"{row.name}: {f.name} {f.value:.2f} > {f.threshold:.2f}"
        for row in report.rows
        for f in [
            *flagged(row.history),
            *row.evaluation.findings,
            *(row.scrutiny.findings if row.scrutiny else []),
        ]
        if f.verdict == "flagged"
    ]
    return "; ".join(found) if found else "none flagged"


def _batch(data: ImageArrays, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return to_unit_range(data.images[indices].to(device)), data.labels[indices].to(device)


def _paths(model: nn.Module, data: ImageArrays, evaluation: Evaluation) -> AlignedBands:
    """Follow PGD out to 2 eps on samples that are classified right."""
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    correct = [index for index, verdict in verdicts if verdict > -2]
    if not correct:
        return AlignedBands({}, {}, 0)
    correct = [correct[row] for row in subset(len(correct), _PATH_SAMPLES, evaluation.seed)]
    eps = 2 * evaluation.eps
    with untouched(model):
        inputs, labels = _batch(data, correct, model)
        path = attack_path(
            model, inputs, labels, eps=min(1.0, eps) if evaluation.norm == "linf" else eps,
            norm=evaluation.norm, matched=CONFIDENCE,
            attack=partial(pgd, steps=_PATH_STEPS, step_size=2 / _PATH_STEPS),
        )  # fmt: skip
    return aligned_bands(path, _PATH_WINDOW)
