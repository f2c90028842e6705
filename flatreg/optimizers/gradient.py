r"""Gradient rules: what to step on, given the gradients at the weights and at the perturbed ones.

:math:`g = \nabla L(w)`, :math:`g' = \nabla L(w + e)`. All rules are positively homogeneous in the
pair, so a loss scale passes through them.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.optimizers.ascent import Ascent
from flatreg.optimizers.closure import Gradients
from flatreg.optimizers.parameter_state import ParameterState, States
from flatreg.optimizers.vector import (
    Vector,
    as_sharded,
    average_whole,
    inner,
    norm,
    refuse_sparse,
    safe_inverse,
    shards,
)
from flatreg.terms.protocol import Amount


class GradientRule(Protocol):
    """A gradient rule, frozen and its own configuration.

    `combines` is True where g enters too: then g is kept through the second pass. `reuses` is True
    where steps between two perturbations use what the last one left.
    """

    combines: ClassVar[bool]
    reuses: ClassVar[bool]

    def combine(self, plain: Vector, perturbed: Vector, states: States) -> None:
        """Overwrite `perturbed`, which holds g', with the gradient to step on."""

    def between(self, plain: Vector, states: States) -> None:
        """Overwrite `plain`, which holds g, on a step without perturbation."""


@configuration
class Perturbed:
    """g', as in SAM."""

    combines: ClassVar[bool] = False
    reuses: ClassVar[bool] = False

    def combine(self, plain: Vector, perturbed: Vector, states: States) -> None:
        """Keep g'."""

    def between(self, plain: Vector, states: States) -> None:
        """Keep g."""


@configuration
class Mixed(Perturbed):
    r"""A straight mixture, :math:`(1-c)\, g + c\, g'`: the gradient of :math:`L + c\,(L_p - L)`.

    c is `weight`. WSAM (Yue, Jiang, Ye, Gao, Liu, Zhang, "Sharpness-Aware Minimization Revisited:
    Weighted Sharpness as a Regularization Term", KDD 2023) has c = gamma/(1 - gamma); the
    gradient-norm penalty (Zhao, Zhang, Hu, "Penalizing Gradient Norm for Efficiently Improving
    Generalization in Deep Learning", ICML 2022) has c = lambda/rho.
    """

    weight: Amount
    combines: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, states: States) -> None:
        """See the class."""
        refuse_sparse([*plain, *perturbed])
        torch._foreach_lerp_(shards(perturbed), shards(plain), 1 - self.weight)


@configuration
class SurrogateGap(Perturbed):
    r"""Descend :math:`L_p` and the gap :math:`L_p - L`: :math:`g' - \alpha\, g_\perp`.

    :math:`g_\perp = g - g' \langle g, g'\rangle / \|g'\|^2` is the part of g orthogonal to g', so
    stepping against it lowers the gap without raising :math:`L_p` to first order.

    Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap Minimization
    Improves Sharpness-Aware Training", ICLR 2022.
    """

    alpha: Amount
    combines: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, states: States) -> None:
        """See the class."""
        along = inner(plain, perturbed) * safe_inverse(norm(perturbed)).square()
        for g, g_p in zip(shards(plain), shards(perturbed), strict=True):
            g_p.mul_((1 + self.alpha * along).to(g_p)).sub_(g, alpha=self.alpha)


@configuration
class Reuse(Perturbed):
    r"""Keep the direction that sharpness adds, and reuse it until the next perturbation.

    At a perturbation step on g' and keep :math:`v = g' - g \langle g, g'\rangle / \|g\|^2`; between
    perturbations step on :math:`g + \alpha\,\|g\|\,v/\|v\|`. Norms run over all parameters, as in
    the paper; implementations that take them tensor by tensor give other steps.

    Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization",
    CVPR 2022.
    """

    alpha: Amount
    combines: ClassVar[bool] = True
    reuses: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, states: States) -> None:
        """Keep v/||v||; zero where a pass overflowed."""
        refuse_sparse([*plain, *perturbed])
        along = inner(plain, perturbed) * safe_inverse(norm(plain)).square()
        added = [
            g_p - along.to(g.device, g.dtype) * g for g, g_p in zip(plain, perturbed, strict=True)
        ]
        scale = safe_inverse(norm(added))
        for state, whole, v in zip(states, added, shards(added), strict=True):
            factor = scale.to(v.device)
            kept = torch.where(factor > 0, v * factor.to(v.dtype), 0)
            state.memory["reused"] = as_sharded(kept, whole)

    def between(self, plain: Vector, states: States) -> None:
        """Add the kept direction at alpha times the length of g."""
        length = self.alpha * norm(plain)
        for g, state in zip(shards(plain), states, strict=True):
            if "reused" in state.memory:
                (reused,) = shards([state.memory["reused"]])
                g.add_(reused * length.to(g.device, g.dtype))


@torch.no_grad()
def prime(ascent: Ascent, rule: GradientRule, states: States) -> None:
    """Give rules their memory, empty, where there is none: they see gradients of zero."""
    trained = [s for s in states if s.weight.requires_grad]
    inside = [s for s in trained if s.in_scope]
    if inside and not any(s.memory for s in trained):
        ascent(inside, [torch.zeros_like(s.weight) for s in inside], 1.0)
        zeros = [[torch.zeros_like(s.weight) for s in trained] for _ in range(2)]
        rule.combine(zeros[0], zeros[1], trained)


@torch.no_grad()
def combine(rule: GradientRule, states: States, plain: Gradients) -> None:
    """Apply the rule to the gradients `plain` of the first pass and `.grad` of the second.

    A parameter that only one of the passes reached has a zero gradient in the other.
    """
    reached: list[ParameterState] = []
    first: list[Tensor] = []
    second: list[Tensor] = []
    for state, gradient in zip(states, plain, strict=True):
        weight = state.weight
        if gradient is None and weight.grad is None:
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        reached.append(state)
        first.append(torch.zeros_like(weight.grad) if gradient is None else gradient)
        second.append(weight.grad)
    if reached:
        weights = [state.weight for state in states]
        average_whole(first, weights)
        average_whole(second, weights)
        rule.combine(first, second, reached)


@torch.no_grad()
def between(rule: GradientRule, states: States) -> None:
    """Apply the rule to `.grad` on a step without perturbation."""
    reached = [(state.weight.grad, state) for state in states if state.weight.grad is not None]
    if reached and rule.reuses:
        average_whole([g for g, _ in reached], [state.weight for state in states])
        rule.between([g for g, _ in reached], [state for _, state in reached])
