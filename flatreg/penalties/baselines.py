"""Published regularisers of local linearity, to compare with at equal time.

Two more are estimators of `OffManifoldCurvature`: ELLE is `elle`, CURE is `gradient_difference`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.double_backward import Method
from flatreg.measures.input_curvature import LossAt
from flatreg.measures.input_gradient import (
    grad_alignment,
    jacobian_norm,
    jacobian_norm_forward,
    local_linearity,
)
from flatreg.penalties.losses import cross_entropy_at
from flatreg.precision import cross_entropy
from flatreg.terms import CONFIG, Count, Eps, Need, Passes, Schedule, Strength, needs_for
from flatreg.threat import per_sample, project


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GradAlign:
    """strength * (1 - cos(grad l(x), grad l(x + n))), n uniform in the Linf ball.

    Added to single-step adversarial training it prevents catastrophic overfitting. Andriushchenko
    and Flammarion, NeurIPS 2020. Two double backward passes; no forward-only form is published.

    Args:
        strength: factor; the measure has no unit.
        eps: radius in [0,1] pixel units.
        schedule: lets strength or ball warm up.
    """

    strength: Strength = 1.0
    eps: Eps
    schedule: Schedule | None = None
    kind: Literal["GradAlign"] = "GradAlign"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "unit_inputs", "double_backward"})
    forward_only: ClassVar[str] = "OffManifoldCurvature(estimator='chord')"

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        inputs = clean.inputs.detach()
        noisy = (inputs + self.eps * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)
        return self.strength * grad_alignment(cross_entropy_at(clean), inputs, noisy)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LocalLinearity:
    r"""strength * |l(x+delta) - l(x) - <delta, grad l(x)>| at the delta of the ball that widens it.

    LLR, Qin et al., "Adversarial Robustness through Local Linearization", NeurIPS 2019; delta is
    found by `steps` signed gradient steps from a random start, one pass each. The paper adds a
    multiple of |<delta, grad l(x)>|: here that is `InputGradient`.

    Args:
        strength: factor; the measure has the unit of the loss.
        eps: radius of the Linf ball in [0,1] pixel units.
        steps: of the search for delta.
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
        schedule: lets strength or ball warm up.
    """

    strength: Strength = 1.0
    eps: Eps
    steps: Count = 2
    method: Method = "finite_difference"
    schedule: Schedule | None = None
    kind: Literal["LocalLinearity"] = "LocalLinearity"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        return needs_for(self.method, "clean", "input_gradient", "unit_inputs")

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        loss, loss_at = cross_entropy(clean.logits, clean.labels), cross_entropy_at(clean)
        (gradient,) = torch.autograd.grad(loss.sum(), clean.inputs, retain_graph=True)
        inputs = clean.inputs.detach()
        displaced = self._widest_gap(inputs, gradient, loss.detach(), loss_at)
        return self.strength * local_linearity(
            loss_at, inputs, displaced, method=self.method, loss=loss
        )

    def _widest_gap(
        self, inputs: Tensor, gradient: Tensor, loss: Tensor, loss_at: LossAt
    ) -> Tensor:
        """Climb the gap from a random point of the ball."""
        eps = per_sample(self.eps, inputs)
        point = project(inputs + eps * (2 * torch.rand_like(inputs) - 1), inputs, eps, "linf")
        for _ in range(self.steps):
            point.requires_grad_()
            here = loss_at(point)
            (slope,) = torch.autograd.grad(here.sum(), point)
            point = point.detach()
            gap = here.detach() - loss - ((point - inputs) * gradient).flatten(1).sum(1)
            uphill = per_sample(gap.sign(), inputs) * (slope - gradient).sign()
            point = project(point + eps / 2 * uphill, inputs, eps, "linf")
        return point


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class JacobianNorm:
    """strength * eps^2 ||dz/dx||_F^2: how far the logits move for noise of size eps, squared.

    Hoffman, Roberts and Yaida, "Robust Learning with Jacobian Regularization", 2019, by one random
    projection. The default displaces the input along random noise instead: plain passes only.

    Args:
        strength: factor; the measure is in squared units of the logits.
        eps: radius in [0,1] pixel units.
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
        schedule: lets strength or ball warm up.
    """

    strength: Strength = 1.0
    eps: Eps
    method: Method = "finite_difference"
    schedule: Schedule | None = None
    kind: Literal["JacobianNorm"] = "JacobianNorm"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""
        return needs_for(self.method, "clean", "input_gradient", "unit_inputs")

    def __call__(self, passes: Passes) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        if self.method == "double_backward":
            squared = jacobian_norm(clean.logits, clean.inputs)
        else:
            length = self.eps * clean.inputs[0].numel() ** 0.5  # of noise of size eps
            squared = jacobian_norm_forward(clean.logits_at, clean.inputs, clean.logits, length)
        return self.strength * self.eps**2 * squared
