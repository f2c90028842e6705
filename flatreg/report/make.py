"""Make the report of a recipe: evaluate and measure its trained arms, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.data.images import Images, Splits
from flatreg.data.loading import subset
from flatreg.data.sources import source_name
from flatreg.evaluation.adaptive import adaptive_attack_check
from flatreg.evaluation.attack_path import AlignedBands, aligned_bands, attack_path
from flatreg.evaluation.compare import compare
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE, fooled_before, measured_by_outcome
from flatreg.evaluation.geometry.input_curvature import (
    CURVATURE_SAMPLES,
    data_manifold,
    measured_curvature,
)
from flatreg.evaluation.results import Evaluation, model_info
from flatreg.measures.manifold import PCAManifold
from flatreg.models.state import untouched
from flatreg.report.rows import SCHEMA, Report, Row
from flatreg.run.checkpoints import Epoch
from flatreg.run.recipe import Recipe
from flatreg.threat import to_unit_range

_PATHS, _STEPS, _WINDOW = 128, 40, 12
_NO_PATHS = AlignedBands({}, {}, 0)


def make_report(
    recipe: Recipe,
    splits: Splits,
    models: Mapping[str, nn.Module],
    histories: Mapping[str, list[Epoch]],
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> Report:
    """Evaluate and measure the trained arms on the test split.

    Every process of a launch must call it. With `folder` each evaluation keeps its state and its
    samples there, and continues after a kill.

    Besides its evaluation every arm is attacked twice, because each attack defines what is printed.
    Kappa by outcome is taken where PGD of 10 steps within eps first flips the label. Where the
    cascade starts with this PGD, only the samples that it fooled are attacked again. The paths run
    to 2 eps in 40 steps and continue after the flip.
    """
    threat, resolved = recipe.evaluation, recipe.model_dump(mode="json")
    manifold = data_manifold(splits.to_fit())
    rows: list[Row] = []
    for name, arm in recipe.arms().items():
        model, settings, history = models[name], arm.model_dump(mode="json"), histories[name]
        kept: dict[str, Any] = {"folder": folder and folder / name, "progress": progress}
        kept["save_inputs"] = threat.save_inputs
        evaluation, check = evaluate(model, splits.test, **threat.settings(), **kept), None
        if threat.adaptive_check and name != "plain":
            how: dict[str, Any] = {"batch_size": threat.batch_size, "progress": progress}
            how["baseline"] = models.get("plain")
            check = adaptive_attack_check(model, splits.test, evaluation, **how)
        architecture, dataset = settings["model"]["name"], source_name(resolved["data"])
        info = model_info(evaluation, name=name, architecture=architecture, dataset=dataset)
        seconds = statistics.median(epoch.seconds for epoch in history)
        plain = (row for row in rows if row.name == "plain" and row.model == settings["model"])
        baseline = next(plain, None)
        plain_seconds = seconds if name == "plain" else baseline and baseline.seconds_per_epoch
        row = Row(
            name=name,
            **{key: settings[key] for key in ("model", "criterion", "penalties", "wrapper")},
            evaluation=evaluation,
            comparison=compare(baseline.evaluation, evaluation) if baseline else None,
            adaptive_check=check,
            model_info=info,
            seconds_per_epoch=seconds,
            training_seconds=sum(epoch.seconds for epoch in history),
            time_ratio=seconds / plain_seconds if plain_seconds else None,
            history=history,
            **_geometry(recipe, splits, model, evaluation, manifold),
        )
        rows.append(row)
    return Report(SCHEMA, resolved, rows)


def _geometry(
    recipe: Recipe,
    splits: Splits,
    model: nn.Module,
    evaluation: Evaluation,
    manifold: PCAManifold | None,
) -> dict[str, Any]:
    """The fields of `Row` that hold the geometry of one arm."""
    threat, data = recipe.evaluation, splits.test
    fooled = fooled_before(evaluation, bfloat16=threat.bfloat16)
    shared = threat.model_dump(include={"eps", "norm", "seed", "batch_size"})
    flatness = measured_by_outcome(model, data, evaluation.indices, among=fooled, **shared)
    few = subset(range(evaluation.n), CURVATURE_SAMPLES, evaluation.seed)
    inputs, _ = _samples(data, [evaluation.indices[row] for row in few], model)
    trace = measured_curvature(
        model, inputs, manifold, seed=evaluation.seed, batch_size=threat.batch_size
    )
    paths = _followed_paths(model, data, evaluation) if flatness else _NO_PATHS
    return {
        "relative_flatness": flatness,
        "input_curvature": trace,
        "path": paths.by_flip,
        "path_samples": paths.flipped,
        "path_by_step": paths.by_step,
    }


def _followed_paths(model: nn.Module, data: Images, evaluation: Evaluation) -> AlignedBands:
    """Follow PGD out to 2 eps on samples that are classified right."""
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    correct = [index for index, verdict in verdicts if verdict > -2]
    if not correct:
        return _NO_PATHS
    correct = subset(correct, _PATHS, evaluation.seed)
    eps = 2 * evaluation.eps
    with untouched(model):
        inputs, labels = _samples(data, correct, model)
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


def _samples(data: Images, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in [0,1] and labels at `indices`, on the device of `model`."""
    device = next(model.parameters()).device
    return to_unit_range(data.images_at(indices).to(device)), data.labels[indices].to(device)
