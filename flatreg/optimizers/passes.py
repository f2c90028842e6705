"""`flatreg.backward`: both passes of a sharpness-aware gradient where loss.backward() would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from flatreg.models.compiled import sharded_parts
from flatreg.models.double_backward import graph_nodes
from flatreg.models.pass_start import PassStart, second_pass
from flatreg.optimizers.ascent import perturb, restore
from flatreg.optimizers.closure import (
    BatchLoss,
    Closure,
    Gradients,
    Loss,
    check_closure,
    evaluated,
    modules_in,
    take_gradients,
    total_of,
    unwritten,
    weights_at_rest,
)
from flatreg.optimizers.data_parallel import (
    average,
    average_gradients,
    broadcast_buffers,
    is_bypassed,
    is_of_an_engine,
    lightning_module,
    lightning_precision,
    lightning_trainer,
    refuse_engines,
    refuse_unreached,
    will_sync,
    without_sync,
)
from flatreg.optimizers.gradient import between, combine
from flatreg.optimizers.sharpness_aware import SharpnessAware, find_wrapper
from flatreg.optimizers.vector import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from lightning import Fabric


def backward(
    optimizer: Optimizer,
    closure: Closure[Loss],
    *,
    model: nn.Module | None = None,
    accelerator: Accelerator | Fabric | None = None,
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
        closure: evaluates the loss of a batch without calling backward: a `BatchLoss`, as
            `objective.bind(...)` is, or any function that returns a scalar tensor.
        model: the model of `closure`, as prepared; a `BatchLoss` brings its own.
        accelerator: takes the loss scale and the division by accumulation steps; or Lightning's
            Fabric, which takes the loss scale.
        scaler: takes the loss scale, in a loop without Accelerate.

    Returns:
        What the closure returned at the unperturbed weights, detached; at the perturbed ones where
        a method takes no first pass (`RandomSAM`, `MomentumSAM`, `StaleSAM`).

    Raises:
        TypeError: `optimizer` is several; `closure` is a loss, an objective without a batch, or
            returns no tensor.
        ValueError: a bare closure with a sharpness-aware optimizer and no model; `micro_batches`
            with a closure that cannot be split; a model of other parameters than that of the
            closure; an optimizer of another model; an engine that owns the backward pass or shards
            parameters without DTensor; a loss that is no scalar or has no graph.
        RuntimeError: the closure calls backward itself, or returns a loss that was differentiated
            before; an optimizer steps inside backward; the call is within `parametrize.cached()`.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected one optimizer, got a {type(optimizer).__name__}: call backward with the "
            "sharpness-aware one; parameters of others get their gradient from it too"
        )
    check_closure(closure)
    wrapper = find_wrapper(optimizer)
    if isinstance(closure, BatchLoss):
        model = closure.model if model is None else model
        _check_same(model, closure.model)
    model = lightning_module(model, optimizer) or model
    own = [p for group in optimizer.param_groups for p in group["params"]]
    loop = _Loop(model, accelerator, scaler, own)
    if wrapper is None:
        plain = loop.evaluate(closure)
        refuse_unreached(own, model, accelerator, perturbs=False)
        return plain
    if model is None:
        raise ValueError("a bare closure needs its model: backward(..., model=model)")
    if is_of_an_engine(accelerator):
        raise ValueError("DeepSpeed and Megatron own the backward pass; use DDP or FSDP2")
    refuse_engines(model, own)
    if isinstance(closure, BatchLoss):
        # It attacks now, before the first pass: both passes must see one attacked batch, and the
        # attack's noise must not shift the random streams of the first pass alone.
        closure.prepare()
    *parts, last = _split(closure, wrapper.micro_batches)
    losses: list[Any] = []
    for part in parts:
        with without_sync(model):  # DDP averages the sum of all parts, with the last one
            losses.append(_estimate(wrapper, part, loop))
    loss: Loss = reduce(add, [*losses, _estimate(wrapper, last, loop)])
    refuse_unreached(own, model, accelerator, perturbs=True)
    wrapper.gradients_are_ready = True
    return loss


def _check_same(model: nn.Module, own: nn.Module) -> None:
    """Refuse a model that is neither that of the closure, nor around it, nor within it."""
    given, used = ({id(p) for p in m.parameters()} for m in (model, own))
    if not (given <= used or used <= given) or bool(given) != bool(used):
        raise ValueError(
            f"model: expected that of the closure, a {type(own).__name__}, got a "
            f"{type(model).__name__} of other parameters: leave model out"
        )


@dataclass(frozen=True)
class _Loop:
    """How the user's loop takes a backward pass."""

    model: Any
    accelerator: Any
    scaler: Any
    own: Sequence[Tensor]  # parameters of the optimizer

    def evaluate(self, closure: Closure[Loss]) -> Loss:
        loss = evaluated(closure, self.own)
        try:
            self.differentiate(total_of(loss))
        except RuntimeError as error:
            if "through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                "the closure returned a loss that was differentiated before: compute it within the "
                "closure, as lambda: loss_fn(model(inputs), labels)"
            ) from error
        return loss.detach()

    def evaluate_locally(self, closure: Closure[Loss]) -> Loss:
        """The same without synchronisation."""
        with without_sync(self.model):
            return self.evaluate(closure)

    def evaluate_first(
        self, closure: Closure[Loss], known: Sequence[Tensor], ends: Sequence[Tensor] | None
    ) -> Loss:
        """The same for a first pass, which leaves a gradient to the known parameters alone.

        Args:
            closure: the loss.
            known: parameters whose gradients the caller takes away afterwards.
            ends: where the backward pass may end.
        """
        with without_sync(self.model):
            loss = evaluated(closure, self.own)
            leaves, reenters = _leaves(total_of(loss))
            here, ids = {id(p) for p in leaves}, {id(p) for p in known}
            # What lies in a reentrant checkpoint is in no graph, and torch lets no pass through one
            # end early: only a whole pass reaches what lies in it or before it.
            if ends is not None and (reenters or not {id(p) for p in ends} <= here):
                ends = None
            # As a learned temperature with an optimizer of its own, in no module.
            others = [p for p in leaves if id(p) not in ids]
            accumulated = take_gradients(others)
            try:
                self.differentiate(total_of(loss), ends)
            finally:
                _set_gradients(others, accumulated)
        return loss.detach()

    def differentiate(self, total: Tensor, ends: Sequence[Tensor] | None = None) -> None:
        """Backward pass of a loss; with `ends`, only as far down as to these parameters."""
        reach: dict[str, Any] = {} if ends is None else {"inputs": ends}
        with weights_at_rest(self.own):
            if self.model is not None and is_bypassed(self.model):
                # DDP's hooks sit on the parameters' gradient accumulators, and a static graph
                # counts every call of a hook. `autograd.grad` reaches the parameters without it.
                reached = ends or _leaves(total)[0]
                found = torch.autograd.grad(self.scaled(total), reached, allow_unused=True)
                _add_gradients(reached, found)
            elif self.accelerator is not None:
                self.accelerator.backward(total, **reach)
            elif lightning_trainer(self.model) is not None:
                # Scales the loss and, in manual optimisation, arms the reducer of DDP.
                self.model.manual_backward(total, **reach)
            else:
                torch.autograd.backward(self.scaled(total), **reach)

    def scaled(self, value: Tensor) -> Tensor:
        """`value` as this loop multiplies a loss before its backward pass."""
        if self.accelerator is not None:
            value = value / getattr(self.accelerator, "gradient_accumulation_steps", 1)
        owners = self, self.accelerator, lightning_precision(self.model)
        found = (getattr(owner, "scaler", None) for owner in owners)
        scaler = next((scaler for scaler in found if scaler is not None), None)
        scaled: Tensor = value if scaler is None else scaler.scale(value)
        return scaled


def _leaves(loss: Tensor) -> tuple[list[Tensor], bool]:
    """Tensors that a backward pass of `loss` gives a gradient to; whether some of it is hidden."""
    nodes = list(graph_nodes(loss))
    found = [getattr(node, "variable", None) for node in nodes]
    reenters = any(node.name().startswith("CheckpointFunction") for node in nodes)
    return [leaf for leaf in found if leaf is not None], reenters


def _estimate(wrapper: SharpnessAware, closure: Closure[Loss], loop: _Loop) -> Loss:
    """Add the gradient of one micro-batch to `.grad`."""
    model: nn.Module = loop.model
    rule = wrapper.gradient
    if not wrapper.perturbs_now and not (rule.reuses and wrapper.has_begun):
        return loop.evaluate(closure)
    evaluations = _at_head(wrapper, closure)
    if evaluations is not None:
        return _through_head(wrapper, *evaluations, loop)
    if getattr(parametrize, "_cache_enabled", 0):
        raise RuntimeError(
            "parametrize.cached() keeps computed weights as they were before the perturbation: "
            "enter it within the closure, not around flatreg.backward"
        )
    for part in sharded_parts(model):
        # Without synchronisation FSDP2 keeps gradients in its own buffers and not in `.grad`, where
        # the ascent rule reads them.
        part.set_requires_gradient_sync(True, recurse=False)
    # The optimizer's parameters come first, in the order of its states. Those of the model that it
    # does not own (frozen, or another optimizer's) get gradients of the first pass as well, which
    # must not stay.
    parameters = list({id(p): p for p in [*wrapper.parameters(), *model.parameters()]}.values())
    # The ascent and gradient rules need this micro-batch's gradient alone, so what earlier ones
    # accumulated is taken out before the first pass.
    accumulated = take_gradients(parameters)
    # DDP averages what arrives in one backward pass. A rule that combines two passes is not linear
    # in them, so both stay local and their combination is averaged, by hand. Asked now, because
    # `without_sync` below changes the answer.
    by_hand = will_sync(model) and rule.combines
    try:
        if wrapper.perturbs_now:
            loss = _two_passes(wrapper, closure, loop, parameters, accumulated)
        else:
            loss = loop.evaluate_locally(closure)
            between(rule, wrapper.parameter_states())
        if rule.combines:  # otherwise the second pass accumulated on top of them already
            _add_gradients(parameters, accumulated)
        if by_hand:
            average_gradients(model, parameters)
    except BaseException:
        # As if the call had not been made, so that the loop may skip this batch and go on. What a
        # second backward pass that fails has already added stays, as in a loop without a wrapper.
        _set_gradients(parameters, accumulated)
        raise
    return loss


def _two_passes(
    wrapper: SharpnessAware,
    closure: Closure[Loss],
    loop: _Loop,
    parameters: Sequence[Tensor],
    accumulated: Gradients,
) -> Loss:
    """Gradient at the perturbed weights; on top of `accumulated` where no rule combines it."""
    model: nn.Module = loop.model
    combines = wrapper.gradient.combines
    has_first_pass = wrapper.needs_first_pass
    states = wrapper.parameter_states()
    # The second pass starts where the first did, with the same dropout masks, so that the two
    # gradients differ by the perturbation alone; and buffers count this batch once, at the
    # unperturbed weights.
    broadcast_buffers(model)
    others = [] if isinstance(closure, BatchLoss) else modules_in(closure)
    start = PassStart(model, *others, reads=has_first_pass and wrapper.reads_frozen)
    if has_first_pass:
        # Local: each process perturbs along its own gradient, and one all-reduce is saved. Where
        # only the perturbation needs this gradient, the pass ends at the scope.
        ends = None if combines else _ends_of_first_pass(wrapper, parameters)
        loss = loop.evaluate_first(closure, parameters, ends)
    # Taken, so that the second pass finds `.grad` empty and autograd does not add to the first.
    plain = take_gradients(parameters)[: len(states)]
    saved = perturb(
        wrapper.ascent,
        states,
        plain,
        owned=not combines,  # the gradient rule still needs them
        loss_scale=loop.scaled(torch.ones((), device=parameters[0].device)),
        average=partial(average, model) if wrapper.sync_perturbation else None,
    )
    try:
        if not combines:
            plain.clear()  # the second pass may need the memory
            # The second pass adds to what earlier micro-batches left, as any backward pass would,
            # and DDP averages it in the usual way.
            _set_gradients(parameters, accumulated)
        if has_first_pass:
            with start.again(), start.holds(), second_pass():
                if combines:
                    loop.evaluate_locally(closure)
                else:
                    loop.evaluate(closure)
        else:
            moved = [weight for weight, _ in saved]
            with unwritten(moved, reads=wrapper.reads_frozen):
                loss = loop.evaluate(closure)
        wrapper.reads_frozen = False
    finally:
        # Also after an error: a loop that catches it must not train on perturbed weights.
        restore(saved)
    if combines:
        combine(wrapper.gradient, states, plain)
    return loss


def _ends_of_first_pass(
    wrapper: SharpnessAware, parameters: Sequence[Tensor]
) -> list[Tensor] | None:
    """Where a pass for the perturbation alone may end; None where it goes all the way."""
    scope = _scope(wrapper)
    trained = [p for p in parameters if p.requires_grad]
    # Under FSDP2 the graph ends at the whole weights it gathers, not at the optimizer's shards.
    ends = 0 < len(scope) < len(trained) and not is_sharded(scope)
    return scope if ends else None


def _scope(wrapper: SharpnessAware) -> list[Tensor]:
    """What a perturbation moves: the parameters of the scope that are not frozen."""
    return [p for p in wrapper.parameters(perturbed=True) if p.requires_grad]


def _at_head(
    wrapper: SharpnessAware, closure: Closure[Loss]
) -> tuple[Closure[Loss], Closure[Loss]] | None:
    """Both evaluations from one pass through the backbone, where scope and terms allow it."""
    one_gradient = wrapper.needs_first_pass and not wrapper.gradient.combines
    if not (isinstance(closure, BatchLoss) and wrapper.perturbs_now and one_gradient):
        return None
    scope = _scope(wrapper)
    return closure.at_head(scope) if scope and not wrapper.sync_perturbation else None


def _through_head(
    wrapper: SharpnessAware, first: Closure[Loss], second: Closure[Loss], loop: _Loop
) -> Loss:
    """Perturb the head between its two evaluations; the backbone sees one backward pass."""
    scope = _scope(wrapper)
    loss = evaluated(first, loop.own)
    # The gradient of the head alone, by `autograd.grad`: it writes no `.grad`, so that nothing has
    # to be taken out and put back, and calls no hook, so that DDP does not see it.
    scaled = loop.scaled(total_of(loss))
    found = dict(zip(scope, torch.autograd.grad(scaled, scope, allow_unused=True), strict=True))
    states = wrapper.parameter_states()
    plain = [found.get(state.weight) for state in states]
    scale = loop.scaled(torch.ones((), device=scaled.device))
    saved = perturb(wrapper.ascent, states, plain, owned=False, loss_scale=scale)
    try:
        # The features are those of the one pass; the head runs again on them, at its new weights.
        with second_pass():
            loop.evaluate(second)
    finally:
        restore(saved)  # also after an error, as in `_two_passes`
    return loss.detach()


def _split(closure: Closure[Loss], count: int) -> Sequence[Closure[Loss]]:
    if count == 1:
        return [closure]
    if not isinstance(closure, BatchLoss):
        raise ValueError(
            f"micro_batches={count} needs a closure that can be split: objective.bind(...)"
        )
    return closure.split(count)


def _set_gradients(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def _add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else gradient.add_(p.grad)
