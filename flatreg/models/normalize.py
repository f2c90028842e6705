"""Normalisation inside the model, so that inputs are [0,1] everywhere and eps is in pixel units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Numbers = Sequence[float] | np.ndarray[Any, Any] | Tensor
"""One number a channel, or one for all."""
_GREY = 2.0  # no mean of images in [0, 1] is larger


class Normalize(nn.Module):
    """Map images in [0,1] to (x - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        # In torch's precision: numpy's would make the images float64, and the model is not.
        means, stds = (
            torch.as_tensor(
                values.detach() if isinstance(values, Tensor) else np.array(values),
                dtype=torch.get_default_dtype(),
                device="cpu",
            ).clone()
            for values in (mean, std)
        )
        finite = bool(means.isfinite().all() and stds.isfinite().all())
        if means.shape != stds.shape or means.ndim != 1 or not finite or not bool((stds > 0).all()):
            raise ValueError(
                "mean and std must have one entry per channel and std > 0, got "
                f"{means.tolist()} and {stds.tolist()}"
            )
        if bool((means > _GREY).any()):
            raise ValueError(f"mean and std are of images in [0, 1], got {mean}: divide by 255")
        self.register_buffer("mean", means.reshape(-1, 1, 1))
        self.register_buffer("std", stds.reshape(-1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise `inputs` `(batch, channels, height, width)`.

        Raises:
            ValueError: mean and std are for another number of channels: grey images would get them.
        """
        entries, shape = len(self.mean), inputs.shape
        if len(shape) < 3 or entries not in (1, shape[-3]):
            got = shape[-3] if len(shape) > 2 else f"the shape {tuple(shape)}"
            raise ValueError(f"expected images of {entries} channels, as mean and std, got {got}")
        return (inputs - self.mean) / self.std


class NormalizedModel(nn.Sequential):
    """A normalisation, `normalize`, and behind it `model`.

    What timm's optimizer factory asks of a model is answered for the one inside: without that,
    `create_optimizer_v2` gives this one no layer decay and exempts no parameter from weight decay.
    """

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model inside exempts from weight decay."""
        inner = self.get_submodule("model")
        exempt: Iterable[str] = getattr(inner, "no_weight_decay", set)()
        return {f"model.{name}" for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Map from the name of a parameter to the number of its layer, as timm counts them."""
        from timm.models import group_parameters
        from timm.optim import auto_group_layers

        inner = self.get_submodule("model")
        matcher: Any = getattr(inner, "group_matcher", None)
        if matcher:
            layers = group_parameters(inner, matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(inner)
        return lambda name: int(layers[name.removeprefix("model.")])


def with_normalization(
    model: nn.Module, mean: Numbers | None = None, std: Numbers | None = None
) -> NormalizedModel:
    """Put the normalisation in front of `model`; the result takes images in [0,1].

    Args:
        model: a classifier of normalised images.
        mean: per channel, or one for all; left out, what timm recorded with the model's weights.
        std: per channel; left out together with `mean`.

    Raises:
        TypeError: the model is no module.
        ValueError: no mean and std are given and the model carries none, or those of another number
            of channels; a std that is not positive; both are of images from 0 to 255; the model
            normalises already, or lies in DDP, which goes around the result.
    """
    if not isinstance(model, nn.Module):
        kind, example = type(model).__name__, "timm.create_model('resnet18')"
        raise TypeError(f"expected a model, as {example}, got a {kind}")
    if isinstance(model, NormalizedModel):
        raise ValueError(
            "expected a model of normalised images, got one that normalises its images itself, as "
            "with_normalization and load_model return it: use it as it is"
        )
    if isinstance(model, DistributedDataParallel):
        advice = "give it the module, and DDP its result"
        raise ValueError(f"with_normalization goes inside DDP: {advice}")
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is None or std is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        if "mean" not in config or "std" not in config:
            raise ValueError(
                f"{type(model).__name__} carries no pretrained_cfg with mean and std: give both"
            )
        mean, std, recorded = config["mean"], config["std"], len(config["mean"])
        takes = getattr(_submodule(model, config.get("first_conv")), "in_channels", recorded)
        if takes != recorded:
            raise ValueError(
                f"{type(model).__name__} takes {takes} channels, its recorded mean and std have "
                f"{recorded}: give both"
            )
    return NormalizedModel(OrderedDict(normalize=Normalize(mean, std), model=model))


def _submodule(model: nn.Module, path: object) -> nn.Module | None:
    """The module at a path that timm records; None where it names none, or several."""
    try:
        return model.get_submodule(path) if isinstance(path, str) else None
    except AttributeError:
        return None
