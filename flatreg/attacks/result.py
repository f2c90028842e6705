"""What every attack takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LOSSES, LossName
from flatreg.threat import check_eps, check_linf, check_unit_range, per_sample


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Outcome of an attack, sample by sample.

    Attributes:
        inputs: `(batch, ...)`: where fooled, the adversarial image; elsewhere the last one tried.
        fooled_by: `(batch,)`: index of the stage that fooled the sample (0 for a single attack),
            -1 where none did.
        forwards: samples passed forward, counted.
        backwards: samples passed backward, counted.
    """

    inputs: Tensor
    fooled_by: Tensor
    forwards: int
    backwards: int

    @property
    def fooled(self) -> Tensor:
        """`(batch,)` booleans."""
        return self.fooled_by >= 0


class Attack(Protocol):
    """An attack: `pgd`, `apgd`, `cascade`, a `functools.partial` of one, or a function of yours."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        eps: float | Tensor,
        norm: str = ...,
        seed: int = ...,
        indices: Sequence[int] | None = ...,
    ) -> AttackResult:
        """Look within eps of `inputs` for images that `model` does not give their label."""


def check_threat(inputs: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Check the threat model of an attack; eps per sample, shaped to broadcast over inputs."""
    check_eps(eps)
    check_linf(norm)
    check_unit_range(inputs)
    return per_sample(eps, inputs)


def climb(
    model: nn.Module, x: Tensor, labels: Tensor, loss: LossName
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample, its gradient in the input, fooled; touches no parameter's `.grad`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        values = LOSSES[loss](logits, labels)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient, logits.detach().argmax(1) != labels


State = TypeVar("State")


def keep_rows(state: State, mask: Tensor) -> State:
    """Keep the samples of a dataclass of per-sample tensors where `mask` is true."""
    names = (field.name for field in fields(state))  # type: ignore[arg-type]
    return type(state)(**{name: getattr(state, name)[mask] for name in names})
