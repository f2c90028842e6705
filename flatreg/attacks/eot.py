"""Attacks on models whose forward is random: expectation over transformation, majority vote.

Athalye, Engstrom, Ilyas, Kwok, "Synthesizing Robust Adversarial Examples", ICML 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.options import Attack, AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueriedModel, Surrogate
from flatreg.data.configuration import whole
from flatreg.models.entrance import logits_of
from flatreg.models.precision import class_indices

_SURE = 0.75  # part of fresh draws that must be wrong: at half a verdict is the toss of a coin


class AverageLogits(Surrogate):
    """Mean of the logits over `draws` passes: the expected logits of a random model.

    Raises:
        ValueError: there are fewer than 1 draws.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, whole("draws", draws, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `(batch, classes)`; each draw with random numbers of its own."""
        return self.each(inputs).mean(0)

    def verify(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Whether three of four fresh draws are wrong too, `(batch,)`."""
        return (self.each(inputs).argmax(2) != labels).float().mean(0) >= _SURE

    def each(self, inputs: Tensor) -> Tensor:
        """Logits of every draw `(draws, batch, classes)`."""
        return torch.stack([logits_of(self.model, inputs) for _ in range(self.draws)])


def eot(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    draws: int = 20,
    eps: float | Tensor,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Run `attack` on the mean of the logits over `draws` passes of a random model.

    A query that is wrong in the mean fools a sample only if three quarters of `draws` fresh passes
    are wrong too; otherwise the search goes on. At the end `draws` more passes vote on the last
    point of each sample that was not fooled.

    Other arguments, result and errors as in `flatreg.attacks.pgd`; every draw is counted. Random
    numbers of the model itself come from torch's generators: seed them for the same verdict.
    """
    mean, common = AverageLogits(model, draws), complete(options, "eot")
    labels = class_indices(labels, "an attack", len(inputs))
    callback = common["callback"]
    if callback is not None:
        common["callback"] = lambda row, step, x, left: callback(row, step, x, draws * left)
    if common["early_stop"]:  # the default, which a function of yours need not know
        del common["early_stop"]
    result = attack(mean, inputs, labels, eps=eps, **common)
    fooled_by, rows = result.fooled_by.clone(), (~result.fooled).nonzero().flatten()
    if len(rows):
        images, queried = result.inputs[rows], QueriedModel(mean, common["batch_size"])
        with torch.no_grad():
            votes = queried.in_parts(len(rows), lambda part: majority(mean.each(images[part])))
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
