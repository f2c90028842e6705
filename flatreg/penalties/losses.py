"""The loss that penalties on the input look at: cross-entropy, in float32 at least."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from flatreg.forward import Forward
from flatreg.precision import at_least_float32

_ALL = slice(None)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss per sample `(batch,)`."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def cross_entropy_at(clean: Forward, rows: Tensor | slice = _ALL) -> Callable[[Tensor], Tensor]:
    """Map other inputs of the labels in `rows` to their loss, by auxiliary passes."""
    return lambda inputs: cross_entropy(clean.logits_at(inputs), clean.labels[rows])
