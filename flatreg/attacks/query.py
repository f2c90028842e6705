"""The model under attack: every pass goes through here, is counted, and fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LOSSES, LossName
from flatreg.models.precision import as_targets

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class QueryResult:
    """What the model says at some points.

    Attributes:
        value: the loss that is climbed `(batch,)`.
        gradient: of it in the inputs `(batch, ...)`; zero where none was asked for.
        wrong: another class than the label is largest `(batch,)`.
    """

    value: Tensor
    gradient: Tensor
    wrong: Tensor


class Surrogate(nn.Module):
    """A model that is searched in place of another: that one decides who is fooled."""

    def confirm(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Which images fool the other `(batch,)`; for the rest the search goes on."""
        raise NotImplementedError


class QueriedModel:
    """Passes of a model, counted.

    Args:
        model: images in [0,1] to logits.
        batch_size: samples at a time; halved, and the pass repeated, where memory runs out.

    Attributes:
        forwards: samples passed forward.
        backwards: samples passed backward.
    """

    def __init__(self, model: nn.Module, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.forwards = self.backwards = 0

    def look(
        self,
        x: Tensor,
        labels: Tensor,
        loss: LossName,
        *,
        targets: Tensor | None = None,
        gradient: bool = True,
    ) -> QueryResult:
        """Loss per sample, its gradient in the input, wrong; touches no parameter's `.grad`.

        Raises:
            ValueError: the model returns no tensor, or the logits do not depend on the inputs in a
                way autograd can follow; an autocast to float16 is on.
        """
        parts = self.in_parts(
            len(x),
            lambda rows: loss_and_gradient(
                self.model,
                x[rows],
                labels[rows],
                loss,
                None if targets is None else targets[rows],
                gradient,
            ),
        )
        self.forwards += len(x)
        self.backwards += len(x) if gradient else 0
        return QueryResult(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`, without a graph."""
        with torch.no_grad():
            parts = list(self.in_parts(len(x), lambda rows: _logits(self.model, x[rows])))
        self.forwards += len(x)
        return torch.cat(parts)

    def confirms(self, x: Tensor, labels: Tensor) -> Tensor:
        """Which points, each wrong at a look, fool the model whose verdict counts `(batch,)`."""
        model = self.model
        if not isinstance(model, Surrogate) or not len(x):
            return torch.ones_like(labels, dtype=torch.bool)
        with torch.no_grad():
            parts = list(self.in_parts(len(x), lambda rows: model.confirm(x[rows], labels[rows])))
        self.forwards += len(x)
        return torch.cat(parts)

    def in_parts(self, n: int, run: Callable[[slice], T]) -> Iterator[T]:
        """Run over slices of the batch, halving them for good where memory runs out."""
        start = 0
        while start < n:
            size = min(n - start, self.batch_size or n)
            try:
                part = run(slice(start, start + size))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.batch_size = (size + 1) // 2
                continue
            start += size
            yield part


def loss_and_gradient(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    loss: LossName,
    targets: Tensor | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample, its gradient in the input, wrong; touches no parameter's `.grad`.

    Plain cross-entropy takes probabilities `(batch, classes)` as labels too.

    Raises:
        ValueError: as in `QueriedModel.look`; the labels are probabilities of other classes.
    """
    x = x.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits = _logits(model, x)
        values = LOSSES[loss](logits, as_targets(labels, logits), targets)
        slope = _slope(values, x) if gradient else torch.zeros_like(x)
    return values.detach(), slope, _wrong(logits.detach(), labels)


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is of another class than the label, or its likeliest."""
    said = logits.argmax(1)
    if labels.is_floating_point():
        return labels.gather(1, said[:, None])[:, 0] < labels.amax(1)
    return (said != labels) | logits.isnan().any(1)


def _slope(values: Tensor, x: Tensor) -> Tensor:
    slope: Tensor | None = None
    if values.requires_grad:
        (slope,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    if slope is None:
        raise ValueError(
            "the logits have no gradient in the inputs (a detach, no_grad or numpy on the way?): "
            "give the attacks a differentiable model, or a cascade of square alone"
        )
    return slope


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        raise ValueError(
            "an attack under float16 autocast finds gradients of zero: search in bfloat16 or "
            "float32"
        )
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"expected logits (batch, classes), the model returns a {type(logits).__name__}"
        )
    if logits.dtype == torch.float16:
        raise ValueError(
            "an attack on float16 logits finds gradients of zero: search in bfloat16 or float32"
        )
    return logits.float() if logits.dtype == torch.bfloat16 else logits
