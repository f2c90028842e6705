"""Tune one value of a recipe on held-back training images; every value tried is reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import nn

from flatreg.data.files import read_json, write_json, write_whole
from flatreg.data.images import ImageArrays, Splits
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome, measured_by_outcome
from flatreg.evaluation.results import Evaluation
from flatreg.run.checkpoints import Epoch, flagged, read_history
from flatreg.run.models import load_model
from flatreg.run.recipe import Recipe, changed, dump_recipe, load_recipe
from flatreg.run.train import train

if TYPE_CHECKING:
    from accelerate import Accelerator


SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """One value: a training and what it gave on the held-back images.

    Attributes:
        value: as it was asked for.
        evaluation: clean and attacked accuracy; None where the training failed.
        relative_flatness: kappa on the same images by outcome, raw and at matched confidence,
            larger = sharper; None where it failed or the model has no linear head.
        history: its training.
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
        """What flags its training and its evaluation."""
        judged = self.evaluation.findings if self.evaluation else []
        return flagged(self.history) + [f for f in judged if f.verdict == "flagged"]


@dataclass(frozen=True)
class Sweep:
    """All values tried for one key; `schema` is raised when a field changes its meaning.

    Attributes:
        schema: of this file.
        key: dotted path of what was changed.
        arm: which arm of the recipe was trained.
        recipe: the others' settings, resolved.
        trials: one a value, in the order asked for.
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


def trained_arm(key: str) -> str:
    """Name of the arm that a sweep over `key` trains: a variant's own keys train that variant."""
    first, *rest = key.split(".")
    return rest[0] if first == "variants" and rest else "flatreg"


def recipes_over(recipe: Recipe, key: str, values: Sequence[Any]) -> dict[str, Recipe]:
    """The recipe of every value, by the name of its folder, in the order of `values`.

    Raises:
        ValueError: nothing is held back; no values; `key` changes what the values are judged on; a
            value does not belong there, is there twice or has the folder of another.
    """
    if not recipe.data.validation:
        raise ValueError("sweep needs data.validation > 0: it may not look at the test split")
    if key.split(".")[0] in ("data", "evaluation"):
        raise ValueError(f"sweep needs a key of the training, got {key}: it moves the yardstick")
    if not values:
        raise ValueError("sweep needs at least one value")
    recipes: dict[str, Recipe] = {}
    for value in values:
        name = re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_.")[:60] or "empty"
        one = changed(recipe, key, value)
        if name in recipes or one in recipes.values():
            raise ValueError(f"{key}: expected distinct values, got {value} twice or too alike")
        recipes[name] = one
    return recipes


def run_sweep(
    recipe: Recipe, key: str, values: Sequence[Any], folder: Path, accelerator: Accelerator
) -> Sweep:
    """Train the recipe once for each value of `key`, and judge each on what is held back.

    All trainings share seed, epochs and data; the test split is not used. Each value lives in
    `folder/values/<value>`, where the same call goes on after an interruption and a longer list of
    values reuses what is there. A training whose loss is no number is a result too. The best of
    several values is flattered by the choice: report it on the test split, once.

    Args:
        recipe: what the trainings share, with `data.validation` > 0.
        key: dotted path into the recipe, such as "penalties.0.strength"; list items by number.
        values: what to put there.
        folder: for `sweep.json` and the trainings.
        accelerator: from `flatreg.run.train.make_accelerator`; every process of a launch must call.

    Returns:
        All trials, the best value, and those that cannot be told from it.

    Raises:
        ValueError: as `recipes_over`; or a value's folder holds the training of another recipe.
    """
    recipes = recipes_over(recipe, key, values)
    places = {name: folder / "values" / name for name in recipes}
    for name, one in recipes.items():
        written = places[name] / "recipe.yaml"
        if written.exists() and load_recipe(written) != one:
            raise ValueError(f"{places[name]} holds another recipe's run: choose another folder")
    accelerator.wait_for_everyone()
    splits, arm, fits = recipe.data.load(), trained_arm(key), dict[str, Any]()
    trials = [
        _try_value(one, arm, value, splits, places[name], accelerator, fits)
        for value, (name, one) in zip(values, recipes.items(), strict=True)
    ]
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


def _try_value(
    recipe: Recipe,
    name: str,
    value: Any,
    splits: Splits,
    place: Path,
    accelerator: Accelerator,
    fits: dict[str, Any],
) -> Trial:
    """Train and judge one value, or read what an earlier call wrote."""
    written = place / "trial.json"
    if written.exists():
        return read_json(written, _TRIAL, what="a trial")
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "recipe.yaml", dump_recipe(recipe))
    accelerator.wait_for_everyone()
    arm, weights, label = recipe.arms()[name], place / "checkpoint", f"{name} {place.name}"
    try:
        history = train(recipe, label, arm, splits, weights, accelerator, fits)
    except FloatingPointError as error:
        accelerator.free_memory()
        reason = str(error).partition("; ")[0].partition(": ")[2]
        trial = Trial(value, None, None, read_history(weights), reason)
    else:
        model = load_model(weights).to(accelerator.device)
        progress = accelerator.is_main_process
        trial = Trial(value, *_judge(recipe, model, splits.validation, progress), history)
    if accelerator.is_main_process:
        write_json(written, trial, _TRIAL)
    accelerator.wait_for_everyone()
    return trial


def _judge(
    recipe: Recipe, model: nn.Module, data: ImageArrays, progress: bool
) -> tuple[Evaluation, FlatnessByOutcome | None]:
    threat = recipe.evaluation
    evaluation = evaluate(model, data, **threat.settings(), progress=progress)
    return evaluation, measured_by_outcome(
        model,
        data,
        evaluation.indices,
        eps=threat.eps,
        norm=threat.norm,
        seed=threat.seed,
        batch_size=threat.batch_size,
    )


def _best(trials: Sequence[Trial]) -> tuple[Any, list[Any]]:
    """Value of the best trial, and those of the trials that its interval covers."""
    judged = [(t, t.evaluation) for t in trials if t.evaluation]
    if not judged:
        return None, []
    best, top = max(judged, key=lambda pair: (pair[1].attacked.value, pair[1].clean.value))
    tied = [t.value for t, e in judged if t is not best and e.attacked.value >= top.attacked.low]
    return best.value, tied
