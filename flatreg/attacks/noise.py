"""Random points of the ball: the weakest control, which no attack worth its name may lose to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.attacks.result import AttackResult, Watch


def noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    draws: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
    leave: bool = True,
) -> AttackResult:
    """Try `draws` independent points of `flatreg.threat.random_point`; needs no gradients.

    The points are those that `flatreg.attacks.pgd` of the same seed starts its restarts from.
    Arguments, result and errors as there.

    Raises:
        ValueError: also fewer than 1 draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    return pgd(
        model, inputs, labels, eps=eps, norm=norm, steps=0, random_start=True, restarts=draws,
        seed=seed, indices=indices, batch_size=batch_size, watch=watch, leave=leave,
    )  # fmt: skip
