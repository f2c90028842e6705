"""What `flatreg.backward` may call: a bare closure, or the loss of a batch that it can cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from flatreg.terms.objective import ObjectiveLoss

Loss = TypeVar("Loss", "Tensor", "ObjectiveLoss")
Closure = Callable[[], Loss]


@runtime_checkable
class BatchLoss(Protocol[Loss]):
    """The loss of one batch: a closure that `backward` can also prepare and cut.

    `flatreg.Objective.bind` returns one. Any other callable that returns a scalar tensor is a bare
    closure: `backward` calls it once or twice, and needs to be told its model.
    """

    @property
    def model(self) -> nn.Module:
        """The model of the loss, as the user's loop prepared it."""

    def __call__(self) -> Loss:
        """Evaluate the loss at the weights as they are now."""

    def prepare(self) -> None:
        """Make what all evaluations share, as the attacked batch; a second call does nothing."""

    def split(self, count: int) -> Sequence[BatchLoss[Loss]]:
        """At most `count` parts of the batch, whose losses add up to this one."""

    def at_head(self, parameters: Sequence[Tensor]) -> tuple[Closure[Loss], Closure[Loss]] | None:
        """Two evaluations from one pass through the backbone, which this call makes.

        The first is at the weights as they are, the second at those that `parameters` have when it
        is called. None, and no pass, where `parameters` are not all of the head or the loss reads
        more than the head.
        """


def total(loss: Tensor | ObjectiveLoss) -> Tensor:
    """The tensor that `backward` differentiates, 0-d."""
    return loss if isinstance(loss, Tensor) else loss.total


def split(closure: Closure[Loss], count: int) -> Sequence[Closure[Loss]]:
    """Parts of the batch, at most `count`, whose losses add up.

    Raises:
        ValueError: a bare closure and more than one part.
    """
    if count == 1:
        return [closure]
    if not isinstance(closure, BatchLoss):
        raise ValueError(
            f"micro_batches={count} needs a closure that can be split: objective.bind(...)"
        )
    return closure.split(count)
