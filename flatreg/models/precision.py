"""Labels, as class indices or probabilities, and the precision in which losses are taken.

Quantities that cancel are taken in float32 at least, whatever autocast hands out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_indices(labels: Tensor, reader: str) -> Tensor:
    """Labels of a reader that needs a class, as integers; probabilities are refused in its name.

    Raises:
        ValueError: the labels are not `(batch,)`.
    """
    if labels.ndim != 1:
        raise ValueError(
            f"{reader}: expected labels as class indices (batch,), "
            f"got probabilities of shape {tuple(labels.shape)}"
        )
    return labels.long()


def as_targets(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as `F.cross_entropy` wants them: class indices, or probabilities as the logits are.

    Probabilities, any floating labels, get the dtype of the logits, float32 at least.

    Raises:
        ValueError: there is not one probability for each logit.
    """
    if not labels.is_floating_point():
        return labels
    if labels.shape != logits.shape:
        raise ValueError(
            f"expected labels as probabilities of shape {tuple(logits.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    return labels.to(torch.promote_types(logits.dtype, torch.float32))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision, as autocast hands it out, up to float32; keep float32 and float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample `(batch,)`, in float32 at least.

    Raises:
        ValueError: as `as_targets`.
    """
    targets = as_targets(labels, logits)
    return F.cross_entropy(at_least_float32(logits), targets, reduction="none")
