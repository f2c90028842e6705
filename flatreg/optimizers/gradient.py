r"""Gradient rules: what to step on, given the gradients at the weights and at the perturbed ones.

:math:`g = \nabla L(w)`, :math:`g' = \nabla L(w + e)`. All rules are positively homogeneous in the
pair, so a loss scale passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from flatreg.optimizers.ascent import Slot
from flatreg.optimizers.vector import Vector, inner, norm, safe_inverse, shards


class GradientRule(Protocol):
    """A gradient rule, frozen and its own configuration.

    `combines` is True where g enters too: then g is kept through the second pass. `reuses` is True
    where steps between two perturbations use what the last one left.
    """

    combines: ClassVar[bool]
    reuses: ClassVar[bool]

    def combine(self, plain: Vector, perturbed: Vector, slots: Sequence[Slot]) -> None:
        """Overwrite `perturbed`, which holds g', with the gradient to step on."""

    def between(self, plain: Vector, slots: Sequence[Slot]) -> None:
        """Overwrite `plain`, which holds g, on a step without perturbation."""


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """g', as in SAM."""

    combines: ClassVar[bool] = False
    reuses: ClassVar[bool] = False

    def combine(self, plain: Vector, perturbed: Vector, slots: Sequence[Slot]) -> None:
        """Leave g' alone."""

    def between(self, plain: Vector, slots: Sequence[Slot]) -> None:
        """Leave g alone."""


@dataclass(frozen=True, kw_only=True)
class Mixed(Perturbed):
    r"""A straight mixture, :math:`(1-c)\, g + c\, g'`: the gradient of :math:`L + c\,(L_p - L)`.

    c is `share`. WSAM (Yue, Jiang, Ye, Gao, Liu, Zhang, "Sharpness-Aware Minimization Revisited:
    Weighted Sharpness as a Regularization Term", KDD 2023) has c = gamma/(1 - gamma); the
    gradient-norm penalty (Zhao, Zhang, Hu, "Penalizing Gradient Norm for Efficiently Improving
    Generalization in Deep Learning", ICML 2022) has c = lambda/rho.
    """

    share: float
    combines: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, slots: Sequence[Slot]) -> None:
        """See the class."""
        torch._foreach_lerp_(shards(perturbed), shards(plain), 1 - self.share)


@dataclass(frozen=True, kw_only=True)
class SurrogateGap(Perturbed):
    r"""Descend :math:`L_p` and the gap :math:`L_p - L`: :math:`g' - \alpha\, g_\perp`.

    :math:`g_\perp = g - g' \langle g, g'\rangle / \|g'\|^2` is the part of g orthogonal to g', so
    stepping against it lowers the gap without raising :math:`L_p` to first order.

    Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap Minimization
    Improves Sharpness-Aware Training", ICLR 2022.
    """

    alpha: float
    combines: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, slots: Sequence[Slot]) -> None:
        """See the class."""
        along = inner(plain, perturbed) * safe_inverse(norm(perturbed)).square()
        for g, g_p in zip(shards(plain), shards(perturbed), strict=True):
            g_p.mul_((1 + self.alpha * along).to(g_p)).sub_(g, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class Reuse(Perturbed):
    r"""Keep the direction that sharpness adds, and reuse it until the next perturbation.

    At a perturbation step on g' and keep :math:`v = g' - g \langle g, g'\rangle / \|g\|^2`; between
    perturbations step on :math:`g + \alpha\,\|g\|\,v/\|v\|`. Norms run over all parameters, as in
    the paper; implementations that take them tensor by tensor give other steps.

    Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization",
    CVPR 2022.
    """

    alpha: float
    combines: ClassVar[bool] = True
    reuses: ClassVar[bool] = True

    def combine(self, plain: Vector, perturbed: Vector, slots: Sequence[Slot]) -> None:
        """Keep v/||v||; zero where a pass overflowed."""
        along = inner(plain, perturbed) * safe_inverse(norm(plain)).square()
        added = [
            g_p - along.to(g.device, g.dtype) * g for g, g_p in zip(plain, perturbed, strict=True)
        ]
        scale = safe_inverse(norm(added))
        for slot, v in zip(slots, shards(added), strict=True):
            on_device = scale.to(v.device, v.dtype)
            slot.memory["reused"] = torch.where(on_device > 0, v * on_device, 0)

    def between(self, plain: Vector, slots: Sequence[Slot]) -> None:
        """Add the kept direction at alpha times the length of g."""
        length = self.alpha * norm(plain)
        for g, slot in zip(shards(plain), slots, strict=True):
            if "reused" in slot.memory:
                g.add_(slot.memory["reused"] * length.to(g.device, g.dtype))
