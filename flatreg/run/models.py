"""Models as recipes name them: created by timm, and loaded from what a run has kept of them."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

import flatreg.models.cifar  # noqa: F401  # registers its networks with timm
from flatreg.data.files import write_whole
from flatreg.data.images import Splits
from flatreg.models.normalize import with_normalization
from flatreg.models.pretrained import pretrained_weights
from flatreg.run.checkpoints import load_checkpoint
from flatreg.run.recipe import Model

_SPEC = "model.json"


class _Built(BaseModel):
    """Content of `model.json`: what `timm.create_model` was given, beside the weights it made."""

    model_config = ConfigDict(extra="forbid")

    model: Model
    num_classes: int
    channels: int


def create(spec: Model, num_classes: int, channels: int, *, pretrained: bool) -> nn.Module:
    """Create a timm model, with the normalisation inside.

    Raises:
        ValueError: timm has no such model, it refuses the arguments, or the weights cannot be had.
    """
    overlay = {"pretrained_cfg_overlay": pretrained_weights(spec.name)} if pretrained else {}
    try:
        model = timm.create_model(
            spec.name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=channels,
            **overlay,
            **spec.args,
        )
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"model {spec.name}: {' '.join(str(error).split())}") from error
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # loaded: a second copy is no use
    return with_normalization(model, spec.mean, spec.std)


def save_spec(spec: Model, splits: Splits, folder: Path) -> None:
    """Write what `load_model` builds the model from, beside the checkpoints in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    built = _Built(model=spec, num_classes=splits.num_classes, channels=splits.channels)
    write_whole(folder / _SPEC, built.model_dump_json(indent=1))


def load_model(folder: str | Path) -> nn.Module:
    """Model that a run has trained, in eval mode on the CPU: images in [0,1] to logits.

    Its weights are those the report judges; neither the data nor pretrained weights are needed.

    Args:
        folder: of an arm's checkpoints, `RUN/checkpoints/ARM`.

    Raises:
        ValueError: there is no complete checkpoint, or it is of another model.
    """
    folder = Path(folder)
    try:
        built = _Built.model_validate_json((folder / _SPEC).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{folder}: expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no "
            f"{_SPEC} in it"
        ) from error
    except ValidationError as error:
        raise ValueError(
            f"{folder / _SPEC}: expected what a run writes, got another file"
        ) from error
    with torch.random.fork_rng(devices=[]):  # weights drawn only to be replaced
        model = create(built.model, built.num_classes, built.channels, pretrained=False)
    try:
        found = load_checkpoint(folder, model)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
    if not found:
        raise ValueError(f"{folder}: found no complete checkpoint")
    return model.eval()
