r"""Sharpness-aware minimisation: another estimate of the gradient; the step stays native.

.. math:: g = \nabla L(w + e(w)), \qquad e(w) = \rho\, \nabla L(w) / \|\nabla L(w)\|

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from flatreg.isolation import frozen_statistics, record_rng

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flatreg.objective import ObjectiveLoss

Loss = TypeVar("Loss", "Tensor", "ObjectiveLoss")


class SAM(Optimizer):
    """SAM around an existing optimizer instance, timm's included.

    `param_groups`, `state` and `defaults` *are* those of `base`, with `rho` added to each group, so
    schedulers, Accelerate and checkpoints see the base optimizer; a checkpoint of either loads into
    the other. The perturbation lives only between the two passes and never enters a checkpoint.

    Take both passes with `flatreg.backward` (right under accumulation, AMP, clipping and DDP); or
    with `perturbed()` where you own the passes; or with `step(closure)`.

    Args:
        base: the optimizer that steps.
        rho: radius of the perturbation, L2 over all parameters of all groups; each group can
            have its own in `param_groups[i]["rho"]`.

    Raises:
        ValueError: rho is negative.
    """

    def __init__(self, base: Optimizer, *, rho: float = 0.05) -> None:
        if not isinstance(base, Optimizer):
            raise ValueError(f"base must be an optimizer instance, got {base!r}")
        if rho < 0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        self.base = base
        self.rho = rho
        groups, state, defaults = base.param_groups, base.state, base.defaults
        super().__init__([{"params": []}], defaults)  # registers hooks; its groups are thrown away
        self.param_groups, self.state, self.defaults = groups, state, defaults
        for group in groups:
            group.setdefault("rho", rho)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "rho": self.rho}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SAM.__init__(self, state["base"], rho=state["rho"])

    # One source of truth: FSDP2's prepare and load_state_dict replace these on whichever they hold.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; `rho` may be one of its entries."""
        self.base.add_param_group(param_group)
        self.param_groups[-1].setdefault("rho", self.rho)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with `rho` among the settings of each group."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; one of a plain base optimizer has no rho, and today's is kept."""
        rhos = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Without closure: the base optimizer's step, after `backward` or `perturbed`.

        With one (LBFGS convention: it clears gradients, evaluates, calls backward and returns the
        loss): both passes, then the base step; clears the gradients and returns the unperturbed
        loss. BatchNorm statistics move in both passes, because no model is known here.

        Raises:
            RuntimeError: a closure is given and gradients are present already, as under a
                GradScaler or with accumulation: use `flatreg.backward`.
        """
        if closure is None:
            return self.base.step()
        if any(p.grad is not None for p in self._parameters()):
            raise RuntimeError(
                "SAM.step(closure) found gradients present already (GradScaler, accumulation, "
                "no zero_grad before it): take both passes with flatreg.backward"
            )
        with torch.enable_grad():
            loss = closure()
            with self.perturbed():
                closure()
        self.base.step()
        self.zero_grad()  # so that the next call can tell gradients of its own from others'
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Weights at w + e(w) inside, bit for bit back at w afterwards, also when the body raises.

        The gradients present at entry give the direction and are consumed: inside, `.grad` starts
        from None, and what the body accumulates there is what `step` uses. Where their norm is zero
        or not finite (a GradScaler's overflow) the perturbation is zero; that is decided on the
        device. The direction does not depend on a loss scale.
        """
        saved: list[Tensor] = []
        perturbed: list[Tensor] = []
        try:
            with torch.no_grad():
                self._ascend(perturbed, saved)
            yield
        finally:
            # Subtracting would drift in bf16: 7e-4 in 20 steps at learning rate 0.
            with torch.no_grad():
                if saved:
                    torch._foreach_copy_(perturbed, saved)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _ascend(self, perturbed: list[Tensor], saved: list[Tensor]) -> None:
        rhos = [g["rho"] for g in self.param_groups for p in g["params"] if p.grad is not None]
        params = [p for p in self._parameters() if p.grad is not None]
        gradients = [p.grad for p in params if p.grad is not None]
        if not params:
            return
        norm = get_total_norm(gradients)
        usable = norm.isfinite() & (norm > 0)
        inverse = torch.where(usable, 1 / norm, 0.0)
        for p in params:
            p.grad = None
        # Gradients may be views into DDP's buckets: the perturbation gets memory of its own.
        steps = [
            torch.where(usable.to(g.device), g * (rho * inverse).to(g.device), 0).to(p.dtype)
            for p, g, rho in zip(params, gradients, rhos, strict=True)
        ]
        copies = [p.detach().clone() for p in params]
        saved.extend(copies)
        perturbed.extend(params)
        torch._foreach_add_(perturbed, steps)


def backward(
    optimizer: Optimizer,
    closure: Callable[[], Loss],
    *,
    model: nn.Module | None = None,
    accelerator: Accelerator | None = None,
) -> Loss:
    """Put the gradient that `optimizer` wants into `.grad`, where `loss.backward()` would.

    With `SAM`, two passes: the first, without gradient synchronisation, gives the perturbation; the
    second, at the perturbed weights, accumulates into `.grad`. Gradients of earlier micro-batches
    are kept, BatchNorm statistics move in the first pass alone, random streams are replayed so that
    dropout masks agree, and the weights come back bit for bit, also when a pass raises. Then clip,
    step, schedule and clear as ever. With any other optimizer, one ordinary pass.

    Args:
        optimizer: as it is, or as `accelerator.prepare` returned it.
        closure: evaluates the loss of a batch without calling backward: `objective.bind(...)` or
            any function that returns a scalar tensor.
        model: the model of `closure`, as prepared; a bound objective brings its own.
        accelerator: takes the loss scale and the division by accumulation steps.

    Returns:
        What the closure returned at the unperturbed weights, detached.

    Raises:
        ValueError: a bare closure with SAM and no model.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer forwards no methods
    run = (lambda loss: loss.backward()) if accelerator is None else accelerator.backward

    def evaluate() -> Loss:
        loss = closure()
        run(getattr(loss, "total", loss))
        return loss.detach()

    if not isinstance(inner, SAM):
        return evaluate()
    model = getattr(closure, "model", None) if model is None else model
    if model is None:
        raise ValueError("SAM with a bare closure needs its model: backward(..., model=model)")
    # A bound objective attacks now: its noise must not shift the streams of the first pass only.
    getattr(closure, "prepare", lambda: None)()
    replay = record_rng(model)
    params = inner._parameters()
    accumulated = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        with _no_sync(model):
            loss = evaluate()
        with inner.perturbed():
            after_first_pass = record_rng(model)
            for p, gradient in zip(params, accumulated, strict=True):
                p.grad = gradient
            replay()
            with frozen_statistics(model):
                evaluate()
            after_first_pass()
    except BaseException:
        for p, gradient in zip(params, accumulated, strict=True):
            p.grad = gradient
        raise
    return loss


def _no_sync(model: nn.Module) -> AbstractContextManager[None]:
    no_sync = getattr(model, "no_sync", nullcontext)
    return no_sync()
