"""What attacks climb: losses `(logits, labels) -> (batch,)`, higher when closer to fooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flatreg.measures.linearised_margin import margin

LossName = Literal["margin", "rescaled_cross_entropy", "cross_entropy"]


def negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{s != y} z_s - z_y: positive when fooled; no confidence makes its gradient vanish."""
    return -margin(logits, labels)


def rescaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits divided by their (detached) standard deviation over the classes.

    Blind to the scale of the logits: a power of two changes no bit of it.
    """
    spread = logits.detach().std(1, keepdim=True)
    scaled = logits / torch.where(spread > 0, spread, 1)
    return F.cross_entropy(scaled, labels, reduction="none")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy; it fools an evaluation where p is one-hot and its gradient zero."""
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": negative_margin,
    "rescaled_cross_entropy": rescaled_cross_entropy,
    "cross_entropy": cross_entropy,
}
