"""Normalisation inside the model, so that inputs are [0,1] everywhere and eps is in pixel units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Map images in [0,1] to (x - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                f"mean and std must have one entry per channel and std > 0, got {mean} and {std}"
            )
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise `inputs` `(batch, channels, height, width)`."""
        return (inputs - self.mean) / self.std


def with_normalization(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Sequential:
    """Put the normalisation in front of `model`; the result takes images in [0,1].

    Args:
        model: a classifier of normalised images.
        mean: per channel; left out, what timm recorded with the model's weights.
        std: per channel; left out together with `mean`.

    Raises:
        ValueError: no mean and std are given and the model carries none.
    """
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is None or std is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        if "mean" not in config or "std" not in config:
            raise ValueError(
                f"{type(model).__name__} carries no pretrained_cfg with mean and std: give both"
            )
        mean, std = config["mean"], config["std"]
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))
