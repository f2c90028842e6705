"""What reached the head of a model and what came out: all that relative flatness reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.entrance import as_labels, check_finite
from flatreg.models.forward import Forward, run_forward
from flatreg.models.heads import Head, find_head


@dataclass(frozen=True, eq=False)
class AtHead:
    """Samples of one model at its last linear map.

    Attributes:
        features: input of the head `(n, features)`.
        logits: its output `(n, classes)`.
        labels: class indices `(n,)`.
        weight: of the head `(classes, features)`.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    weight: Tensor

    @classmethod
    def of(cls, forward: Forward) -> AtHead:
        """What a pass has of it.

        Raises:
            ValueError: the pass captured no features.
        """
        return cls(forward.features, forward.logits, forward.labels, forward.weight)

    @property
    def right(self) -> Tensor:
        """Whether each sample is classified right: booleans `(n,)`."""
        return self.logits.argmax(1) == self.labels

    @property
    def uncertainty(self) -> Tensor:
        """1 - confidence `(n,)` in float64; as the sum of the other probabilities, to be exact."""
        p = F.softmax(self.logits.double(), 1)
        return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)

    def kappa(self, scale: float = 1.0) -> Tensor:
        """Relative flatness `(n,)`, head and logits times `scale`; larger means sharper."""
        return relative_flatness(self.features, scale * self.logits, scale * self.weight)

    def scaled(self, scale: float) -> AtHead:
        """The same samples at a head whose weight and bias are multiplied by `scale`."""
        return AtHead(self.features, scale * self.logits, self.labels, scale * self.weight)

    def rows(self, chosen: Tensor) -> AtHead:
        """Some of the samples, by a mask or by positions."""
        return AtHead(self.features[chosen], self.logits[chosen], self.labels[chosen], self.weight)


@torch.no_grad()
def pass_to_head(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    head: Head | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> AtHead:
    """Pass samples through `model`, in the mode it is in, and keep what its head saw, on the CPU.

    Args:
        model: images to logits.
        inputs: `(n, ...)`, one sample at least.
        labels: class indices `(n,)`.
        head: of the model; left out, it is searched for.
        batch_size: samples at a time.
        dtype: to which the results are cast; left out, they keep their own.

    Raises:
        ValueError: the model has no linear head, or returns nan; a label is no class of it.
    """
    head = head or find_head(model, inputs[:2])
    pairs = zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True)
    parts = [run_forward(model, x, y, head) for x, y in pairs]
    for part in parts:
        check_finite(part.logits, model)
    classes = parts[0].logits.shape[1]
    labels = as_labels(labels, len(inputs), classes, probabilities=False)
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("features", "logits")]
    features, logits, weight = (t.detach().cpu().to(dtype) for t in (*columns, head.weight))
    return AtHead(features, logits, labels.cpu(), weight)
