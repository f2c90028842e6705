"""Where half precision ends: quantities that cancel are taken in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatreg.labels import as_targets


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
