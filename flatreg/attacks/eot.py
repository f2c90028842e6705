"""Attacks on models whose forward is random: expectation over transformation, majority vote.

Athalye, Engstrom, Ilyas, Kwok, "Synthesizing Robust Adversarial Examples", ICML 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatreg.attacks.options import Attack, AttackResult, Callback
from flatreg.attacks.query import QueriedModel, Surrogate

_SURE = 0.75  # of fresh draws that are wrong: with half of them a verdict is the toss of a coin


class AverageLogits(Surrogate):
    """Mean of the logits over `draws` passes: what a random model says in expectation."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be >= 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `(batch, classes)`; each draw with random numbers of its own."""
        return self.each(inputs).mean(0)

    def confirm(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Whether three of four fresh draws are wrong too."""
        return (self.each(inputs).argmax(2) != labels).float().mean(0) >= _SURE

    def each(self, inputs: Tensor) -> Tensor:
        """Logits of every draw `(draws, batch, classes)`."""
        return torch.stack([self.model(inputs) for _ in range(self.draws)])


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
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Run `attack` on the mean of the logits over `draws` passes of a random model.

    A look that is wrong in the mean fools a sample only if three quarters of `draws` fresh passes
    are wrong too: else the search goes deeper, as a lucky look is soon met and does not hold. At
    the end `draws` more passes vote on the last point of those that are left.

    Other arguments, result and errors as in `flatreg.attacks.pgd`; every draw is counted. Random
    numbers of the model itself come from torch's generators: seed them for the same verdict.
    """

    def told(row: Tensor, step: Tensor, x: Tensor, left: int) -> None:
        if callback is not None:
            callback(row, step, x, draws * left)

    mean = AverageLogits(model, draws)
    result = attack(
        mean,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        seed=seed,
        indices=indices,
        batch_size=batch_size,
        callback=told if callback else None,
        **({} if early_stop else {"early_stop": False}),
    )
    rows, victim = (~result.fooled).nonzero().flatten(), QueriedModel(mean, batch_size)
    fooled_by = result.fooled_by.clone()
    if len(rows):
        with torch.no_grad():
            images = result.inputs[rows]
            votes = victim.in_parts(len(rows), lambda part: majority(mean.each(images[part])))
            fooled_by[rows[torch.cat(list(votes)) != labels[rows]]] = 0
    return AttackResult(
        result.inputs, fooled_by, draws * (result.forwards + len(rows)), draws * result.backwards
    )


def majority(logits: Tensor) -> Tensor:
    """Class most draws vote for, `(batch,)`, from logits `(draws, batch, classes)`.

    Of classes with equally many votes, the first.
    """
    votes: Tensor = nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    return votes.argmax(1)
