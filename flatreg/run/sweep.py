"""Tune one value of a recipe on validation images; every value tried is reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from flatreg.data.files import AGAIN, read_json, write_json, write_whole
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import (
    FlatnessByOutcome,
    fooled_before,
    measured_by_outcome,
)
from flatreg.evaluation.results import Evaluation
from flatreg.run.build import Training, build_training, fit_manifolds, load_model
from flatreg.run.checkpoints import Epoch, flagged, read_history
from flatreg.run.recipe import Recipe, changed, dump_recipe, holds_another
from flatreg.run.train import free, scale_of, train

SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """One value: a training and its evaluation on the validation images.

    Attributes:
        value: as it was given.
        evaluation: None where the training failed.
        relative_flatness: kappa on the same images by outcome, raw and at matched confidence,
            larger = sharper; None where it failed or the model has no linear head.
        failure: why there is no evaluation, in one line.
    """

    value: Any
    evaluation: Evaluation | None
    relative_flatness: FlatnessByOutcome | None
    history: list[Epoch]
    failure: str | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock of the training's steps."""
        return sum(epoch.seconds for epoch in self.history)

    @property
    def findings(self) -> list[Finding]:
        """Flagged findings of its training and of its evaluation."""
        found = self.evaluation.findings if self.evaluation else []
        return flagged(self.history) + [f for f in found if f.verdict == "flagged"]


@dataclass(frozen=True)
class Sweep:
    """All values tried for one key; `schema` is raised when a field changes its meaning.

    Attributes:
        key: dotted path of what was changed.
        arm: which arm of the recipe was trained.
        recipe: the others' settings, resolved.
        trials: one a value, in the order given.
        best: value of the greatest attacked accuracy (then of the greatest clean accuracy); None
            where every training failed.
        tied: the other values whose attacked accuracy lies in the interval of the best one's.
    """

    schema: int
    key: str
    arm: str
    recipe: dict[str, Any]
    trials: list[Trial]
    best: Any
    tied: list[Any]


_SWEEP, _TRIAL = TypeAdapter(Sweep), TypeAdapter(Trial)
_TRIAL_FILE, _WEIGHTS = "trial.json", "checkpoint"  # in the folder of a value


def trained_arm(recipe: Recipe, key: str) -> str:
    """Name of the arm that a sweep over `key` trains: a variant's own keys train that variant."""
    first, *rest = key.split(".")
    return rest[0] if first == "variants" and rest else recipe.arm


def recipes_over(recipe: Recipe, key: str, values: Sequence[Any]) -> dict[str, Recipe]:
    """The recipe of every value, by the name of its folder, in the order of `values`.

    Raises:
        ValueError: there are no validation images; there are no values; `key` changes how the
            values are evaluated, is of the accelerator, or changes no training; a value does not
            belong there, stands there twice, or has the images cut in another way.
    """
    if not recipe.data.validation:
        raise ValueError("sweep needs data.validation > 0: it may not use the test split")
    first = key.split(".")[0]
    if first in ("data", "evaluation"):
        raise ValueError(
            f"sweep needs a key of the training, got {key}: all values share one evaluation"
        )
    if first in ("accumulation", "mixed_precision"):  # of the accelerator, which all values share
        raise ValueError(
            f"sweep: all values are trained with one {first}: train each by `flatreg run`"
        )
    if key in ("arm", "baseline", "variants", "log_with", "checkpoint_minutes"):
        raise ValueError(
            f"sweep needs a key of the training, got {key}, which changes none of the arm "
            f"{recipe.arm}"
        )
    if not values:
        raise ValueError("sweep needs at least one value")
    recipes: dict[str, Recipe] = {}
    for value in values:
        name = re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_.")[:60] or "empty"
        one = changed(recipe, key, value)
        if name in recipes or one in recipes.values():
            raise ValueError(f"{key}: expected distinct values, got {value} twice or too alike")
        if one.data != recipe.data:  # of pretrained weights
            raise ValueError(
                f"{key}={value} would have the images cut in another way than the other values: "
                "set data.crop_pct and data.interpolation"
            )
        recipes[name] = one
    return recipes


def run_sweep(
    recipe: Recipe, key: str, values: Sequence[Any], folder: Path, accelerator: Accelerator
) -> Sweep:
    """Train the recipe once for each value of `key`, and evaluate each on the validation images.

    All trainings share seed, epochs and data; the test split is not used. The files of a value are
    in `folder/values/<value>`. After an interruption the same call continues there, and a longer
    list of values uses them again. A training whose loss is not finite is a result too. The
    accuracy of the best of several values is too high: report it on the test split, once.

    `key` is a dotted path into the recipe, such as "penalties.0.strength"; list items by number.
    Every process of a launch must call.

    Raises:
        ValueError: as `recipes_over`; or a value's folder holds the training of another recipe.
    """
    recipes = recipes_over(recipe, key, values)
    places = {name: folder / "values" / name for name in recipes}
    for name, one in recipes.items():
        if holds_another(places[name] / "recipe.yaml", one):
            raise ValueError(f"{places[name]} holds another recipe's run: choose another folder")
    accelerator.wait_for_everyone()
    splits, arm, fits = recipe.data.load(), trained_arm(recipe, key), dict[str, Any]()
    trials = []
    for value, (name, one) in zip(values, recipes.items(), strict=True):
        place = places[name]
        if (place / _TRIAL_FILE).exists():
            trials.append(_known_trial(place / _TRIAL_FILE, value))
            continue
        if accelerator.is_main_process:
            place.mkdir(parents=True, exist_ok=True)
            write_whole(place / "recipe.yaml", dump_recipe(one))
        accelerator.wait_for_everyone()
        fitted = fit_manifolds(one.arms()[arm], splits.to_fit, fits, place / _WEIGHTS)
        training = build_training(one, f"{arm} {name}", fitted, splits)
        trials.append(_try_value(training, value, place / _WEIGHTS, accelerator))
        if accelerator.is_main_process:
            write_json(place / _TRIAL_FILE, trials[-1], _TRIAL)
        accelerator.wait_for_everyone()
    best, tied = _best(trials)
    result = Sweep(SCHEMA, key, arm, recipe.model_dump(mode="json"), trials, best, tied)
    if accelerator.is_main_process:
        write_json(folder / "sweep.json", result, _SWEEP)
    return result


def read_sweep(folder: Path) -> Sweep:
    """Read `sweep.json` back.

    Raises:
        ValueError: it has another schema, or is no sweep.
        OSError: there is none.
    """
    return read_json(folder / "sweep.json", _SWEEP, what="a sweep", schema=SCHEMA)


def _known_trial(file: Path, value: Any) -> Trial:
    trial = read_json(file, _TRIAL, what="a trial")
    if trial.value != value:
        raise ValueError(f"{file}: expected the trial of {value}, got that of {trial.value}{AGAIN}")
    return trial


def _try_value(training: Training, value: Any, weights: Path, accelerator: Accelerator) -> Trial:
    """Train one value, and evaluate it on the validation images."""
    scale = scale_of(accelerator)
    try:
        history = train(training, weights, accelerator)
    except FloatingPointError as error:
        free(accelerator, scale)
        reason = str(error).partition("; ")[0].partition(": ")[2]
        return Trial(value, None, None, read_history(weights), reason)
    model, data = load_model(weights).to(accelerator.device), training.splits.validation
    threat, progress = training.recipe.evaluation, accelerator.is_main_process
    evaluation = evaluate(model, data, **threat.settings(), progress=progress)
    shared = threat.model_dump(include={"eps", "norm", "seed", "batch_size"})
    fooled = fooled_before(evaluation, bfloat16=threat.bfloat16)
    flatness = measured_by_outcome(model, data, evaluation.indices, among=fooled, **shared)
    return Trial(value, evaluation, flatness, history)


def _best(trials: Sequence[Trial]) -> tuple[Any, list[Any]]:
    """Value of the best trial, and those of the trials that its interval covers."""
    evaluated = [(t, t.evaluation) for t in trials if t.evaluation]
    if not evaluated:
        return None, []
    best, top = max(evaluated, key=lambda pair: (pair[1].attacked.value, pair[1].clean.value))
    tied = [t.value for t, e in evaluated if t is not best and e.attacked.value >= top.attacked.low]
    return best.value, tied
