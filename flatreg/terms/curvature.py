"""Penalties on how the loss curves in the input, and on confidence, off the data manifold."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.measures.input_curvature import (
    chord,
    fisher,
    gradient_difference,
    normal_direction,
    second_difference,
)
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.measures.relative_flatness import log_relative_flatness, relative_flatness
from flatreg.models.double_backward import differentiable_gradient
from flatreg.models.forward import Forward
from flatreg.models.precision import cross_entropy
from flatreg.terms.input_slope import InBall, cross_entropy_at
from flatreg.terms.protocol import Amount, Forwards, Fraction, Number, Positive, Requirement
from flatreg.threat import per_sample


@configuration
class OffManifoldCurvature(InBall):
    """Penalise the curvature of the loss in directions that leave the data manifold.

    The measure is taken at the scale of the ball, so that it has the unit of the loss or its square
    and one strength serves several eps and image sizes; d = eps sign(grad) off the manifold:

    - `second_difference`: max(0, |l(x+d) - 2 l(x) + l(x-d) - target| - tolerance). Two passes.
    - `chord`: (l((1-a)x + a x') - (1-a) l(x) - a l(x'))^2, x' uniform in the ball, a uniform in
      (0,1). Two passes, no gradient.
    - `elle`: the same with both ends uniform in the ball, as published. Three passes.
    - `gradient_difference`: ||P(grad l(x+d) - grad l(x))||^2 ||d||^2, the penalty of CURE. Two
      double backward passes, one of them the clean pass.
    - `fisher`: eps^2 Tr(P G P), G the Gauss-Newton curvature, by one random probe: the mean of
      d^T G d over random signs. Reads no label; a double backward through the clean pass.

    Args:
        estimator: see above; `second_difference`, `chord` and `elle` take plain forward passes.
        manifold: what counts as off-manifold; by default every direction.
        target: curvature to aim at, for the signed estimator only.
        tolerance: deviation from `target` that costs nothing.
        fraction: share of the batch, drawn at random, that the penalty is taken on. A share takes
            one more pass, of its own.
        strength, eps, schedule: as in `InBall`.
    """

    estimator: Literal["second_difference", "chord", "elle", "gradient_difference", "fisher"] = (
        "second_difference"
    )
    manifold: Manifold = Field(default_factory=IdentityManifold)
    target: Number = 0.0
    tolerance: Amount = 0.0
    fraction: Fraction = 1.0
    kind: Literal["OffManifoldCurvature"] = "OffManifoldCurvature"
    wants_smooth_activations: ClassVar[bool] = True
    forward_only: ClassVar[str] = "estimator='second_difference' or 'chord'"

    @model_validator(mode="after")
    def _settings_fit_the_estimator(self) -> OffManifoldCurvature:
        if self.estimator != "second_difference" and (self.target or self.tolerance):
            raise ValueError(
                f"{self.estimator} is squared: target and tolerance need a signed estimator"
            )
        if self.estimator == "fisher" and self.fraction < 1:
            raise ValueError("fisher shares the clean pass: a fraction of the batch saves nothing")
        return self

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        requires: set[Requirement] = {"clean", "unit_inputs"}
        if self.estimator not in ("chord", "elle"):
            requires.add("input_gradient")
        if self.estimator in ("fisher", "gradient_difference"):
            requires.add("double_backward")
        return frozenset(requires)

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        if self.estimator == "fisher":
            trace = fisher(clean.logits, clean.inputs, manifold=self.manifold)
            return self.strength * self.eps**2 * trace
        size = len(clean.labels)
        count = max(1, round(self.fraction * size))
        if count == size:
            return self.strength * self._measure(clean)
        rows = torch.randperm(size, device=clean.labels.device)[:count]
        # A part of a batch passes in another way than within the batch, with BatchNorm and with
        # dropout: it is compared with a pass of the same part.
        value = self._measure(clean.of_rows(rows)) * (size / count)
        return self.strength * value.new_zeros(size).index_copy(0, rows, value)

    def _measure(self, clean: Forward) -> Tensor:
        loss_at, loss = cross_entropy_at(clean), cross_entropy(clean.logits, clean.labels)
        inputs = clean.inputs.detach()
        if self.estimator in ("chord", "elle"):
            between = torch.rand(len(inputs), device=inputs.device)
            far = self._random_displacement(inputs)
            if self.estimator == "chord":
                return chord(loss_at, inputs, far, between, loss=loss)
            return chord(loss_at, self._random_displacement(inputs), far, between)
        if self.estimator == "gradient_difference":
            gradient = differentiable_gradient(
                loss, clean.inputs, what=self.estimator, alternative=self.forward_only
            )
            step = self._length(gradient.detach(), inputs)
            return step**4 * gradient_difference(
                loss_at, inputs, step, manifold=self.manifold, gradient=gradient
            )
        (gradient,) = torch.autograd.grad(loss.sum(), clean.inputs, retain_graph=True)
        step = self._length(gradient, inputs)
        n = normal_direction(gradient.sign(), inputs, self.manifold)
        bend = second_difference(loss_at, inputs, n, step, loss=loss)
        return ((bend * step**2 - self.target).abs() - self.tolerance).clamp_min(0)

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


@configuration
class OffManifoldConfidence(InBall):
    """Penalise confident flatness further off the manifold than the ball reaches.

    strength * max(0, log kappa_0 - log kappa(x')), x' = x displaced by `distance` eps in a random
    off-manifold direction. A model that is flat out there is confident out there, and wrong; the
    logarithm has a gradient where the softmax saturates (kappa itself has none). Without unit.
    Costs one pass.

    Args:
        distance: of the displaced points (largest pixel), in units of eps; above 1.
        floor: kappa_0; left out, the mean kappa of the clean batch, so that a model is asked to be
            no flatter off the data than on it.
        manifold: what counts as off-manifold; by default every direction.
        strength, eps, schedule: as in `InBall`.
    """

    distance: Annotated[Number, Field(gt=1)] = 2.0
    floor: Positive | None = None
    manifold: Manifold = Field(default_factory=IdentityManifold)
    kind: Literal["OffManifoldConfidence"] = "OffManifoldConfidence"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean", "features", "unit_inputs"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        inputs = clean.inputs.detach()
        normal = self.manifold.split(inputs, torch.randn_like(inputs).sign())[1]
        largest = normal.flatten(1).abs().amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
        reach = per_sample(self.distance * self.eps / largest, inputs)
        away = clean.at((inputs + reach * normal).clamp(0, 1))
        log_kappa = log_relative_flatness(away.features, away.logits, away.weight)
        return self.strength * (self._log_floor(clean) - log_kappa).clamp_min(0)

    def _log_floor(self, clean: Forward) -> float | Tensor:
        if self.floor is not None:
            return math.log(self.floor)
        with torch.no_grad():
            kappa = relative_flatness(clean.features, clean.logits, clean.weight).mean()
        return kappa.clamp_min(torch.finfo(kappa.dtype).tiny).log()
