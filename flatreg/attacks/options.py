"""What every attack takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from flatreg.data.configuration import switch, whole

Callback = Callable[[Tensor, Tensor, Tensor, int], None]
"""Called after every query with the samples `(m,)` (positions in the batch), the step of each
`(m,)`, the points tried `(m, ...)`, and how many points are left to try at most. Of several
searches of one sample the first reaches a step before the others, or stands before them."""


class AttackOptions(TypedDict, total=False):
    """What every attack takes besides eps and its own settings.

    Attributes:
        norm: of the ball: "linf" (the default), "l2" or "l1".
        seed: of the random numbers; 0 by default.
        indices: identity of each sample (its dataset index), which keys its random stream; by
            default its position in the batch.
        batch_size: samples at a time, halved where memory runs out; by default all.
        callback: called after every query; see `Callback`.
        early_stop: drop a sample from the batch once it is fooled (the default); otherwise every
            search goes on to its last step.
    """

    norm: str
    seed: int
    indices: Sequence[int] | None
    batch_size: int | None
    callback: Callback | None
    early_stop: bool


def complete(options: AttackOptions, attack: str) -> AttackOptions:
    """Options with the defaults of those that are left out.

    Raises:
        TypeError: `attack` got an option that no attack has.
        ValueError: `early_stop` is neither True nor False, or the seed no whole number from 0.
    """
    defaults = AttackOptions(
        norm="linf", seed=0, indices=None, batch_size=None, callback=None, early_stop=True
    )
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(
            f"{attack} has no setting {unknown[0]!r}; besides its own it takes eps, "
            f"{', '.join(defaults)}"
        )
    completed: AttackOptions = {**defaults, **options}
    switch("early_stop", completed["early_stop"])
    completed["seed"] = whole("seed", completed["seed"], 0)
    return completed


def identities(indices: Iterable[int] | None, size: int) -> list[int]:
    """Identity of each of `size` samples; by default its position in the batch.

    Raises:
        ValueError: `indices` has not one for each.
    """
    found = list(range(size)) if indices is None else [int(index) for index in indices]
    if len(found) != size:
        raise ValueError(f"indices: expected one for each of {size} samples, got {len(found)}")
    return found


def for_rows(options: AttackOptions, rows: Tensor) -> AttackOptions:
    """Options of an attack on the samples `rows` of a batch in place of all of them.

    Their identities are those in the batch, and the callback is told positions in the batch.
    """
    indices, callback = options.get("indices"), options.get("callback")
    chosen = rows.tolist()
    found: AttackOptions = {
        **options,
        "indices": chosen if indices is None else [indices[row] for row in chosen],
    }
    if callback is not None:
        found["callback"] = lambda row, *query: callback(rows.to(row.device)[row], *query)
    return found


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
        **options: Unpack[AttackOptions],
    ) -> AttackResult:
        """Search within eps of `inputs` for images that `model` does not give their label."""
