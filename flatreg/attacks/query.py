"""The model under attack: every pass goes through here, is counted, and fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LOSSES, Loss, LossName
from flatreg.data.configuration import whole
from flatreg.models.entrance import (
    as_logits,
    check_finite,
    check_no_probabilities,
    outside_inference,
    pass_copy,
)
from flatreg.models.precision import as_targets

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class QueryResult:
    """Answer of the model under attack at one point a row.

    Attributes:
        value: loss that is maximised `(batch,)`.
        gradient: of the loss in the inputs `(batch, ...)`; zero where none was asked for.
        wrong: another class than the label has the largest logit `(batch,)`.
    """

    value: Tensor
    gradient: Tensor
    wrong: Tensor


class Surrogate(nn.Module):
    """A model that is attacked in place of another, which decides who is fooled.

    Its forward gives the logits that are searched: cheaper, or less noisy, than the other's.
    """

    def verify(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Whether each image `(batch, ...)` fools the other model too, `(batch,)` booleans."""
        raise NotImplementedError


class QueriedModel:
    """The model under attack. It checks and counts its passes and splits batches that do not fit.

    Args:
        model: images in [0,1] to logits.
        batch_size: samples at a time; halved, and the pass repeated, where memory runs out.

    Attributes:
        forwards: samples passed forward so far.
        backwards: samples passed backward so far.

    Raises:
        ValueError: batch_size is no whole number from 1. A pass: as `loss_and_gradient`; logits or
            gradients that are not finite; probabilities for logits, in the first pass.
    """

    def __init__(self, model: nn.Module, batch_size: int | None = None) -> None:
        self.model = model
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        self.forwards = self.backwards = 0

    def query(
        self,
        x: Tensor,
        labels: Tensor,
        loss: LossName,
        *,
        targets: Tensor | None = None,
        gradient: bool = True,
    ) -> QueryResult:
        """Loss, its gradient and the verdict at points `(batch, ...)`: see `loss_and_gradient`."""

        def part(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            aim = None if targets is None else targets[rows]
            first = self.forwards == 0
            return loss_and_gradient(self.model, x[rows], labels[rows], loss, aim, gradient, first)

        parts = list(self.in_parts(len(x), part))
        self.forwards += len(x)
        self.backwards += len(x) if gradient else 0
        result = QueryResult(*(torch.cat(column) for column in zip(*parts, strict=True)))
        # The host waits here once, after both passes, and not between them.
        steep = result.gradient.flatten(1).isfinite().all(1)
        if not bool((result.value.isfinite() & steep).all()):
            check_finite(result.value[:, None], self.model)
            raise ValueError(
                f"the {loss} has no finite gradient in the inputs for {int((~steep).sum())} of "
                f"{len(x)} images: look for a root or norm at zero in the model, or give a cascade "
                "of square alone"
            )
        return result

    def logits(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`, without a graph."""
        with torch.no_grad():
            parts = list(self.in_parts(len(x), lambda rows: _logits(self.model, x[rows])))
        logits = torch.cat(parts)
        check_finite(logits, self.model)
        if self.forwards == 0:
            check_no_probabilities(logits)
        self.forwards += len(x)
        return logits

    def verified(self, x: Tensor, labels: Tensor) -> Tensor:
        """Which points, all of them wrong when queried, count as fooled `(batch,)`.

        All do, unless the model is a `Surrogate`: then those that its `verify` accepts.
        """
        model = self.model
        if not isinstance(model, Surrogate) or not len(x):
            return torch.ones_like(labels, dtype=torch.bool)
        with torch.no_grad():
            parts = list(self.in_parts(len(x), lambda rows: model.verify(x[rows], labels[rows])))
        self.forwards += len(x)
        return torch.cat(parts)

    def in_parts(self, n: int, run: Callable[[slice], T]) -> Iterator[T]:
        """Run over slices of `n` rows. Where memory runs out, slices are halved from then on."""
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
    loss: LossName | Loss,
    targets: Tensor | None = None,
    gradient: bool = True,
    first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `(batch,)`, its gradient in the inputs `(batch, ...)`, and who is wrong `(batch,)`.

    The gradient is zero where `gradient` is false. No `.grad` of a parameter is touched. Plain
    cross-entropy takes probabilities `(batch, classes)` as labels too: a sample is wrong if the
    largest logit is of a class that is not the likeliest. `first` reads whether the labels are
    classes of the model and its outputs no probabilities.

    Raises:
        ValueError: the outputs are no logits and the labels no labels, as in
            `flatreg.models.entrance`; the logits do not depend on the inputs in a way autograd can
            follow; an autocast to float16 is on, or the logits are float16.
    """
    # Callers may be under no_grad or inference_mode, whose tensors no graph can save.
    with torch.inference_mode(False), torch.set_grad_enabled(gradient):
        x, labels = outside_inference(x).requires_grad_(gradient), outside_inference(labels)
        targets = None if targets is None else outside_inference(targets)
        logits = _logits(model, x)
        labels = as_targets(labels, logits, read=first)
        if first:
            check_no_probabilities(logits.detach())
        climbed = LOSSES[loss] if isinstance(loss, str) else loss
        try:
            values = climbed(logits, labels, targets)
        except IndexError:  # on the CPU, of a label that is no class
            as_targets(labels, logits, read=True)
            raise
        slope = _gradient(values, x) if gradient else torch.zeros_like(x)
    logits = logits.detach()
    said = logits.argmax(1)
    if labels.is_floating_point():
        wrong = labels.gather(1, said[:, None])[:, 0] < labels.amax(1)
    else:
        # argmax returns the place of a nan, which may be the label: no class was predicted there.
        wrong = (said != labels) | logits.isnan().any(1)
    return values.detach(), slope, wrong


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    found: Tensor | None = None
    if values.requires_grad:  # samples do not interact: the gradient of the sum holds each one's
        try:
            (found,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "the model checkpoints with use_reentrant=True, which gives no gradient in the "
                "inputs: set use_reentrant=False, or switch its checkpointing off"
            ) from error
    if found is None:
        raise ValueError(
            "the logits have no gradient in the inputs (a detach, no_grad or numpy on the way?): "
            "give the attacks a differentiable model, or a cascade of square alone (to evaluate, "
            "diagnose=False too)"
        )
    return found


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        raise ValueError(
            "an attack under float16 autocast finds gradients of zero: search in bfloat16 or "
            "float32"
        )
    logits = as_logits(pass_copy(model, x), len(x))
    if logits.dtype == torch.float16:
        raise ValueError(
            "an attack on float16 logits finds gradients of zero: search in bfloat16 or float32"
        )
    return logits.float() if logits.dtype == torch.bfloat16 else logits
