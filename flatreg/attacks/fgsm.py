r"""Fast gradient sign method: one step to the end of the ball.

Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.pgd import pgd
from flatreg.attacks.result import AttackResult, Watch


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    loss: LossName = "margin",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
    leave: bool = True,
) -> AttackResult:
    """Take one step of length eps along the steepest direction; a weak control.

    Arguments, result and errors as in `flatreg.attacks.pgd`.
    """
    return pgd(
        model, inputs, labels, eps=eps, norm=norm, steps=1, step_size=1.0, loss=loss, seed=seed,
        indices=indices, batch_size=batch_size, watch=watch, leave=leave,
    )  # fmt: skip
