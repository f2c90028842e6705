"""What `flatreg measure` is asked to measure: a timm model, or an arm of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flatreg.data.arrays import Array, Digits
from flatreg.data.images import ImageArrays, Splits
from flatreg.data.sources import Data, source_name
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import PARTS, measure
from flatreg.evaluation.geometry.sharded import Part
from flatreg.measures.manifold import IdentityManifold, Manifold, PCAManifold
from flatreg.run.build import build_model, load_model
from flatreg.run.checkpoints import read_history
from flatreg.run.recipe import Recipe, load_recipe
from flatreg.terms.protocol import Count, Eps, Strength


class Settings(BaseModel):
    """What the command takes as `key=value`.

    `pretrained`, `weights`, `args`, `mean` and `std` describe a timm model; `rank` is the number of
    principal components of the training images that count as the manifold, 0 for none; `size` is
    that of the digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    eps: Eps | None = None
    samples: Count | None = 512
    probed: Count = 64
    num_probes: Annotated[int, Field(ge=2)] = 32
    radii: Annotated[list[Strength], Field(min_length=1)] | None = None
    rank: Annotated[int, Field(ge=0)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 128
    parts: list[Part] | None = None
    split: Literal["train", "validation", "test"] = "test"
    size: Annotated[int, Field(ge=8)] = 32
    pretrained: bool = False
    weights: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with the data to measure it on.

    Attributes:
        name: of the model.
        model: images in [0,1] to logits.
        data_name: of the data, with its split.
        splits: all of the data; the manifold is fitted to the training images.
        eps: of the run, or what the settings say.
        notes: what to keep in mind.
    """

    name: str
    model: nn.Module
    data_name: str
    splits: Splits
    eps: float
    notes: list[str]


def read_settings(overrides: Sequence[str]) -> Settings:
    """Read `key=value` settings.

    Raises:
        ValueError: one is not of that form, has no such key, or a value that does not belong there.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {override!r}")
        try:
            raw[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r}: the value is not YAML") from error
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            keys = ", ".join(Settings.model_fields)
            raise ValueError(f"no setting {first['loc'][0]}: expected one of {keys}") from error
        path = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from error


def load_subject(model: str, data: str | None, settings: Settings) -> Subject:
    """Load what `flatreg measure` measures.

    Args:
        model: name of a timm model, or the folder of an arm's checkpoints in a run.
        data: "digits" or an .npz file; left out, the data of the run.
        settings: of the command.

    Raises:
        ValueError: there is no such model, checkpoint or data, or they do not fit.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _timm_model(model, data, settings)
    if settings.model_fields_set & {"pretrained", "weights", "args", "mean", "std"}:
        raise ValueError(f"{folder}: the recipe of the run says what the model is")
    recipe_file = folder.resolve().parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(
            f"{folder}: expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no "
            f"{recipe_file}"
        )
    recipe = load_recipe(recipe_file)
    source = _data(data, settings) if data else recipe.data
    splits = source.load()
    arm = recipe.arms().get(folder.resolve().name)
    spec = (arm and arm.model) or recipe.model
    network, epochs = load_model(folder), len(read_history(folder))
    notes = []
    if epochs < recipe.epochs:
        notes.append(f"trained for {epochs} of {recipe.epochs} epochs")
    run = folder.resolve().parent.parent.name
    return Subject(
        f"{spec.name}, {run}/{folder.resolve().name}",
        network,
        _data_name(source, settings),
        splits,
        recipe.evaluation.eps,
        notes,
    )


def measure_subject(subject: Subject, settings: Settings, *, progress: bool) -> GeometryCard:
    """Measure as the settings say, after fitting the manifold to the training images.

    Raises:
        ValueError: the split is empty, there are too few images or pixels for `rank`, or what
            `flatreg.evaluation.geometry.measure` refuses.
    """
    images: ImageArrays = getattr(subject.splits, settings.split)
    if not len(images):
        raise ValueError(f"split={settings.split}: there are no such images")
    manifold: Manifold = IdentityManifold()
    if settings.rank:
        manifold = PCAManifold(rank=settings.rank).fit(subject.splits.train.images)
    options = settings.model_dump(
        include={"samples", "probed", "num_probes", "radii", "seed", "batch_size"}
    )
    return measure(
        subject.model,
        images,
        eps=settings.eps or subject.eps,
        parts=settings.parts or PARTS,
        manifold=manifold,
        name=subject.name,
        data_name=subject.data_name,
        notes=subject.notes,
        progress=progress,
        **options,
    )


def _timm_model(name: str, data: str | None, settings: Settings) -> Subject:
    if data is None:
        raise ValueError(f"{name} is no folder of a run; a timm model needs --data digits|FILE.npz")
    if settings.eps is None:
        raise ValueError(f"{name}: a timm model needs eps=, the radius of the attack")
    source = _data(data, settings)
    splits = source.load()
    spec = {
        "name": name,
        "args": settings.args,
        "mean": settings.mean,
        "std": settings.std,
        "pretrained": settings.pretrained,
    }
    recipe = Recipe.model_validate(
        {
            "data": source,
            "model": spec,
            "optimizer": {"lr": 1},
            "epochs": 1,
            "evaluation": {"eps": settings.eps},
            "seed": settings.seed,
        }
    )
    try:
        network = build_model(recipe.model, splits, seed=recipe.seed)
    except OSError as error:  # the hub cannot be reached
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
    notes = []
    if settings.weights:
        _load_weights(network, settings.weights)
    elif not settings.pretrained:
        notes.append("the weights are random: neither pretrained=true nor weights=FILE was given")
    elif _pretrained_classes(network) != splits.num_classes:
        notes.append(f"the head is random: the weights are not for {splits.num_classes} classes")
    return Subject(name, network, _data_name(source, settings), splits, settings.eps, notes)


def _load_weights(network: nn.Module, file: str) -> None:
    """Load the weights of the timm model alone, or with its normalisation, as flatreg saves it."""
    try:
        weights = load_file(file)
        whole = any(key.startswith("model.") for key in weights)
        target = network if whole else network.get_submodule("model")
        target.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights={file}: {reason[:300]}") from error


def _pretrained_classes(network: nn.Module) -> int | None:
    config: dict[str, Any] = getattr(network.get_submodule("model"), "pretrained_cfg", None) or {}
    return config.get("num_classes")


def _data(data: str, settings: Settings) -> Data:
    return Digits(size=settings.size) if data == "digits" else Array(path=data)


def _data_name(source: Data, settings: Settings) -> str:
    return f"{source_name(vars(source))} ({settings.split})"
