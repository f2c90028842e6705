"""What `flatreg measure` measures: a timm model, or an arm of a finished run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from flatreg.data.images import Images, Splits
from flatreg.data.sources import Array, Data, Digits, source_name
from flatreg.data.text import one_line
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.measures.manifold import IdentityManifold, Manifold, PCAManifold
from flatreg.models.pretrained import load_weights
from flatreg.run.build import create, load_model
from flatreg.run.checkpoints import read_history
from flatreg.run.recipe import load_recipe
from flatreg.run.recipe_sections import Model
from flatreg.run.settings import did_you_mean, parse_settings
from flatreg.terms.protocol import Count
from flatreg.threat import Norm

Settings = TypeVar("Settings")
_OF_THE_MODEL = {"pretrained", "weights", "args", "mean", "std"}  # which an arm's recipe says


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What the command takes as `key=value` beside `MeasureSettings`.

    Attributes:
        rank: principal components of the training images that count as the manifold, 0 for none.
        split: which images are measured.
        size: of the digits, in pixels.
        weights: safetensors file with the weights of a timm model.
        pretrained, args, mean, std: of a timm model, as in a recipe.
    """

    rank: Annotated[int, Field(ge=0)] = 64
    split: Literal["train", "validation", "test"] = "test"
    size: Annotated[Count, Field(ge=8)] = 32
    pretrained: bool = False
    weights: str | None = None
    args: dict[str, Any] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A model with the data and the settings to measure it with.

    Attributes:
        model: images in [0,1] to logits.
        splits: all of the data; the manifold, of `rank`, is fitted to the training images.
        images: the split that is measured.
        notes: cautions that the card prints.
    """

    name: str
    model: nn.Module
    data_name: str
    splits: Splits
    images: Images
    rank: int
    settings: MeasureSettings
    notes: list[str]


def load_target(model: str, data: str | None, overrides: Sequence[str]) -> Target:
    """Load a timm model by its name, or an arm by the folder of its checkpoints in a run.

    `data` is "digits" or an .npz file; None: the data of the run. `overrides` are `key=value`, the
    fields of `MeasureSettings` and `TargetSettings`; `eps` and `norm` default to those of the run.

    Raises:
        ValueError: there is no such setting, model, checkpoint, data or split, or they do not fit.
    """
    raw = parse_settings(overrides)
    known = {kind: {f.name for f in fields(kind)} for kind in (MeasureSettings, TargetSettings)}
    unknown = raw.keys() - known[MeasureSettings] - known[TargetSettings]
    if unknown:
        keys, wrong = [f.name for kind in known for f in fields(kind)], min(unknown)
        near = did_you_mean(wrong, keys)
        raise ValueError(f"no setting {wrong:.80}: expected one of {', '.join(keys)}{near}")
    own, given = (
        {key: value for key, value in raw.items() if key in known[kind]}
        for kind in (TargetSettings, MeasureSettings)
    )
    settings, folder = validated(TargetSettings, own), Path(model)
    if not folder.is_dir():
        return _timm_target(model, data, settings, given)
    if own.keys() & _OF_THE_MODEL:
        raise ValueError(f"{folder}: the recipe of the run says what the model is")
    return _arm_target(folder, data, settings, given)


def measure_target(target: Target, *, progress: bool) -> GeometryCard:
    """Measure as the settings say, after fitting the manifold to the training images.

    Raises:
        ValueError: there are too few images or pixels for the rank, or what
            `flatreg.evaluation.geometry.measure` refuses.
    """
    manifold: Manifold = IdentityManifold()
    if target.rank:
        manifold = PCAManifold(rank=target.rank).fit(target.splits.to_fit())
    names = {key: getattr(target, key) for key in ("name", "data_name", "notes")}
    settings = vars(target.settings) | names
    return measure(target.model, target.images, manifold=manifold, progress=progress, **settings)


def _arm_target(
    folder: Path, data: str | None, settings: TargetSettings, given: dict[str, Any]
) -> Target:
    arm_name, run = folder.resolve().name, folder.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder}: expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no "
            f"{run / 'recipe.yaml'}"
        )
    recipe = load_recipe(run / "recipe.yaml")
    eps, norm = recipe.evaluation.eps, recipe.evaluation.norm
    if "eps" not in given and given.get("norm", norm) in {*get_args(Norm)} - {norm}:
        raise ValueError(f"norm={given['norm']}: needs eps=, the run's {eps:g} is in {norm}")
    measurement = validated(MeasureSettings, {"eps": eps, "norm": norm} | given)
    model, arm = load_model(folder), recipe.arms().get(arm_name)
    name = f"{((arm and arm.model) or recipe.model).name}, {run.name}/{arm_name}"
    epochs, whole = len(read_history(folder)), recipe.epochs
    notes = [f"trained for {epochs} of {whole} epochs"] if epochs < whole else []
    images = _images(_data(data, settings) if data else recipe.data, settings)
    return Target(name=name, model=model, settings=measurement, notes=notes, **images)


def _timm_target(
    name: str, data: str | None, settings: TargetSettings, given: Mapping[str, Any]
) -> Target:
    if "/" in name and ":" not in name:  # others with a slash are refused by `Model`
        raise ValueError(f"{name}: there is no such folder of checkpoints")
    if data is None:
        raise ValueError(f"{name} is no folder of a run; a timm model needs --data digits|FILE.npz")
    if given.get("eps") is None:
        raise ValueError(f"{name}: a timm model needs eps=, the radius of the attack")
    measurement = validated(MeasureSettings, given)
    images = _images(_data(data, settings), settings)
    classes, channels = images["splits"].num_classes, images["splits"].channels
    keys = ("pretrained", "weights", "mean", "std")
    of_the_model = {key: getattr(settings, key) for key in keys}
    spec = validated(Model, {"name": name, "args": settings.args or {}, **of_the_model})
    torch.manual_seed(measurement.seed)
    try:
        network = create(spec, classes, channels, pretrained=settings.pretrained)
    except OSError as error:  # the hub cannot be reached
        raise ValueError(f"{name}: {one_line(error, None)}") from error
    bare, notes = network.get_submodule("model"), []
    config: dict[str, Any] = getattr(bare, "pretrained_cfg", None) or {}
    if settings.weights is not None:
        if not load_weights(network, settings.weights):
            raise ValueError(f"weights: {settings.weights} has no head for {classes} classes")
    elif not settings.pretrained:
        notes.append("the weights are random: neither pretrained=true nor weights=FILE was given")
    elif config.get("num_classes") != classes:
        notes.append(f"the head is random: the weights are not for {classes} classes")
    return Target(name=name, model=network, settings=measurement, notes=notes, **images)


def _data(data: str, settings: TargetSettings) -> Data:
    return Digits(size=settings.size) if data == "digits" else Array(path=data)


def _images(source: Data, settings: TargetSettings) -> dict[str, Any]:
    """The fields of a `Target` that come from the data."""
    splits = source.load()
    images: Images = getattr(splits, settings.split)
    if not len(images):
        raise ValueError(f"split={settings.split}: there are no such images")
    name = f"{source_name(vars(source))} ({settings.split})"
    return {"data_name": name, "splits": splits, "images": images, "rank": settings.rank}


def validated(kind: type[Settings], raw: Mapping[str, Any]) -> Settings:
    """Settings of a command.

    Raises:
        ValueError: the first that is wrong, in one line.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = list(getattr(kind, "model_fields", ()))
            message = f"there is no such setting{did_you_mean(place, known)}"
        if first["type"] == "literal_error":
            known = re.findall(r"'([^']+)'", first["ctx"]["expected"])
            message += f", got {one_line(repr(first['input']), 80)}"
            message += did_you_mean(first["input"], known)
        raise ValueError(one_line(f"{place}: {message}" if place else message, 500)) from error
