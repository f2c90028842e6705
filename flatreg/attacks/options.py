"""What every attack takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

Callback = Callable[[Tensor, Tensor, Tensor, int], None]
"""Told after every look of an attack: samples `(m,)` (positions in the batch), their step `(m,)`,
where they looked `(m, ...)`, and how many looks are left at most. Of the jobs of a sample the first
comes to a step before the others, or stands before them in the batch."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Outcome of an attack, sample by sample.

    Attributes:
        inputs: `(batch, ...)`: where fooled, the adversarial image; elsewhere the last one tried
            within the ball.
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
    """An attack: one of ours, a `functools.partial` of it, or a function of yours.

    A function of yours takes `**options` for what it does not use.
    """

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
        batch_size: int | None = ...,
        callback: Callback | None = ...,
    ) -> AttackResult:
        """Look within eps of `inputs` for images that `model` does not give their label."""
