"""What reaches the last layer and what comes out, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.forward import run_forward
from flatreg.models.heads import find_head

_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class AtHead:
    """Passes of some samples through one model, float64 on the CPU.

    Attributes:
        features: input of the head `(n, features)`.
        logits: `(n, classes)`.
        labels: `(n,)`.
        weight: of the head `(classes, features)`.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    weight: Tensor

    @property
    def right(self) -> Tensor:
        """`(n,)` booleans."""
        return self.logits.argmax(1) == self.labels

    @property
    def doubt(self) -> Tensor:
        """1 - confidence `(n,)`, as the sum of the other probabilities: it keeps its digits."""
        p = self.logits.softmax(1)
        return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)

    def kappa(self, scale: float = 1.0) -> Tensor:
        """Relative flatness `(n,)`, head and logits scaled; larger means sharper."""
        return relative_flatness(self.features, scale * self.logits, scale * self.weight)

    def rows(self, chosen: Tensor) -> AtHead:
        """Some of the samples."""
        return AtHead(self.features[chosen], self.logits[chosen], self.labels[chosen], self.weight)


@torch.no_grad()
def pass_to_head(model: nn.Module, inputs: Tensor, labels: Tensor) -> AtHead:
    """Pass samples through `model`, in the mode it is in.

    Args:
        model: images in [0,1] to logits.
        inputs: `(n, ...)` in [0,1].
        labels: `(n,)`.

    Raises:
        ValueError: the model has no linear head.
    """
    head = find_head(model, inputs[:2])
    parts = [
        run_forward(model, x, y, head)
        for x, y in zip(torch.split(inputs, _AT_ONCE), torch.split(labels, _AT_ONCE), strict=True)
    ]
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("features", "logits")]
    features, logits, weight = (t.detach().cpu().double() for t in (*columns, head.weight))
    return AtHead(features, logits, labels.cpu(), weight)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in the mode the model is in."""
    return copy.deepcopy(model).cpu().double()
