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
