"""What `flatreg evaluate` and `measure` are given: a timm model or an arm of a run, and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as record
from timm.models import is_model, list_models
from torch import nn

from flatreg.data.configuration import first_mistake, mistake
from flatreg.data.image_files import Folder, Timm
from flatreg.data.images import Images, Splits
from flatreg.data.sources import Data, source_name
from flatreg.data.text import counted, did_you_mean, one_line, shown
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.measures.manifold import IdentityManifold, Manifold, PCAManifold
from flatreg.models.hub import is_stored
from flatreg.models.pretrained import load_weights
from flatreg.models.weight_files import read_weights
from flatreg.run.brought import (
    as_trained,
    check_classes,
    check_data,
    check_unseen,
    cut_of,
    short_form,
)
from flatreg.run.build import create, load_model
from flatreg.run.catalogue import settings_at
from flatreg.run.checkpoints import read_history
from flatreg.run.places import DATA_FORMS, run_of
from flatreg.run.recipe import booleans, load_recipe
from flatreg.run.recipe_sections import EvaluationSettings, Model
from flatreg.run.settings import parse_settings, path_in
from flatreg.terms.protocol import Count
from flatreg.threat import Norm

Settings = TypeVar("Settings")
Asked = TypeVar("Asked", MeasureSettings, EvaluationSettings)
_OF_THE_MODEL = {"pretrained", "weights", "weights_key", "args", "mean", "std"}


@record(frozen=True, kw_only=True)
class TargetSettings:
    """What the commands take as `key=value` beside how to measure or evaluate, and `data.*`.

    Attributes:
        rank: principal components of the training images that count as the manifold of a
            measurement, 0 for none.
        split: which images are used.
        size: of the images in pixels, for digits and image files.
        weights: file with the weights of a timm model: safetensors, or of `torch.save`.
        weights_key: under which the weights lie, where the file has several.
        pretrained, args, mean, std: of a timm model, as in a recipe; a stored model is pretrained.
    """

    rank: Annotated[int, Field(ge=0)] = 64
    split: Literal["train", "validation", "test"] = "test"
    size: Annotated[Count, Field(ge=8)] | None = None
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool | None = None
    args: dict[str, Any] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Target(Generic[Asked]):
    """A model with the data and the settings to measure or evaluate it with.

    Attributes:
        name: of the model.
        model: images in [0,1] to logits.
        spec: the model as in a recipe.
        data: its source, as in a recipe.
        data_name: with the split.
        split: of the images that are used: train, validation or test.
        splits: all of the data; the manifold, of `rank`, is fitted to the training images.
        images: the split that is used.
        rank: of the manifold.
        settings: how it is measured or evaluated.
        notes: cautions that a card prints.
    """

    name: str
    model: nn.Module
    spec: dict[str, Any]
    data: dict[str, Any]
    data_name: str
    split: str
    splits: Splits
    images: Images
    rank: int
    settings: Asked
    notes: list[str]


def load_target(
    model: str, data: str | None, overrides: Sequence[str], asked: type[Asked]
) -> Target[Asked]:
    """Load a timm model by its name, or an arm by the folder of its checkpoints in a run.

    `data` is a short form of `data.*` settings: "digits", an .npz file, a folder of images,
    "cifar10:ROOT" for a set of torchvision, "hfds/OWNER/SET"; None: the data of the run.
    `overrides` are `key=value`: the fields of `asked` and of `TargetSettings`, and `data.*` as in a
    recipe. `eps` and `norm` default to those of the run.

    Raises:
        ValueError: there is no such setting, model, checkpoint, data or split, or they do not fit.
    """
    own, given, of_data = _sorted_settings(overrides, asked)
    settings, folder = validated(TargetSettings, own), Path(model)
    of_data = ({"size": settings.size} if settings.size else {}) | of_data
    if not folder.is_dir():
        return _timm_target(model, data, settings, given, of_data, asked)
    if own.keys() & _OF_THE_MODEL:
        raise ValueError(f"{folder}: the recipe of the run says what the model is")
    return _arm_target(folder, data, settings, given, of_data, asked)


def _sorted_settings(
    overrides: Sequence[str], asked: type[MeasureSettings] | type[EvaluationSettings]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the target, of what is asked about it, and of the data."""
    raw = {k.removeprefix("evaluation."): v for k, v in parse_settings(overrides).items()}
    of_data = {k.removeprefix("data."): raw.pop(k) for k in list(raw) if k.startswith("data.")}
    known, own = settings_at(asked, ()), settings_at(TargetSettings, ())
    if asked is EvaluationSettings:
        own.remove("rank")
    if unknown := raw.keys() - {*known, *own}:
        keys, wrong = [*known, *own, "data.*"], min(unknown)
        near = did_you_mean(wrong, keys)
        raise ValueError(f"no setting {wrong:.80}: expected one of {', '.join(keys)}{near}")
    return (
        {key: value for key, value in raw.items() if key in own},
        {key: value for key, value in raw.items() if key in known},
        of_data,
    )


def measure_target(target: Target[MeasureSettings], *, progress: bool) -> GeometryCard:
    """Measure as the settings say, after fitting the manifold to the training images.

    Raises:
        ValueError: there are too few images or pixels for the rank, or what
            `flatreg.evaluation.geometry.measure` refuses.
    """
    manifold: Manifold = IdentityManifold()
    if target.rank and not len(target.splits.train):
        raise ValueError("rank: there are no training images to fit a manifold to: write rank=0")
    if target.rank:
        manifold = PCAManifold(rank=target.rank).fit(target.splits.to_fit())
    names = {key: getattr(target, key) for key in ("name", "data_name", "notes")}
    settings = vars(target.settings) | names
    return measure(target.model, target.images, manifold=manifold, progress=progress, **settings)


def _arm_target(
    folder: Path,
    data: str | None,
    settings: TargetSettings,
    given: dict[str, Any],
    of_data: dict[str, Any],
    asked: type[Asked],
) -> Target[Asked]:
    arm_name, run = folder.resolve().name, run_of(folder)
    if run is None:
        raise ValueError(
            f"{folder}: expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no "
            f"{folder.resolve().parent.parent / 'recipe.yaml'}"
        )
    recipe = load_recipe(run / "recipe.yaml")
    threat = recipe.evaluation.model_dump()
    eps, norm = threat["eps"], threat["norm"]
    if "eps" not in given and given.get("norm", norm) in {*get_args(Norm)} - {norm}:
        raise ValueError(f"norm={given['norm']}: needs eps=, the run's {eps:g} is in {norm}")
    if asked is MeasureSettings:
        threat = {"eps": eps, "norm": norm}
    chosen = validated(asked, threat | given)
    model, arm = load_model(folder), recipe.arms().get(arm_name)
    spec = (arm and arm.model) or recipe.model
    epochs, whole = len(read_history(folder)), recipe.epochs
    notes = [f"trained for {epochs} of {counted(whole, 'epoch')}"] if epochs < whole else []
    raw = as_trained([folder], recipe.data, data, of_data) | of_data
    check_unseen(recipe.data, _validated_data(raw), settings.split)
    images = _images(raw, settings)
    check_data(folder, images["splits"], sized="size" in of_data)
    name = f"{spec.name}, {run.name}/{arm_name}"
    return Target(
        name=name, model=model, spec=spec.model_dump(), settings=chosen, notes=notes, **images
    )


def _timm_target(
    name: str,
    data: str | None,
    settings: TargetSettings,
    given: Mapping[str, Any],
    of_data: dict[str, Any],
    asked: type[Asked],
) -> Target[Asked]:
    _check_name(name)
    if data is None and "kind" not in of_data:
        raise ValueError(f"{name} is no folder of a run; a timm model needs --data: {DATA_FORMS}")
    if given.get("eps") is None:
        raise ValueError(f"{name}: a timm model needs eps=, the radius of the attack")
    chosen = validated(asked, given)
    spec = _spec(name, settings)
    cut, stored = cut_of(spec, of_data.get("workers")), is_stored(name)
    raw = {} if data is None else short_form(data, cut, every=stored)
    images = _images(raw | of_data, settings)
    classes, channels = images["splits"].num_classes, images["splits"].channels
    of_weights = spec.recorded() if stored and settings.weights is None else {}
    if (names := of_weights.get("label_names")) and len(names) == classes:
        check_classes(tuple(names), classes, images["splits"])
    torch.manual_seed(chosen.seed)
    try:
        network = create(spec, classes, channels, pretrained=spec.pretrained)
    except OSError as error:  # the hub cannot be reached
        raise ValueError(f"{name}: {one_line(error, None)}") from error
    loaded = settings.weights is None or load_weights(
        network, settings.weights, settings.weights_key
    )
    if not loaded:
        raise ValueError(f"weights: {settings.weights} has no head for {classes} classes")
    doubts = list(_random_parts(network, spec, classes))
    if doubts and asked is EvaluationSettings:  # the accuracy of guesses tells nothing
        raise ValueError(f"{name}: {doubts[0]}")
    return Target(
        name=name, model=network, spec=spec.model_dump(), settings=chosen, notes=doubts, **images
    )


def _check_name(name: str) -> None:
    """Refuse what is a file, looks like a folder, or is no model that timm has."""
    if Path(name).is_file():
        raise ValueError(
            f"{shown(name)}: expected a model, got a file: write the name of its timm model, and "
            f"weights={shown(name)}"
        )
    if ":" in name:
        return  # `Model` judges these
    if "/" in name:
        raise ValueError(f"{shown(name)}: there is no such folder of checkpoints")
    if not is_model(name.partition(".")[0]):
        near = did_you_mean(name, list_models())
        raise ValueError(f"Unknown model {one_line(name, 80)}: timm has no such{near}")


def _spec(name: str, settings: TargetSettings) -> Model:
    """The model as a recipe has it; normalised as its weights say, where nothing else is given."""
    mean, std = settings.mean, settings.std
    if settings.weights is not None and mean is None and std is None:
        _, mean, std = read_weights(settings.weights, settings.weights_key)
    said = settings.pretrained
    of_the_model = {
        "args": settings.args or {},
        "pretrained": is_stored(name) and settings.weights is None if said is None else said,
        "weights": settings.weights,
        "weights_key": settings.weights_key,
        "mean": mean,
        "std": std,
    }
    return validated(Model, {"name": name, **of_the_model})


def _random_parts(network: nn.Module, spec: Model, classes: int) -> Iterator[str]:
    """What of the model nobody has trained."""
    config: dict[str, Any] = getattr(network.get_submodule("model"), "pretrained_cfg", None) or {}
    if spec.weights is None and not spec.pretrained:
        yield "the weights are random: neither pretrained=true nor weights=FILE was given"
    elif spec.weights is None and (trained := config.get("num_classes")) != classes:
        yield f"the head is random: the weights are for {trained} classes, not for {classes}"


def _images(raw: dict[str, Any], settings: TargetSettings) -> dict[str, Any]:
    """The fields of a `Target` that come from the data."""
    source: Any = _validated_data(raw)
    splits: Splits = to_evaluate(source) if settings.split == "test" else source.load()
    images: Images = getattr(splits, settings.split)
    if not len(images):
        raise ValueError(f"split={settings.split}: there are no such images")
    data = TypeAdapter(Data).dump_python(source, mode="json")
    name = f"{source_name(data)} ({settings.split})"
    own: dict[str, Any] = {"data": data, "data_name": name, "rank": settings.rank}
    own["split"] = settings.split
    return own | {"splits": splits, "images": images}


def to_evaluate(source: Data) -> Splits:
    """All of the data; of a folder without training images, the test images."""
    return source.load_test() if isinstance(source, Folder | Timm) else source.load()


def _validated_data(raw: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(Data).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ["data", *path_in(raw, first["loc"])]))
        known = settings_at(Data, first["loc"][:-1])
        raise ValueError(one_line(f"{place}: {mistake(first, known)}", 500)) from error


def validated(kind: type[Settings], raw: Mapping[str, Any]) -> Settings:
    """Settings of a command.

    Raises:
        ValueError: the first that is wrong, in one line.
    """
    adapter = TypeAdapter(kind)
    try:
        read = adapter.validate_python(dict(raw))
    except ValidationError as error:
        raise ValueError(first_mistake(error, getattr(kind, "model_fields", ()))) from error
    for path in booleans(dict(raw), adapter.dump_python(read, mode="json")):
        raise ValueError(f"{'.'.join(map(str, path))}: expected a number, got true or false")
    return read
