"""Judge the arms of a recipe side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.data.images import ImageArrays, Splits
from flatreg.data.loading import subset
from flatreg.data.sources import source_name
from flatreg.evaluation.adaptive import AdaptiveAttackCheck, adaptive_attack_check
from flatreg.evaluation.attack_path import AlignedBands, aligned_bands, attack_path
from flatreg.evaluation.compare import compare
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.export import model_info
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE, measured_by_outcome
from flatreg.evaluation.results import Evaluation
from flatreg.measures.manifold import PCAManifold
from flatreg.models.state import untouched
from flatreg.report.input_curvature import (
    CURVATURE_SAMPLES,
    InputCurvature,
    data_manifold,
    measured_curvature,
)
from flatreg.report.rows import SCHEMA, Report, Row
from flatreg.run.checkpoints import Epoch
from flatreg.run.recipe import Recipe
from flatreg.threat import to_unit_range

_SAMPLES, _STEPS, _WINDOW = 128, 40, 12


def followed_paths(model: nn.Module, data: ImageArrays, evaluation: Evaluation) -> AlignedBands:
    """Follow PGD out to 2 eps on samples that are classified right."""
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    correct = [index for index, verdict in verdicts if verdict > -2]
    if not correct:
        return AlignedBands({}, {}, 0)
    correct = [correct[row] for row in subset(len(correct), _SAMPLES, evaluation.seed)]
    eps = 2 * evaluation.eps
    with untouched(model):
        inputs, labels = samples(data, correct, model)
        path = attack_path(
            model,
            inputs,
            labels,
            eps=min(1.0, eps) if evaluation.norm == "linf" else eps,
            norm=evaluation.norm,
            matched=CONFIDENCE,
            attack=partial(pgd, steps=_STEPS, step_size=2 / _STEPS),
        )
    return aligned_bands(path, _WINDOW)


def samples(data: ImageArrays, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in [0,1] and labels at `indices`, on the device of `model`."""
    device = next(model.parameters()).device
    return to_unit_range(data.images[indices].to(device)), data.labels[indices].to(device)


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
            model,
            splits.test,
            **threat.settings(),
            folder=folder and folder / name,
            save_inputs=threat.save_inputs,
            progress=progress,
        )
        flatness = measured_by_outcome(
            model,
            splits.test,
            evaluation.indices,
            eps=threat.eps,
            norm=threat.norm,
            seed=threat.seed,
            batch_size=threat.batch_size,
        )
        nothing = AlignedBands({}, {}, 0)
        paths = followed_paths(model, splits.test, evaluation) if flatness else nothing
        seconds = statistics.median(epoch.seconds for epoch in histories[name])
        baseline = _baseline(rows, settings["model"])
        twin_seconds = seconds if name == "plain" else baseline and baseline.seconds_per_epoch
        rows.append(
            Row(
                name=name,
                model=settings["model"],
                criterion=settings["criterion"],
                penalties=settings["penalties"],
                wrapper=settings["wrapper"],
                evaluation=evaluation,
                comparison=compare(baseline.evaluation, evaluation) if baseline else None,
                adaptive_check=_scrutiny(recipe, splits, models, name, evaluation, progress),
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


def _baseline(rows: list[Row], model: object) -> Row | None:
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
) -> AdaptiveAttackCheck | None:
    if not recipe.evaluation.adaptive_check or name == "plain":
        return None
    return adaptive_attack_check(
        models[name],
        splits.test,
        evaluation,
        baseline=models.get("plain"),
        batch_size=recipe.evaluation.batch_size,
        progress=progress,
    )
