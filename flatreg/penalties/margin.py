"""Penalties on the slope of the loss and of the margin within the eps-ball."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.double_backward import Method
from flatreg.labels import class_indices
from flatreg.measures.input_gradient import gradient_dual_norm
from flatreg.measures.linearised_margin import linearised_margin
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.penalties.losses import cross_entropy_at
from flatreg.precision import cross_entropy
from flatreg.terms import (
    CONFIG,
    Eps,
    Need,
    Number,
    Passes,
    Schedule,
    Strength,
    needs_for,
)
from flatreg.threat import DenseNorm

Rho = Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InputGradient:
    """strength * eps ||P grad l||_*: how far the loss rises in the ball, to first order.

    ||.||_* is the dual norm (L1 for the Linf ball), P projects off the data manifold. By default a
    finite difference along the detached steepest direction, rho eps long (Finlay and Oberman,
    "Scaleable input gradient regularization", 2021). Costs a backward pass to the inputs and one
    more pass, about 2x a plain step.

    Args:
        strength: factor; the measure has the unit of the loss.
        eps: radius in [0,1] pixel units.
        norm: of the ball.
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
        rho: finite-difference step as a share of eps, in (0, 1]; in bfloat16 keep it >= 0.5.
        manifold: what counts as off-manifold; by default every direction.
        schedule: lets strength or ball warm up.
    """

    strength: Strength = 1.0
    eps: Eps
    norm: DenseNorm = "linf"
    method: Method = "finite_difference"
    rho: Rho = 0.5
    manifold: Manifold = Field(default_factory=IdentityManifold)
    schedule: Schedule | None = None
    kind: Literal["InputGradient"] = "InputGradient"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        return needs_for(self.method, "clean", "input_gradient", "unit_inputs")

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        slope = gradient_dual_norm(
            cross_entropy(clean.logits, clean.labels), cross_entropy_at(clean), clean.inputs,
            norm=self.norm, step=self.rho * self.eps, manifold=self.manifold, method=self.method,
        )  # fmt: skip
        # A norm is not negative, its finite difference may be: with l(x + hd) < l(x) the loss at x
        # would be rewarded for rising, without end.
        return self.strength * self.eps * slope.clamp_min(0)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MarginBound:
    """strength * softplus(1 - lower bound of the margin in the eps-ball).

    See `flatreg.measures.linearised_margin` for the bound. Costs a backward pass to the inputs and
    one more pass (two with curvature), about 2x a plain step.

    Args:
        strength: factor; the loss is in units of the logits.
        eps: radius in [0,1] pixel units.
        norm: of the ball.
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
        rho: finite-difference step as a share of eps, in (0, 1]; in bfloat16 keep it >= 0.5.
        curvature: subtract the curvature of the margin from the bound.
        schedule: lets strength or ball warm up.
    """

    strength: Strength = 1.0
    eps: Eps
    norm: DenseNorm = "linf"
    method: Method = "finite_difference"
    rho: Rho = 0.5
    curvature: bool = False
    schedule: Schedule | None = None
    kind: Literal["MarginBound"] = "MarginBound"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        return needs_for(self.method, "clean", "input_gradient", "unit_inputs")

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`.

        Raises:
            ValueError: the labels are probabilities: a margin is that of a class.
        """
        clean = passes["clean"]
        labels = class_indices(clean.labels, "MarginBound")
        found = linearised_margin(
            clean.logits_at, clean.inputs, labels, clean.logits, eps=self.eps,
            norm=self.norm, rho=self.rho, curvature=self.curvature, method=self.method,
        )  # fmt: skip
        return self.strength * F.softplus(1 - found.bound)
