"""`flatreg.backward`: both passes of a sharpness-aware gradient where loss.backward() would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from flatreg.models.state import frozen_statistics, record_rng
from flatreg.optimizers.data_parallel import (
    average,
    average_gradients,
    is_bypassed,
    will_sync,
    without_sync,
)
from flatreg.optimizers.perturbation import (
    Gradients,
    between,
    combine,
    perturb,
    restore,
    take_gradients,
)
from flatreg.optimizers.sharpness_aware import SharpnessAware, find_wrapper
from flatreg.optimizers.vector import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flatreg.terms.objective import ObjectiveLoss


Loss = TypeVar("Loss", "Tensor", "ObjectiveLoss")


def backward(
    optimizer: Optimizer,
    closure: Callable[[], Loss],
    *,
    model: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Loss:
    """Put the gradient that `optimizer` wants into `.grad`, where `loss.backward()` would.

    With a sharpness-aware optimizer, two passes: the first, without gradient synchronisation,
    gives the perturbation; the second, at the perturbed weights, accumulates into `.grad`.
    Gradients of earlier micro-batches are kept, BatchNorm statistics move in the first pass alone,
    random streams are replayed so that dropout masks agree, and the weights come back bit for bit,
    also when a pass raises. Then unscale, clip, step, schedule and clear as ever. With any other
    optimizer, one ordinary pass.

    One forward and one backward do where the scope is the head and `closure` a bound objective
    whose terms read no more than features and logits.

    Args:
        optimizer: as it is, or as `accelerator.prepare` returned it; found inside other wrappers.
        closure: evaluates the loss of a batch without calling backward: `objective.bind(...)` or
            any function that returns a scalar tensor.
        model: the model of `closure`, as prepared; a bound objective brings its own.
        accelerator: takes the loss scale and the division by accumulation steps.
        scaler: takes the loss scale, in a loop without Accelerate.

    Returns:
        What the closure returned at the unperturbed weights, detached; at the perturbed ones where
        a random direction needs no first pass.

    Raises:
        ValueError: a bare closure with a sharpness-aware optimizer and no model; `micro_batches`
            with a closure that cannot be split; an accelerator whose engine owns the backward pass.
    """
    wrapper = find_wrapper(optimizer)
    model = getattr(closure, "model", None) if model is None else model
    loop = _Loop(model, accelerator, scaler)
    if wrapper is None:
        return loop.evaluate(closure)
    if model is None:
        raise ValueError("a bare closure needs its model: backward(..., model=model)")
    if str(getattr(accelerator, "distributed_type", "")).endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ValueError("DeepSpeed and Megatron own the backward pass; use DDP or FSDP2")
    # A bound objective attacks now: its noise must not shift the streams of the first pass only.
    getattr(closure, "prepare", lambda: None)()
    *parts, last = _split(closure, wrapper.micro_batches)
    losses: list[Any] = []
    for part in parts:
        with without_sync(model):
            losses.append(_estimate(wrapper, part, loop))
    loss: Loss = reduce(add, [*losses, _estimate(wrapper, last, loop)])
    wrapper.mark_estimated()
    return loss


@dataclass(frozen=True)
class _Loop:
    """How the user's loop takes a backward pass."""

    model: Any
    accelerator: Any
    scaler: Any

    def evaluate(self, closure: Callable[[], Loss], inputs: Sequence[Tensor] | None = None) -> Loss:
        """Forward and backward; with `inputs`, only as far down as to these parameters."""
        loss = closure()
        total = _total(loss)
        reach: dict[str, Any] = {} if inputs is None else {"inputs": inputs}
        if self.model is not None and is_bypassed(self.model):
            # Gradients that come by their hooks would be counted.
            reached = inputs or [p for p in self.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(self.scaled(total), reached, allow_unused=True)
            _add(reached, found)
        elif self.accelerator is not None:
            self.accelerator.backward(total, **reach)
        else:
            torch.autograd.backward(self.scaled(total), **reach)
        return loss.detach()

    def evaluate_locally(
        self, closure: Callable[[], Loss], inputs: Sequence[Tensor] | None = None
    ) -> Loss:
        """The same without synchronisation."""
        with without_sync(self.model):
            return self.evaluate(closure, inputs)

    def scaled(self, value: Tensor) -> Tensor:
        """`value` as this loop multiplies a loss before its backward pass."""
        if self.accelerator is not None:
            value = value / self.accelerator.gradient_accumulation_steps
        scaler = self.scaler or getattr(self.accelerator, "scaler", None)
        scaled: Tensor = value if scaler is None else scaler.scale(value)
        return scaled


def _estimate(wrapper: SharpnessAware, closure: Callable[[], Loss], loop: _Loop) -> Loss:
    """Add the gradient of one micro-batch to `.grad`."""
    model: nn.Module = loop.model
    rule = wrapper.gradient
    if not wrapper.due and not rule.reuses:
        return loop.evaluate(closure)
    at_head = _at_head(wrapper, closure)
    if at_head is not None:
        first, second = at_head
        return _through_head(wrapper, first, second, loop)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)  # until it reduces, FSDP2 keeps gradients elsewhere
    everything = _unique([*wrapper.parameters(), *model.parameters()])
    accumulated = take_gradients(everything)
    by_hand = will_sync(model) and rule.combines
    try:
        if wrapper.due:
            loss = _two_passes(wrapper, closure, loop, everything, accumulated)
        else:
            loss = loop.evaluate_locally(closure)
            between(rule, wrapper.members())
        if rule.combines:
            _add(everything, accumulated)
        if by_hand:
            average_gradients(model, everything)
    except BaseException:
        _put(everything, accumulated)
        raise
    return loss


def _two_passes(
    wrapper: SharpnessAware,
    closure: Callable[[], Loss],
    loop: _Loop,
    everything: Sequence[Tensor],
    accumulated: Gradients,
) -> Loss:
    """Gradient at the perturbed weights; on top of `accumulated` where no rule combines it."""
    model: nn.Module = loop.model
    combines = wrapper.gradient.combines
    two = combines or wrapper.ascent.uses_gradient
    members = wrapper.members()
    replay = record_rng(model)
    if two:
        loss = loop.evaluate_locally(closure, None if combines else _reach(wrapper, everything))
    plain = take_gradients(everything)[: len(members)]
    scale = loop.scaled(torch.ones((), device=everything[0].device))
    together = partial(average, model) if wrapper.sync_perturbation else None
    saved = perturb(
        wrapper.ascent, members, plain, owned=not combines, loss_scale=scale, average=together
    )
    try:
        if not combines:
            plain.clear()
            _put(everything, accumulated)
        if two:
            after = record_rng(model)
            replay()
            with frozen_statistics(model):
                if combines:
                    loop.evaluate_locally(closure)
                else:
                    loop.evaluate(closure)
            after()
        else:
            loss = loop.evaluate(closure)
    finally:
        restore(saved)
    combine(wrapper.gradient, members, plain)
    return loss


def _reach(wrapper: SharpnessAware, everything: Sequence[Tensor]) -> list[Tensor] | None:
    """Where a pass for the perturbation alone may end; None where it goes all the way."""
    scope = _scope(wrapper)
    trained = [p for p in everything if p.requires_grad]
    ends = 0 < len(scope) < len(trained) and not is_sharded(scope)
    return scope if ends else None


def _scope(wrapper: SharpnessAware) -> list[Tensor]:
    """What a perturbation moves: frozen parameters stay."""
    return [p for p in wrapper.parameters(perturbed=True) if p.requires_grad]


def _at_head(
    wrapper: SharpnessAware, closure: Callable[[], Loss]
) -> tuple[Callable[[], Loss], Callable[[], Loss]] | None:
    """Both evaluations on one pass through the backbone, where the scope and the terms allow it."""
    at_head = getattr(closure, "at_head", None)
    fits = wrapper.due and wrapper.ascent.uses_gradient and not wrapper.gradient.combines
    if at_head is None or not fits or wrapper.sync_perturbation or not _scope(wrapper):
        return None
    pair: tuple[Callable[[], Loss], Callable[[], Loss]] | None = at_head(_scope(wrapper))
    return pair


def _through_head(
    wrapper: SharpnessAware, first: Callable[[], Loss], second: Callable[[], Loss], loop: _Loop
) -> Loss:
    """Perturb the head between its two evaluations; the backbone sees one backward pass."""
    scope = _scope(wrapper)
    loss = first()
    total = loop.scaled(_total(loss))
    found = dict(zip(scope, torch.autograd.grad(total, scope, allow_unused=True), strict=True))
    members = wrapper.members()
    plain = [found.get(m.weight) for m in members]
    scale = loop.scaled(torch.ones((), device=total.device))
    saved = perturb(wrapper.ascent, members, plain, owned=False, loss_scale=scale)
    try:
        loop.evaluate(second)
    finally:
        restore(saved)
    return loss.detach()


def _total(loss: Tensor | ObjectiveLoss) -> Tensor:
    return loss if isinstance(loss, Tensor) else loss.total


def _split(closure: Any, count: int) -> list[Any]:
    if count == 1:
        return [closure]
    split = getattr(closure, "split", None)
    if split is None:
        raise ValueError(
            f"micro_batches={count} needs a closure that can be split: objective.bind(...)"
        )
    return list(split(count))


def _unique(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _put(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def _add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else gradient.add_(p.grad)
