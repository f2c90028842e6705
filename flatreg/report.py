"""What came out: all arms side by side, as JSON, Markdown and a table in the terminal."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.path import AttackPath, attack_path
from flatreg.checkpoints import Epoch, flagged
from flatreg.data import ImageArrays, Splits
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.results import Evaluation
from flatreg.geometry.card import SCHEMA as CARD_SCHEMA
from flatreg.geometry.card import GeometryCard
from flatreg.geometry.outcomes import (
    CONFIDENCE,
    FlatnessByOutcome,
    measured_by_outcome,
)
from flatreg.geometry.text import card_text, outcome_table
from flatreg.isolation import untouched
from flatreg.recipe import Recipe
from flatreg.sharding import subset
from flatreg.threat import to_unit_range

SCHEMA = 2
_KAPPA = (
    f"kappa of the last layer, mean ± standard error, larger = sharper; * at median confidence "
    f"{CONFIDENCE}. Attacked: samples classified right that a PGD of 10 steps flips within eps, at "
    "the first image beyond the flip. kappa knows no label, only confidence."
)
_PATH_SAMPLES, _PATH_STEPS, _PATH_WINDOW = 128, 40, 12


@dataclass(frozen=True)
class Band:
    """Quartiles over samples at each offset from the step at which the label flips."""

    offsets: list[int]
    lower: list[float]
    median: list[float]
    upper: list[float]


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: of the arm.
        criterion, penalties, wrapper: what it was trained with.
        evaluation: clean and attacked accuracy.
        relative_flatness: kappa on the evaluated samples by outcome; larger means sharper. Its
            attack is a PGD of 10 steps within the same eps, not the cascade of `evaluation`. None
            where the model has no head that is one linear map.
        seconds_per_epoch: median over the epochs.
        time_ratio: that over the plain twin's in the same run, if there is a twin.
        history: its training.
        path: "kappa", "confidence" and "loss" along attack paths, aligned at the flip; n paths.
    """

    name: str
    criterion: dict[str, Any]
    penalties: list[dict[str, Any]]
    wrapper: dict[str, Any] | None
    evaluation: Evaluation
    relative_flatness: FlatnessByOutcome | None
    seconds_per_epoch: float
    time_ratio: float | None
    history: list[Epoch]
    path: dict[str, Band]
    path_samples: int


@dataclass(frozen=True)
class Report:
    """All arms of a recipe; `schema` is raised when a field changes its meaning."""

    schema: int
    recipe: dict[str, Any]
    rows: list[Row]


_REPORT, _CARD = TypeAdapter(Report), TypeAdapter(GeometryCard)


def make_report(
    recipe: Recipe,
    splits: Splits,
    models: Mapping[str, nn.Module],
    histories: Mapping[str, list[Epoch]],
    *,
    progress: bool = True,
) -> Report:
    """Judge the trained arms on the test split; every process of a launch must call it."""
    threat = recipe.evaluation
    rows: list[Row] = []
    for name, arm in recipe.arms().items():
        model = models[name]
        evaluation = evaluate(
            model, splits.test, eps=threat.eps, norm=threat.norm, attack=threat.attack,
            samples=threat.samples, curve=threat.curve, seed=threat.seed,
            batch_size=threat.batch_size, progress=progress,
        )  # fmt: skip
        flatness = measured_by_outcome(
            model, splits.test, evaluation.indices, eps=threat.eps, seed=threat.seed,
            batch_size=threat.batch_size,
        )  # fmt: skip
        bands, paths = _paths(model, splits.test, evaluation, threat.eps) if flatness else ({}, 0)
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
                relative_flatness=flatness,
                seconds_per_epoch=seconds,
                time_ratio=seconds / twin_seconds if twin_seconds else None,
                history=histories[name],
                path=bands,
                path_samples=paths,
            )
        )
    return Report(SCHEMA, recipe.model_dump(mode="json"), rows)


def table(report: Report) -> str:
    """The arms side by side, at most 100 columns wide."""
    recipe, first = report.recipe, report.rows[0].evaluation
    source = recipe["data"].get("path", recipe["data"]["kind"])
    lines = [
        f"{Path(source).stem}, {recipe['model']['name']}, {recipe['epochs']} epochs, "
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
    stages = "\n\n".join(f"**{row.name}**\n\n```\n{row.evaluation}\n```" for row in report.rows)
    recipe = json.dumps(report.recipe, indent=1)
    kappa = outcome_table({r.name: r.relative_flatness for r in report.rows if r.relative_flatness})
    write_whole(
        folder / "report.md",
        f"# Report\n\n```\n{table(report)}\n```\n\n{_pictures(figures)}\n\n"
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


def write_card(card: GeometryCard, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `card.json` and `card.md`; `figures` maps file names to captions."""
    write_whole(folder / "card.json", _CARD.dump_json(card, indent=1).decode())
    write_whole(
        folder / "card.md",
        f"# Geometry of {card.model}\n\n```\n{card_text(card)}\n```\n\n{_pictures(figures)}\n",
    )


def read_card(folder: Path) -> GeometryCard:
    """Read `card.json` back.

    Raises:
        ValueError: it has another schema.
    """
    text = (folder / "card.json").read_text()
    found = json.loads(text).get("schema")
    if found != CARD_SCHEMA:
        raise ValueError(f"{folder}/card.json: expected schema {CARD_SCHEMA}, got {found}")
    return _CARD.validate_json(text)


def write_whole(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _pictures(figures: Mapping[str, str]) -> str:
    return "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items())


def _percent(accuracy: Any) -> str:
    return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _findings(report: Report) -> str:
    found = [
        f"{row.name}: {f.name} {f.value:.2f} > {f.threshold:.2f}"
        for row in report.rows
        for f in [*flagged(row.history), *row.evaluation.findings]
        if f.verdict == "flagged"
    ]
    return "; ".join(found) if found else "none flagged"


def _batch(data: ImageArrays, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return to_unit_range(data.images[indices].to(device)), data.labels[indices].to(device)


def _paths(
    model: nn.Module, data: ImageArrays, evaluation: Evaluation, eps: float
) -> tuple[dict[str, Band], int]:
    """Follow paths that flip within 2 eps, and align them at the flip."""
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    correct = [index for index, verdict in verdicts if verdict > -2]
    if not correct:
        return {}, 0
    correct = [correct[row] for row in subset(len(correct), _PATH_SAMPLES, evaluation.seed)]
    with untouched(model):
        inputs, labels = _batch(data, correct, model)
        path = attack_path(model, inputs, labels, eps=min(1.0, 2 * eps), steps=_PATH_STEPS)
    flipped = int((path.flip > 0).sum())
    if not flipped:
        return {}, 0
    arrays = {"kappa": path.relative_flatness, "confidence": path.confidence, "loss": path.loss}
    return {name: _aligned(values, path) for name, values in arrays.items()}, flipped


def _aligned(values: Tensor, path: AttackPath) -> Band:
    """Quartiles at each offset from the flip that at least half of the flipped paths reach."""
    columns = (path.flip > 0).nonzero().flatten()
    quartiles: dict[int, list[float]] = {}
    for offset in range(-_PATH_WINDOW, _PATH_WINDOW + 1):
        steps = path.flip[columns] + offset
        inside = (steps >= 0) & (steps < len(values))
        if int(inside.sum()) * 2 >= len(columns):
            at = values[steps[inside], columns[inside]].double()
            quartiles[offset] = at.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    lower, median, upper = (list(q) for q in zip(*quartiles.values(), strict=True))
    return Band(list(quartiles), lower, median, upper)
