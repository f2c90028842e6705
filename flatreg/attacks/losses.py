"""Losses that attacks maximise: `(logits, labels, targets) -> (batch,)`, higher nearer to fooled.

With `targets` they measure how close the target class is to overtaking the label, without it the
runner-up. All but plain cross-entropy do not depend on the scale of the logits, or are proportional
to it: a factor of a power of two changes no bit of the direction of their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flatreg.measures.linearised_margin import margin
from flatreg.models.precision import IGNORE_NOTHING

LossName = Literal["margin", "dlr", "rescaled_cross_entropy", "cross_entropy"]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def negative_margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """max_{s != y} z_s - z_y, or z_t - z_y: positive when fooled; never saturates."""
    return -margin(logits, labels, targets)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    r"""Difference-of-logits ratio, with :math:`z_{\pi_k}` the k-th largest logit.

    .. math:: -\frac{z_y - \max_{s \ne y} z_s}{z_{\pi_1} - z_{\pi_3}}, \qquad
              -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, equations 6 and 7.
    With fewer than three (targeted: four) classes it is not defined: the margin is given instead.
    """
    ranked = logits.sort(1, descending=True).values
    if logits.shape[1] < (3 if targets is None else 4):
        return negative_margin(logits, labels, targets)
    lower = ranked[:, 2] if targets is None else (ranked[:, 2] + ranked[:, 3]) / 2
    spread = ranked[:, 0] - lower
    return negative_margin(logits, labels, targets) / torch.where(spread > 0, spread, 1)


def rescaled_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the logits divided by their (detached) standard deviation over the classes.

    With targets, of the target class, negated. Two logits divided by it are constant but for their
    order, and so have no gradient: the margin is given instead.
    """
    if logits.shape[1] < 3:
        return negative_margin(logits, labels, targets)
    spread = logits.detach().std(1, keepdim=True)
    return cross_entropy(logits / torch.where(spread > 0, spread, 1), labels, targets)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Plain cross-entropy; it misleads an evaluation where p is one-hot and its gradient zero."""
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_NOTHING)
    return -F.cross_entropy(logits, targets, reduction="none")


LOSSES: dict[LossName, Loss] = {
    "margin": negative_margin,
    "dlr": dlr,
    "rescaled_cross_entropy": rescaled_cross_entropy,
    "cross_entropy": cross_entropy,
}
