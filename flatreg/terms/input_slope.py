"""Penalties on how loss, margin and logits change with the input, to first order."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.measures.input_curvature import LossAt
from flatreg.measures.input_gradient import (
    grad_alignment,
    gradient_dual_norm,
    jacobian_norm,
    jacobian_norm_forward,
    local_linearity,
)
from flatreg.measures.linearised_margin import linearised_margin
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import Method
from flatreg.models.forward import Forward
from flatreg.models.precision import as_targets, cross_entropy
from flatreg.terms.protocol import (
    Amount,
    Count,
    Eps,
    Forwards,
    Fraction,
    Requirement,
    Schedule,
    requirements_for,
)
from flatreg.threat import DenseNorm, per_sample, project


def cross_entropy_at(clean: Forward) -> Callable[[Tensor], Tensor]:
    """Map other inputs of the same labels to their loss, by auxiliary passes."""
    return lambda inputs: cross_entropy(clean.logits_at(inputs), clean.labels)


@configuration
class InBall:
    """Settings of the penalties that are measured at the scale of an eps-ball.

    Args:
        strength: factor of the measure.
        eps: radius of the ball in [0,1] pixel units.
        schedule: lets strength or ball warm up.
    """

    strength: Amount = 1.0
    eps: Eps
    schedule: Schedule | None = None


@configuration
class FirstOrder(InBall):
    """Settings of the penalties that can do without a second derivative.

    Args:
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
    """

    method: Method = "finite_difference"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        return requirements_for(self.method, "clean", "input_gradient", "unit_inputs")


@configuration
class OfNorm:
    """The norm of a ball; a base that comes last puts it before eps, whose range depends on it.

    Args:
        norm: of the ball, `"linf"` or `"l2"`.
    """

    norm: DenseNorm = "linf"


@configuration
class InputGradient(FirstOrder, OfNorm):
    """strength * eps ||P grad l||_*: how far the loss rises in the ball, to first order.

    ||.||_* is the dual norm (L1 for the Linf ball), P projects off the data manifold. By default a
    finite difference along the detached steepest direction (Finlay and Oberman, "Scaleable input
    gradient regularization", 2021). In the unit of the loss. Costs a backward pass to the inputs
    and one more pass, about 2x a plain step.

    Args:
        step: of the finite difference, as a share of eps, in (0, 1]; in bfloat16 keep it >= 0.5.
        manifold: what counts as off-manifold; by default every direction.
        norm, strength, eps, schedule, method: as in `OfNorm`, `InBall` and `FirstOrder`.
    """

    step: Fraction = 0.5
    manifold: Manifold = Field(default_factory=IdentityManifold)
    kind: Literal["InputGradient"] = "InputGradient"

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        slope = gradient_dual_norm(
            cross_entropy(clean.logits, clean.labels),
            cross_entropy_at(clean),
            clean.inputs,
            norm=self.norm,
            step=self.step * self.eps,
            manifold=self.manifold,
            method=self.method,
        )
        # A norm is not negative, its finite difference may be: with l(x + hd) < l(x) the loss at x
        # would be rewarded for rising, without end.
        return self.strength * self.eps * slope.clamp_min(0)


@configuration
class MarginBound(FirstOrder, OfNorm):
    """strength * softplus(1 - lower bound of the margin in the eps-ball).

    See `flatreg.measures.linearised_margin` for the bound. In units of the logits. Costs a backward
    pass to the inputs and one more pass (two with curvature), about 2x a plain step. Of mixed
    labels the margin is that of the classes they are of; label smoothing leaves it as it is. In
    long training the network can learn to curve beyond the step: watch accuracy under an attack of
    several steps, and keep the best epoch.

    Args:
        step: of the finite difference, as a share of eps, in (0, 1]; in bfloat16 keep it >= 0.5.
        subtract_curvature: take the bound to second order.
        norm, strength, eps, schedule, method: as in `OfNorm`, `InBall` and `FirstOrder`.
    """

    step: Fraction = 0.5
    subtract_curvature: bool = False
    kind: Literal["MarginBound"] = "MarginBound"

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        reads: tuple[Requirement, ...] = ("clean", "input_gradient", "unit_inputs")
        return requirements_for(self.method, *reads, third=self.subtract_curvature)

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        found = linearised_margin(
            clean.logits_at,
            clean.inputs,
            as_targets(clean.labels, clean.logits, read=False),
            clean.logits,
            eps=self.eps,
            norm=self.norm,
            step=self.step,
            subtract_curvature=self.subtract_curvature,
            method=self.method,
        )
        return self.strength * F.softplus(1 - found.bound)


@configuration
class GradAlign(InBall):
    """strength * (1 - cos(grad l(x), grad l(x + n))), n uniform in the Linf ball.

    Added to single-step adversarial training it prevents catastrophic overfitting. Without unit.
    Two double backward passes; no forward-only form is published. Andriushchenko and Flammarion,
    NeurIPS 2020.

    Args:
        strength, eps, schedule: as in `InBall`.
    """

    kind: Literal["GradAlign"] = "GradAlign"
    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {"clean", "unit_inputs", "double_backward"}
    )
    forward_only: ClassVar[str] = "OffManifoldCurvature(estimator='chord')"

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        inputs = clean.inputs.detach()
        noisy = (inputs + self.eps * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)
        return self.strength * grad_alignment(cross_entropy_at(clean), inputs, noisy)


@configuration
class LocalLinearity(FirstOrder):
    r"""strength * |l(x+delta) - l(x) - <delta, grad l(x)>| at the delta of the ball that widens it.

    LLR, Qin et al., "Adversarial Robustness through Local Linearization", NeurIPS 2019; delta is
    found by `steps` signed gradient steps from a random start, one pass each. The paper adds a
    multiple of |<delta, grad l(x)>|: here that is `InputGradient`. In the unit of the loss.

    Args:
        steps: of the search for delta in the Linf ball.
        strength, eps, schedule, method: as in `InBall` and `FirstOrder`.
    """

    steps: Count = 2
    kind: Literal["LocalLinearity"] = "LocalLinearity"

    def __call__(self, passes: Forwards) -> Tensor:
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


@configuration
class JacobianNorm(FirstOrder):
    """strength * eps^2 ||dz/dx||_F^2: how far the logits move for noise of size eps, squared.

    Hoffman, Roberts and Yaida, "Robust Learning with Jacobian Regularization", 2019, by one random
    projection. The default displaces the input along random noise instead: plain passes only. In
    squared units of the logits.

    Args:
        strength, eps, schedule, method: as in `InBall` and `FirstOrder`.
    """

    kind: Literal["JacobianNorm"] = "JacobianNorm"

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        exact: tuple[Requirement, ...] = (
            ("input_gradient",) if self.method == "double_backward" else ()
        )
        return requirements_for(self.method, "clean", "unit_inputs", *exact)

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        clean = passes["clean"]
        if self.method == "double_backward":
            squared = jacobian_norm(clean.logits, clean.inputs)
        else:
            length = self.eps * clean.inputs[0].numel() ** 0.5  # of noise of size eps
            squared = jacobian_norm_forward(clean.logits_at, clean.inputs, clean.logits, length)
        return self.strength * self.eps**2 * squared
