"""Penalties: strength times a measure, added to the criterion."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.forward import Forward
from flatreg.measures.input_curvature import (
    LossAt,
    chord,
    gradient_difference,
    normal_direction,
    second_difference,
)
from flatreg.measures.linearised_margin import linearised_margin
from flatreg.measures.manifold import IdentityManifold
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.precision import at_least_float32
from flatreg.terms import CONFIG, Eps, Need, Number, Pass, Passes, Strength


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RelativeFlatness:
    """strength * kappa of the last layer (see `flatreg.relative_flatness`); flattens the loss.

    It bounds the loss near the data and says nothing further out: on its own it does not make a
    model robust. Costs as much as the head.

    Args:
        strength: factor; kappa has the unit of the loss.
        at: on the clean or on the attacked batch.
    """

    strength: Strength
    at: Pass = "clean"
    kind: Literal["RelativeFlatness"] = "RelativeFlatness"

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        return frozenset({self.at, "features"})

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        at = passes[self.at]
        return self.strength * relative_flatness(at.features, at.logits, at.weight)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OffManifoldCurvature:
    """Penalise the curvature of the loss in directions that leave the data manifold.

    The measure is taken at the scale of the ball, so that it has the unit of the loss and one
    strength serves several eps and image sizes; d = eps sign(grad) projected off the manifold:

    - `second_difference`: max(0, |l(x+d) - 2 l(x) + l(x-d) - target| - tolerance). Two passes.
    - `chord`: (l((1-a)x + a x') - (1-a) l(x) - a l(x'))^2, x' uniform in the ball, a uniform in
      (0,1). Two passes, no gradient.
    - `gradient_difference`: ||P(grad l(x+d) - grad l(x))||^2 ||d||^2. Two double backward passes.

    Args:
        strength: factor; positive penalises curvature.
        eps: radius in [0,1] pixel units.
        estimator: see above; the first two take plain forward passes.
        manifold: what counts as off-manifold; by default every direction.
        target: curvature to aim at, for the signed estimator only.
        tolerance: deviation from `target` that costs nothing.
    """

    strength: Strength
    eps: Eps
    estimator: Literal["second_difference", "chord", "gradient_difference"] = "second_difference"
    manifold: IdentityManifold = Field(default_factory=IdentityManifold)
    target: Number = 0.0
    tolerance: Strength = 0.0
    kind: Literal["OffManifoldCurvature"] = "OffManifoldCurvature"

    @model_validator(mode="after")
    def _only_signed_estimators_have_a_target(self) -> OffManifoldCurvature:
        if self.estimator != "second_difference" and (self.target or self.tolerance):
            raise ValueError(
                f"{self.estimator} is squared: target and tolerance need a signed estimator"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        if self.estimator == "chord":
            return frozenset({"clean", "unit_inputs"})
        return frozenset({"clean", "unit_inputs", "input_gradient"})

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        loss_at, loss = _cross_entropy_at(clean), _cross_entropy(clean.logits, clean.labels)
        inputs = clean.inputs.detach()
        if self.estimator == "chord":
            displaced = self._random_displacement(inputs)
            fraction = torch.rand(len(inputs), device=inputs.device)
            return self.strength * chord(loss_at, inputs, displaced, fraction, loss=loss)
        (gradient,) = torch.autograd.grad(loss.sum(), clean.inputs, retain_graph=True)
        step = self._length(gradient, inputs)
        if self.estimator == "gradient_difference":
            value = gradient_difference(loss_at, inputs, step, manifold=self.manifold)
            return self.strength * value * step**4
        n = normal_direction(gradient.sign(), inputs, self.manifold)
        rise = second_difference(loss_at, inputs, n, step, loss=loss) * step**2
        return self.strength * ((rise - self.target).abs() - self.tolerance).clamp_min(0)

    def _length(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """L2 length of eps sign(gradient) projected off the manifold, per sample."""
        normal = self.manifold.split(inputs, self.eps * gradient.sign())[1]
        length = torch.linalg.vector_norm(normal.flatten(1), dim=1)
        return torch.where(length > 0, length, self.eps)

    def _random_displacement(self, inputs: Tensor) -> Tensor:
        """A point of the ball, moved off the manifold only and cut with the box afterwards."""
        noise = self.eps * (2 * torch.rand_like(inputs) - 1)
        normal = self.manifold.split(inputs, noise)[1].clamp(-self.eps, self.eps)
        return (inputs + normal).clamp(0, 1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MarginBound:
    """strength * softplus(1 - lower bound of the margin in the Linf eps-ball).

    See `flatreg.measures.linearised_margin` for the bound. Costs a backward pass to the inputs and
    one more pass (two with curvature), about 2x a plain step.

    Args:
        strength: factor; the loss is in units of the logits.
        eps: radius in [0,1] pixel units.
        rho: finite-difference step as a share of eps, in (0, 1].
        curvature: subtract the curvature of the margin from the bound.
    """

    strength: Strength
    eps: Eps
    rho: Annotated[Number, Field(gt=0, le=1)] = 0.5
    curvature: bool = False
    kind: Literal["MarginBound"] = "MarginBound"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "input_gradient", "unit_inputs"})

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        bound = linearised_margin(
            clean.logits_at, clean.inputs, clean.labels, clean.logits,
            eps=self.eps, rho=self.rho, curvature=self.curvature,
        )  # fmt: skip
        return self.strength * F.softplus(1 - bound)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def _cross_entropy_at(clean: Forward) -> LossAt:
    return lambda inputs: _cross_entropy(clean.logits_at(inputs), clean.labels)


Penalty = Annotated[
    RelativeFlatness | OffManifoldCurvature | MarginBound, Field(discriminator="kind")
]
