"""Make a report: evaluate and measure the trained arms of a recipe, or one model of others."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.data.images import Images, Splits
from flatreg.data.loading import subset
from flatreg.data.progress import about
from flatreg.data.sharing import rank_and_world
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
from flatreg.run.recipe_sections import EvaluationSettings
from flatreg.run.target import Target
from flatreg.threat import to_unit_range

_PATHS, _STEPS = 128, 40
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
    """Evaluate and measure trained arms, those in `models`, on the test split.

    Every process of a launch must call it. With `folder` each evaluation keeps its state and its
    samples there, and continues after a kill.

    Besides its evaluation every arm is attacked twice, because each attack defines what is printed.
    Kappa by outcome is taken where PGD of 10 steps within eps first flips the label. Where the
    cascade starts with this PGD, only the samples that it fooled are attacked again. The paths run
    to 2 eps in 40 steps and continue after the flip.
    """
    resolved, arms = recipe.model_dump(mode="json"), recipe.arms()
    measured = _Measured(
        recipe.evaluation, splits, splits.test, source_name(resolved["data"]), folder, progress
    )
    rows: list[Row] = []
    for number, (name, model) in enumerate(models.items(), start=1):
        trained = arms[name].model_dump(
            mode="json", include={"model", "criterion", "penalties", "wrapper"}
        )
        plain = (row for row in rows if row.name == "plain" and row.model == trained["model"])
        against = models.get("plain") if name != "plain" else None
        with about(f"{name} {number}/{len(models)}"):
            rows.append(
                measured.row(name, model, trained, histories[name], next(plain, None), against)
            )
    return Report(SCHEMA, resolved, rows)


def report_on(
    target: Target[EvaluationSettings], *, folder: Path | None = None, progress: bool = True
) -> Report:
    """Evaluate and measure one model that no run of ours has trained: a report of one row.

    Every process of a launch must call it; `folder` as in `make_report`.
    """
    measured = _Measured(
        target.settings, target.splits, target.images, target.data_name, folder, progress
    )
    spec: dict[str, Any] = TypeAdapter(dict[str, Any]).dump_python(target.spec, mode="json")
    trained: dict[str, Any] = {
        "model": spec,
        "criterion": {"kind": "unknown"},
        "penalties": [],
        "wrapper": None,
    }
    recipe = {
        "data": target.data,
        "split": target.split,
        "model": spec,
        "seed": target.settings.seed,
        "epochs": 0,  # of ours
        "batch_size": 0,
        "evaluation": target.settings.model_dump(mode="json"),
    }
    row = measured.row(target.name, target.model, trained, [], None, None)
    return Report(SCHEMA, recipe, [row])


@dataclass(frozen=True, eq=False)
class _Measured:
    """How models are evaluated and measured, and on which images."""

    threat: EvaluationSettings
    splits: Splits
    images: Images
    dataset: str
    folder: Path | None
    progress: bool

    @cached_property
    def manifold(self) -> PCAManifold | None:
        return data_manifold(self.splits.to_fit()) if len(self.splits.train) else None

    def row(
        self,
        name: str,
        model: nn.Module,
        trained: dict[str, Any],
        history: list[Epoch],
        plain: Row | None,
        against: nn.Module | None,
    ) -> Row:
        """Evaluate and measure one model, with its settings of training as in a recipe.

        `plain` is the row of the plain arm of the same model, and `against` the model that images
        are made against in the adaptive check, if there are such.
        """
        threat, images = self.threat, self.images
        file_name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]  # of a model that is no arm
        kept: dict[str, Any] = {"folder": self.folder and self.folder / file_name}
        kept |= {"progress": self.progress, "save_inputs": threat.save_inputs}
        evaluation, check = evaluate(model, images, **threat.settings(), **kept), None
        if threat.adaptive_check and name != "plain":
            how: dict[str, Any] = {"batch_size": threat.batch_size, "progress": self.progress}
            how["bpda"] = threat.bpda
            check = adaptive_attack_check(model, images, evaluation, baseline=against, **how)
        about_it = {"architecture": trained["model"]["name"], "dataset": self.dataset}
        seconds = statistics.median(epoch.seconds for epoch in history) if history else None
        plain_seconds = seconds if name == "plain" else plain and plain.seconds_per_epoch
        return Row(
            name=name,
            **trained,
            evaluation=evaluation,
            comparison=compare(plain.evaluation, evaluation) if plain else None,
            adaptive_check=check,
            model_info=model_info(evaluation, name=name, **about_it),
            seconds_per_epoch=seconds,
            training_seconds=sum(epoch.seconds for epoch in history),
            time_ratio=seconds / plain_seconds if seconds and plain_seconds else None,
            history=history,
            **self._geometry(model, evaluation),
        )

    def _geometry(self, model: nn.Module, evaluation: Evaluation) -> dict[str, Any]:
        """The fields of `Row` that hold the geometry of one arm."""
        threat, data, indices = self.threat, self.images, evaluation.indices
        fooled = fooled_before(evaluation, bfloat16=threat.bfloat16)
        shared = threat.model_dump(include={"eps", "norm", "seed", "batch_size"})
        flatness = measured_by_outcome(model, data, indices, among=fooled, **shared)
        few = subset(range(evaluation.n), CURVATURE_SAMPLES, evaluation.seed)
        inputs, _ = _samples(data, [indices[row] for row in few], model)
        how = {"seed": evaluation.seed, "batch_size": threat.batch_size}
        trace = measured_curvature(model, inputs, self.manifold, **how)
        paths = self._followed_paths(model, evaluation) if flatness else _NO_PATHS
        return {
            "relative_flatness": flatness,
            "input_curvature": trace,
            "path": paths.by_flip,
            "path_samples": paths.flipped,
            "path_by_step": paths.by_step,
        }

    def _followed_paths(self, model: nn.Module, evaluation: Evaluation) -> AlignedBands:
        """Follow PGD out to 2 eps on samples that are classified right."""
        verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
        correct = [index for index, verdict in verdicts if verdict > -2]
        if not correct:
            return _NO_PATHS
        correct = subset(correct, _PATHS, evaluation.seed)
        eps = 2 * evaluation.eps
        with untouched(model):
            inputs, labels = _samples(self.images, correct, model)
            path = attack_path(
                model,
                inputs,
                labels,
                eps=min(1.0, eps) if evaluation.norm == "linf" else eps,
                norm=evaluation.norm,
                matched=CONFIDENCE,
                attack=partial(pgd, steps=_STEPS, step_size=2 / _STEPS),
                progress=self.progress and rank_and_world()[0] == 0,
            )
        return aligned_bands(path)


def _samples(data: Images, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in [0,1] and labels at `indices`, on the device of `model`."""
    device = next(model.parameters()).device
    return to_unit_range(data.images_at(indices).to(device)), data.labels[indices].to(device)
