r"""Curvature of the loss in the input, per sample, along directions of the caller's choice.

| estimator             | unit                          | differentiable through        |
|-----------------------|-------------------------------|-------------------------------|
| `second_difference`   | :math:`n^T H n`, signed       | forward passes                |
| `chord`               | squared curvature x radius^4  | forward passes                |
| `gradient_difference` | squared curvature             | double backward               |

H is the Hessian of the loss in the input. Every function takes `loss_at`, which maps inputs
`(batch, ...)` to a loss per sample `(batch,)`; for curvature in training it must move no BatchNorm
statistics (`Forward.logits_at` does not). Finite differences are taken in float32 at least, of
losses that must not come from half precision at a small step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatreg.double_backward import refuse_missing_derivatives, twice_differentiable
from flatreg.measures.manifold import IdentityManifold
from flatreg.threat import per_sample

LossAt = Callable[[Tensor], Tensor]


def normal_direction(
    vectors: Tensor, inputs: Tensor, manifold: IdentityManifold | None = None
) -> Tensor:
    """Off-manifold part of `vectors` at `inputs`, of unit L2 length; zero where it is zero."""
    normal = (manifold or IdentityManifold()).split(inputs, vectors)[1]
    length = torch.linalg.vector_norm(normal.flatten(1), dim=1)
    return normal / per_sample(torch.where(length > 0, length, 1), normal)


def second_difference(
    loss_at: LossAt,
    inputs: Tensor,
    direction: Tensor,
    step: float | Tensor,
    *,
    loss: Tensor | None = None,
) -> Tensor:
    r"""Signed curvature :math:`(\ell(x+hn) - 2\ell(x) + \ell(x-hn)) / h^2 \to n^T H n`.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        direction: n, of unit L2 length per sample (see `normal_direction`), a constant.
        step: h, L2 length in input units; scalar or `(batch,)`.
        loss: loss at `inputs` `(batch,)` if known already; saves one of three passes.

    Returns:
        `(batch,)`, positive where the loss is convex along n; loss per squared input unit.
    """
    h = per_sample(step, inputs)
    middle = loss_at(inputs) if loss is None else loss
    rise = loss_at(inputs + h * direction) - 2 * middle + loss_at(inputs - h * direction)
    return rise / h.flatten().square()


def chord(
    loss_at: LossAt,
    inputs: Tensor,
    displaced: Tensor,
    fraction: float | Tensor,
    *,
    loss: Tensor | None = None,
) -> Tensor:
    r"""Squared gap between the loss and its chord.

    .. math:: (\ell((1-a)x + a x') - (1-a)\ell(x) - a\ell(x'))^2
              \approx (a(1-a)/2)^2 (\delta^T H \delta)^2, \qquad \delta = x' - x

    After ELLE (Abad Rocamora et al., ICLR 2024), with the clean image as one end to save a pass.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        displaced: x' `(batch, ...)`, inside the eps-ball and the box.
        fraction: a in (0, 1), scalar or `(batch,)`.
        loss: loss at `inputs` `(batch,)` if known already; saves one of three passes.

    Returns:
        `(batch,)`, squared loss; zero exactly where the loss is affine along the chord.
    """
    a = per_sample(fraction, inputs)
    start = loss_at(inputs) if loss is None else loss
    between = loss_at((1 - a) * inputs + a * displaced)
    a = a.flatten()
    return (between - (1 - a) * start - a * loss_at(displaced)).square()


def gradient_difference(
    loss_at: LossAt,
    inputs: Tensor,
    step: float | Tensor,
    *,
    manifold: IdentityManifold | None = None,
) -> Tensor:
    r"""Squared curvature :math:`\|P(\nabla\ell(x+hn) - \nabla\ell(x))\|^2 / h^2`.

    n = P sign(g) / ||P sign(g)||, zero where the gradient g is; P projects off the manifold. CURE
    (Moosavi-Dezfooli et al., CVPR 2019). Differentiable by **double backward**: the passes run
    under math attention, and operators without a second derivative (hardsigmoid) are refused.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        step: h, L2 length in input units; scalar or `(batch,)`.
        manifold: left out, every direction is off-manifold.

    Returns:
        `(batch,)`, tends to ||P H n||^2 as h -> 0.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    manifold = manifold or IdentityManifold()
    with twice_differentiable():
        gradient = _input_gradient(loss_at, inputs)
        refuse_missing_derivatives(gradient, "gradient_difference", "second_difference or chord")
        n = normal_direction(gradient.detach().sign(), inputs, manifold)
        h = per_sample(step, inputs)
        change = _input_gradient(loss_at, inputs + h * n) - gradient
    normal = manifold.split(inputs, change)[1]
    return normal.flatten(1).square().sum(1) / h.flatten().square()


def _input_gradient(loss_at: LossAt, inputs: Tensor) -> Tensor:
    """Gradient of the loss at `inputs`, itself part of the graph."""
    points = inputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(points).sum(), points, create_graph=True)
    return gradient
