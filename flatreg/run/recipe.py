"""Recipes: typed YAML that names what to train and how to evaluate it, and imports no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flatreg.data.configuration import mistake
from flatreg.data.image_files import Interpolation
from flatreg.data.sources import Data
from flatreg.data.text import one_line
from flatreg.optimizers.methods import Wrapper
from flatreg.run.catalogue import settings_at
from flatreg.run.recipe_sections import (
    WHERE_DECODED,
    Augment,
    EvaluationSettings,
    Model,
    Monitor,
    Optimizer,
    Section,
    Seed,
)
from flatreg.run.settings import RecipeError, Settings, path_in, read_settings, set_at
from flatreg.terms import Criterion, Penalty
from flatreg.terms.criteria import CrossEntropy
from flatreg.terms.fast_criteria import FGSMRSCS, NUAT
from flatreg.terms.protocol import Count, Number, Positive
from flatreg.terms.stored_start import FGSMPGI

_MOST_EPOCHS = 1_000_000


# YAML reads a bare no as false.
Precision = Annotated[
    Literal["no", "fp16", "bf16"], BeforeValidator(lambda said: "no" if said is False else said)
]
ArmName = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]{0,30}$")]


class Arm(Section):
    """One of the trainings that a report compares: what it adds to the plain one.

    `model` takes the place of the recipe's, for recipes that compare architectures.
    """

    criterion: Criterion | None = None
    penalties: list[Penalty] = Field(default_factory=list)
    wrapper: Wrapper | None = None
    model: Model | None = None


class Recipe(Section):
    """What to train, on which data, and how to evaluate it.

    The recipe's own criterion, penalties and wrapper make the arm that `arm` names. `baseline:
    true` adds the arm `plain`: the same seed, epochs and criterion, without penalties and wrapper.
    `variants` add further arms: each is the plain arm with what it names. `ema` is the decay of an
    exponential moving average of the weights; where it is set, the average is monitored and
    evaluated. A step takes `batch_size` images of all processes together, in `accumulation`
    micro-batches. Of steps whose gradient is not finite up to `skip_nonfinite` in a row are
    skipped; 0 ends the training. `mixed_precision` is that of the training, by default what
    Accelerate is configured for. A checkpoint is written after every epoch, and within it every
    `checkpoint_minutes`. `log_with` names trackers of Accelerate.
    """

    seed: Seed = 0
    arm: ArmName = "flatreg"
    data: Data
    augment: Augment = Field(default_factory=Augment)
    model: Model
    criterion: Criterion = Field(default_factory=CrossEntropy)
    penalties: list[Penalty] = Field(default_factory=list)
    optimizer: Optimizer
    epochs: Annotated[Count, Field(le=_MOST_EPOCHS)]
    batch_size: Count = 128
    accumulation: Count = 1
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    checkpoint_minutes: Positive = 10.0
    mixed_precision: Precision | None = None
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    monitor: Monitor | None = None
    log_with: list[str] = Field(default_factory=list)
    evaluation: EvaluationSettings
    baseline: bool = False
    variants: dict[ArmName, Arm] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        taken = {self.arm, "plain"} & set(self.variants)
        if taken:
            raise ValueError(f"variants may not be called {taken.pop()}: that arm exists already")
        if self.arm == "plain" and self.baseline:
            raise ValueError("arm: expected another name than plain: baseline adds that arm")
        if self.monitor and not self.data.validation:
            raise ValueError("monitor needs data.validation > 0: it may not use the test split")
        if self.monitor and self.monitor.every > self.epochs:
            raise ValueError(
                f"monitor.every: expected at most the {self.epochs} epochs, got "
                f"{self.monitor.every}"
            )
        if not getattr(self.data, "workers", 0):
            for name in WHERE_DECODED:
                if getattr(self.augment, name):
                    raise ValueError(
                        f"augment.{name} is for images that are decoded as they are needed: set "
                        "data.workers (folder, timm, torchvision's sets of files), or delete it"
                    )
        for name in ("warmup_epochs", "head_epochs"):
            if (value := getattr(self.optimizer, name)) > self.epochs:
                raise ValueError(
                    f"optimizer.{name}: expected at most the {self.epochs} epochs, got {value:g}"
                )
        if self.optimizer.schedule == "tanh" and self.optimizer.warmup_epochs == self.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs: expected less than the {self.epochs} epochs, as tanh "
                "warms up to where it goes on, which is its end"
            )
        decays = {"decay_epochs": self.optimizer.decay_epochs or 0}
        decays["decay_milestones"] = max(self.optimizer.decay_milestones or [0])
        for name, value in decays.items():
            if value >= self.epochs:
                raise ValueError(
                    f"optimizer.{name}: expected less than the {self.epochs} epochs, got {value:g}"
                )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation must divide batch_size, got {self.accumulation} and "
                f"{self.batch_size}"
            )
        if self.augment.mixes and self.batch_size // self.accumulation % 2:
            raise ValueError(
                f"mixing pairs needs an even batch_size / accumulation, got {self.batch_size} / "
                f"{self.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _gives_criteria_what_they_need(self) -> Recipe:
        workers = getattr(self.data, "workers", 0)
        for arm in self.arms().values():
            criterion: Any = arm.criterion
            if self.accumulation > 1 and isinstance(criterion, (NUAT, FGSMRSCS)):
                raise ValueError(
                    f"{criterion.kind} is of the whole batch: expected accumulation 1, got "
                    f"{self.accumulation}"
                )
            if isinstance(criterion, NUAT) and arm.wrapper and arm.wrapper.micro_batches > 1:
                raise ValueError("NUAT is of the whole batch: delete micro_batches")
            if isinstance(criterion, FGSMPGI) and self.augment.mixes:
                raise ValueError("FGSMPGI stores something of each image, and mixup mixes images")
            if isinstance(criterion, FGSMPGI) and workers:
                raise ValueError("FGSMPGI takes images that are in memory: delete data.workers")
        return self

    def arms(self) -> dict[str, Arm]:
        """All arms by name, the plain one first, every criterion and model filled in."""
        plain = {"plain": Arm()} if self.baseline else {}
        own = Arm(penalties=self.penalties, wrapper=self.optimizer.wrapper)
        arms = plain | self.variants | {self.arm: own}
        for name, arm in arms.items():
            filled = {
                "criterion": arm.criterion or self.criterion,
                "model": arm.model or self.model,
            }
            arms[name] = arm.model_copy(update=filled)
        return arms


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file and apply `key.path=value` overrides (list items by number).

    Raises:
        RecipeError: every mistake, one a line, each `file:line: path: message`; for an override
            `file, key=value: path: message`.
    """
    return _validated(read_settings(path, overrides), str(path))


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with `value` at the dotted path `key` (list items by number).

    Raises:
        RecipeError: there is no such place, or the value does not belong there.
    """
    raw = recipe.model_dump(mode="json")
    set_at(raw, key, value)
    return _validated(Settings(raw, {}), one_line(f"{key}={value}", 80))


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every default filled in; reads back to the same recipe."""
    return yaml_text(recipe.model_dump(mode="json"))


def yaml_text(recipe: Mapping[str, Any]) -> str:
    """The settings of a recipe as a file has them."""
    text: str = yaml.safe_dump(dict(recipe), sort_keys=False)
    return text


def holds_another(file: Path, recipe: Recipe) -> bool:
    """Whether `file` exists and is not `recipe`.

    Recipes are compared as they are read: order, comments and defaults make no other recipe.

    Raises:
        RecipeError: the file cannot be read as a recipe.
    """
    if not file.exists():
        return False
    # How often checkpoints are written changes no number, nor does how many workers decode.
    there = load_recipe(file)
    data: Any = there.data
    workers = getattr(recipe.data, "workers", 0)
    if workers and getattr(data, "workers", 0):
        data = replace(data, workers=workers)
    alike = {"checkpoint_minutes": recipe.checkpoint_minutes, "data": data}
    return there.model_copy(update=alike) != recipe


def _validated(settings: Settings, source: str) -> Recipe:
    """The recipe that settings spell; `source` is where they are from.

    Raises:
        RecipeError: every mistake, one a line.
    """
    mistakes: list[tuple[Sequence[int | str], str]]
    try:
        recipe = Recipe.model_validate(settings.values)
    except ValidationError as error:
        mistakes = [
            (
                path_in(settings.values, found["loc"]),
                mistake(found, settings_at(Recipe, found["loc"][:-1])),
            )
            for found in error.errors()
        ]
    else:
        mistakes = [
            (path, "expected a number, got true or false")
            for path in booleans(settings.values, recipe.model_dump(mode="json"))
        ]
    lines = [
        f"{settings.place(path, source)}: {one_line('.'.join(map(str, path)), 120) or 'recipe'}: "
        f"{one_line(message, 500)}"
        for path, message in mistakes
    ]
    if lines:
        raise RecipeError("\n".join(lines))
    return _cut_as_for_the_weights(recipe)


def _cut_as_for_the_weights(recipe: Recipe) -> Recipe:
    """Images that stream to pretrained weights are cut as timm's configuration of these says."""
    data: Any = recipe.data
    if not (getattr(data, "workers", 0) and recipe.model.pretrained):
        return recipe
    cut: dict[str, Any] = {"crop_pct": data.crop_pct, "interpolation": data.interpolation}
    if None not in cut.values():
        return recipe
    config = recipe.model.recorded()
    of_weights = {key: config.get(key) for key in cut}
    if of_weights["interpolation"] in get_args(Interpolation):
        cut = {name: of_weights[name] if given is None else given for name, given in cut.items()}
    return recipe.model_copy(update={"data": replace(data, **cut)})


def booleans(raw: Any, read: Any, path: tuple[int | str, ...] = ()) -> Iterator[Any]:
    """Paths of the booleans that pydantic has read as numbers."""
    if isinstance(raw, bool):
        if isinstance(read, (int, float)) and not isinstance(read, bool):
            yield path
    elif isinstance(raw, dict) and isinstance(read, dict):
        for key in raw.keys() & read.keys():
            yield from booleans(raw[key], read[key], (*path, key))
    elif isinstance(raw, list) and isinstance(read, list):
        for number, pair in enumerate(zip(raw, read, strict=False)):
            yield from booleans(*pair, (*path, number))
