"""Attacks on models whose forward is random: expectation over transformation, majority vote.

Athalye, Engstrom, Ilyas, Kwok, "Synthesizing Robust Adversarial Examples", ICML 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flatreg.attacks.result import Attack, AttackResult, Watch


class AverageLogits(nn.Module):
    """Mean of the logits over `draws` passes: what a random model says in expectation."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be >= 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `(batch, classes)`; each draw with random numbers of its own."""
        return torch.stack([self.model(inputs) for _ in range(self.draws)]).mean(0)


def eot(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    draws: int = 20,
    eps: float | Tensor,
    norm: str = "linf",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> AttackResult:
    """Run `attack` on the mean of the logits over `draws` passes of a random model.

    Other arguments, result and errors as in `flatreg.attacks.pgd`; every draw is counted. Random
    numbers of the model itself come from torch's generators: seed them for the same verdict.
    """
    result = attack(
        AverageLogits(model, draws), inputs, labels, eps=eps, norm=norm, seed=seed,
        indices=indices, batch_size=batch_size, watch=watch,
    )  # fmt: skip
    return replace(result, forwards=draws * result.forwards, backwards=draws * result.backwards)


def majority(logits: Tensor) -> Tensor:
    """Class most draws vote for, `(batch,)`, from logits `(draws, batch, classes)`.

    Of classes with equally many votes, the first.
    """
    votes: Tensor = nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    return votes.argmax(1)
