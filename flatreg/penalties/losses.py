"""The loss that penalties on the input look at, at other inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flatreg.forward import Forward
from flatreg.precision import cross_entropy

_ALL = slice(None)


def cross_entropy_at(clean: Forward, rows: Tensor | slice = _ALL) -> Callable[[Tensor], Tensor]:
    """Map other inputs of the labels in `rows` to their loss, by auxiliary passes."""
    return lambda inputs: cross_entropy(clean.logits_at(inputs), clean.labels[rows])
