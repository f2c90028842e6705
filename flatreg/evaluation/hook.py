"""The hook for a training loop: attacked accuracy every few epochs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from flatreg.attacks.options import Attack
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.results import Evaluation
from flatreg.threat import check_eps, check_norm


class AttackedAccuracy:
    """Hook for a training loop: attacked accuracy every few epochs; the training goes on unchanged.

    Args:
        data: as in `evaluate`: neither training images nor, where it decides anything, the test
            split.
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        every: epochs between evaluations; the last of each `every` is evaluated.
        samples: size of the fixed subset.
        attack: as in `evaluate`; the default takes two to three passes an image on a model that is
            not robust.
        seed: of the subset and the random starts.
        batch_size: samples at a time.

    Attributes:
        history: (epoch, result) of every evaluation so far.
        seconds: all of them took.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        eps: float,
        norm: str = "linf",
        every: int = 1,
        samples: int | None = 1000,
        attack: str | Attack | Sequence[Attack] = "fast",
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        check_eps(eps, check_norm(norm))
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.data, self.every = data, every
        self.settings: dict[str, Any] = dict(
            eps=eps, norm=norm, samples=samples, attack=attack, seed=seed, batch_size=batch_size
        )
        self.history: list[tuple[int, Evaluation]] = []
        self.seconds, self._since = 0.0, time.perf_counter()

    @property
    def share_of_time(self) -> float:
        """Share of the time since the hook was made that it has taken, in [0, 1]."""
        return self.seconds / max(self.seconds, time.perf_counter() - self._since)

    def __call__(self, model: nn.Module, epoch: int) -> Evaluation | None:
        """Evaluate `model` after `epoch` (counted from 0) if it is due."""
        if (epoch + 1) % self.every:
            return None
        result = evaluate(model, self.data, **self.settings, diagnose=False, progress=False)
        self.history.append((epoch, result))
        self.seconds += result.seconds
        return result
