"""The inner attack of adversarial training: the mode of the model, the start, the steps."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd_iterates
from flatreg.isolation import evaluation_mode, frozen_statistics

InnerMode = Literal["train", "eval"]


def inner_pass(model: nn.Module, mode: InnerMode) -> AbstractContextManager[None]:
    """Run an inner attack within this; it moves no buffer of a normalisation.

    - `"train"`: the model stays in the mode it is in: dropout and batch statistics, as the step
      itself has them.
    - `"eval"`: no dropout, running statistics; every module has its own mode back afterwards.
    """
    return evaluation_mode(model) if mode == "eval" else frozen_statistics(model)


def uniform_start(inputs: Tensor, eps: float) -> Tensor:
    """Uniform in the Linf ball, cut with the box."""
    return (inputs + eps * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)


def gaussian_start(inputs: Tensor) -> Tensor:
    """0.001 standard normal off the inputs: enough to leave the point where the KL is flat."""
    return inputs + 0.001 * torch.randn_like(inputs)


def last_iterate(
    model: nn.Module, inputs: Tensor, labels: Tensor, start: Tensor, *, eps: float, steps: int,
    step_size: float,
) -> Tensor:  # fmt: skip
    """Where `steps` >= 1 of Linf PGD on the cross-entropy end; `step_size` in units of eps."""
    iterates = pgd_iterates(
        model, inputs, labels, eps=eps, steps=steps, step_size=step_size, start=start,
        loss="cross_entropy",
    )  # fmt: skip
    (attacked,) = deque(iterates, maxlen=1)  # a batch of images, not steps + 1 of them
    return attacked
