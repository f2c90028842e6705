"""Judge the arms of a recipe side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from flatreg.attacks.bands import AlignedBands
from flatreg.checkpoints import Epoch
from flatreg.data import Splits, source_name
from flatreg.evaluation.compare import compare
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.export import model_info
from flatreg.evaluation.results import Evaluation
from flatreg.evaluation.scrutiny import Scrutiny, scrutinise
from flatreg.geometry.outcomes import measured_by_outcome
from flatreg.measures.manifold import PCAManifold
from flatreg.recipe import Recipe
from flatreg.report.curvature import (
    CURVATURE_SAMPLES,
    InputCurvature,
    data_manifold,
    measured_curvature,
)
from flatreg.report.paths import followed_paths, samples
from flatreg.report.rows import SCHEMA, Report, Row
from flatreg.sharding import subset


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
    manifold = data_manifold(splits.train.images)
    rows: list[Row] = []
    for name, arm in recipe.arms().items():
        model, settings = models[name], arm.model_dump(mode="json")
        evaluation = evaluate(
            model, splits.test, **threat.settings(), folder=folder and folder / name,
            save_inputs=threat.save_inputs, progress=progress,
        )  # fmt: skip
        flatness = measured_by_outcome(
            model, splits.test, evaluation.indices, eps=threat.eps, norm=threat.norm,
            seed=threat.seed, batch_size=threat.batch_size,
        )  # fmt: skip
        nothing = AlignedBands({}, {}, 0)
        paths = followed_paths(model, splits.test, evaluation) if flatness else nothing
        seconds = statistics.median(epoch.seconds for epoch in histories[name])
        twin = _twin(rows, settings["model"])
        twin_seconds = seconds if name == "plain" else twin and twin.seconds_per_epoch
        rows.append(
            Row(
                name=name,
                model=settings["model"],
                criterion=settings["criterion"],
                penalties=settings["penalties"],
                wrapper=settings["wrapper"],
                evaluation=evaluation,
                comparison=compare(twin.evaluation, evaluation) if twin else None,
                scrutiny=_scrutiny(recipe, splits, models, name, evaluation, progress),
                model_info=model_info(
                    evaluation,
                    name=name,
                    architecture=settings["model"]["name"],
                    dataset=source_name(resolved["data"]),
                ),
                relative_flatness=flatness,
                input_curvature=_curvature(recipe, splits, model, evaluation, manifold),
                seconds_per_epoch=seconds,
                training_seconds=sum(epoch.seconds for epoch in histories[name]),
                time_ratio=seconds / twin_seconds if twin_seconds else None,
                history=histories[name],
                path=paths.by_flip,
                path_samples=paths.flipped,
                path_by_step=paths.by_step,
            )
        )
    return Report(SCHEMA, resolved, rows)


def _twin(rows: list[Row], model: object) -> Row | None:
    """The plain twin, where it has the same model."""
    return next((row for row in rows if row.name == "plain" and row.model == model), None)


def _curvature(
    recipe: Recipe,
    splits: Splits,
    model: nn.Module,
    evaluation: Evaluation,
    manifold: PCAManifold | None,
) -> InputCurvature | None:
    chosen = subset(evaluation.n, CURVATURE_SAMPLES, evaluation.seed)
    inputs, _ = samples(splits.test, [evaluation.indices[row] for row in chosen], model)
    return measured_curvature(
        model, inputs, manifold, seed=evaluation.seed, batch_size=recipe.evaluation.batch_size
    )


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
