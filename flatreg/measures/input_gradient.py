r"""First-order behaviour of the loss, the margin and the logits in the input, per sample.

| measure               | unit                         | differentiable through                |
|-----------------------|------------------------------|---------------------------------------|
| `gradient_dual_norm`  | values per input unit        | forward passes or double backward     |
| `local_linearity`     | values                       | forward passes or double backward     |
| `grad_alignment`      | 1 - cosine, in [0, 2]        | double backward                       |
| `jacobian_norm`       | squared logits per unit^2    | double backward                       |
| `jacobian_norm_forward` | squared logits per unit^2  | forward passes                        |

Forward passes: two are compared, and both must see the same network, so run them without dropout.
Double backward: a pass handed over must have been run within
`flatreg.models.double_backward.twice_differentiable`; operators without a second derivative
(hardsigmoid) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatreg.data.configuration import number, whole
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import (
    Method,
    check_method,
    differentiable_gradient,
    twice_differentiable,
)
from flatreg.models.precision import at_least_float32
from flatreg.threat import DenseNorm, dual_length, per_sample, steepest_direction, unit_length

ValuesAt = Callable[[Tensor], Tensor]


def check_per_sample(values: Tensor, size: int) -> Tensor:
    """Values per sample `(size,)`, as they came.

    Raises:
        ValueError: they have another shape; the mean of a loss would count for each of its samples.
    """
    if values.shape != (size,):
        raise ValueError(
            f"expected a function of the inputs with a value per sample ({size},), got shape "
            f'{tuple(values.shape)}: a loss has reduction="none"'
        )
    return values


def positive(name: str, value: float | Tensor, below: float = math.inf) -> float | Tensor:
    """The value, if between 0 and a limit; a tensor is trusted, as a look would wait for it.

    Raises:
        ValueError: it is not.
    """
    return value if isinstance(value, Tensor) else number(name, value, f"(0, {below:g})")


def values_of(values_at: ValuesAt, points: Tensor) -> Tensor:
    """Values at `points`, as `check_per_sample` has them."""
    return check_per_sample(values_at(points), len(points))


def gradient_at(values_at: ValuesAt, inputs: Tensor, *, what: str, alternative: str) -> Tensor:
    """Differentiable gradient of values per sample at `inputs`, from a pass of its own."""
    with twice_differentiable():
        points = inputs.detach().requires_grad_()
        return differentiable_gradient(
            values_of(values_at, points), points, what=what, alternative=alternative
        )


def gradient_dual_norm(
    values: Tensor,
    values_at: ValuesAt,
    inputs: Tensor,
    *,
    norm: DenseNorm = "linf",
    step: float | Tensor,
    manifold: Manifold | None = None,
    method: Method = "finite_difference",
) -> Tensor:
    r"""Dual norm of the off-manifold gradient, :math:`\|P \nabla v\|_*`.

    .. math:: \|P \nabla v(x)\|_* = \langle \nabla v, P d \rangle
              \approx (v(x + h P d) - v(x)) / h, \qquad
              d = \operatorname{argmax}_{\|d\| \le 1} \langle P \nabla v, d \rangle

    Finite difference along the detached direction: Finlay and Oberman, "Scaleable input gradient
    regularization for adversarial robustness", 2021. One backward pass to the inputs finds d, one
    forward pass gives the value. Double backward: Drucker and LeCun, 1992.

    Args:
        values: v at `inputs` `(batch,)`, a loss or a margin, with its graph.
        values_at: inputs to v; for a finite difference only.
        inputs: x `(batch, ...)`, requiring grad and in the graph of `values`.
        norm: norm of the ball; "linf" gives the L1 norm of the gradient, "l2" its L2 norm.
        step: h in units of the norm, scalar or `(batch,)`; for a finite difference only.
        manifold: left out, every direction is off-manifold.
        method: "double_backward" takes the norm of the gradient itself.

    Returns:
        `(batch,)`, value per input unit. The finite difference is signed: it tends to the norm from
        above for convex v.

    Raises:
        ValueError: an unknown method or norm, a step that is not above 0, or an operator without a
            second derivative.
    """
    check_method(method)
    check_per_sample(values, len(inputs))
    manifold = manifold or IdentityManifold()
    if method == "double_backward":
        gradient = differentiable_gradient(values, inputs, what="gradient_dual_norm")
        normal = at_least_float32(manifold.split(inputs, gradient)[1])
        return dual_length(normal, norm)
    (gradient,) = torch.autograd.grad(values.sum(), inputs, retain_graph=True)
    d = steepest_direction(manifold.split(inputs, gradient)[1], norm)
    d = manifold.split(inputs, d)[1]  # sign(P g) leaves the normal space, and <g, P d> = <P g, d>
    h = per_sample(positive("step", step), inputs)
    ahead = values_of(values_at, inputs.detach() + h * d)
    return (at_least_float32(ahead) - at_least_float32(values)) / h.flatten()


def grad_alignment(loss_at: ValuesAt, inputs: Tensor, displaced: Tensor) -> Tensor:
    r"""Misalignment of two input gradients, :math:`1 - \cos(\nabla\ell(x), \nabla\ell(x'))`.

    GradAlign (Andriushchenko and Flammarion, NeurIPS 2020), where x' is uniform in the ball. Does
    not depend on the scale of the loss. Two double backward passes.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        displaced: x' `(batch, ...)`.

    Returns:
        `(batch,)` in [0, 2]; 0 where the loss is affine, and where a gradient is zero.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    one, other = (
        _unit(gradient_at(loss_at, points, what="grad_alignment", alternative="chord"))
        for points in (inputs, displaced)
    )
    defined = (one.detach().any(1)) & (other.detach().any(1))
    return torch.where(defined, 1 - (one * other).sum(1), 0)


def _unit(vectors: Tensor) -> Tensor:
    """Flat vectors of unit length, zero where they are, in float32 at least."""
    return unit_length(at_least_float32(vectors).flatten(1))


def local_linearity(
    loss_at: ValuesAt,
    inputs: Tensor,
    displaced: Tensor,
    *,
    method: Method = "finite_difference",
    step: float = 0.1,
    loss: Tensor | None = None,
) -> Tensor:
    r"""Distance of the loss from its linearisation at x.

    .. math:: |\ell(x+\delta) - \ell(x) - \langle \delta, \nabla\ell(x) \rangle|
              \approx \tfrac12 |\delta^T H \delta|, \qquad \delta = x' - x

    Local linearity regularisation (Qin et al., NeurIPS 2019). The forward-only form has
    :math:`(\ell(x + h\delta) - \ell(x)) / h` for the slope, and with it a share 1 - h of the
    value on a quadratic.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        displaced: x' `(batch, ...)`, as an attack on this very measure or on the loss found it.
        method: "finite_difference" takes two passes, three without `loss`.
        step: h in (0, 1), share of the displacement; for a finite difference only.
        loss: loss at `inputs` `(batch,)` if known already; for a finite difference only.

    Returns:
        `(batch,)`, in units of the loss.

    Raises:
        ValueError: an unknown method, a step outside (0, 1), or an operator without a second
            derivative.
    """
    check_method(method)
    inputs, delta = inputs.detach(), (displaced - inputs).detach()
    if method == "double_backward":
        with twice_differentiable():
            points = inputs.requires_grad_()
            start = values_of(loss_at, points)
            gradient = differentiable_gradient(start, points, what="local_linearity")
        rise = (gradient * delta).flatten(1).sum(1)
    else:
        step = number("step", step, "(0, 1)")
        start = at_least_float32(values_of(loss_at, inputs) if loss is None else loss)
        rise = (at_least_float32(values_of(loss_at, inputs + step * delta)) - start) / step
    return (at_least_float32(values_of(loss_at, inputs + delta)) - start - rise).abs()


def jacobian_norm(
    logits: Tensor, inputs: Tensor, *, num_probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    r"""Squared Frobenius norm of the logits' Jacobian, by random projections.

    .. math:: \|J\|_F^2 = K \, E \|J^T v\|^2, \qquad v \text{ uniform on the sphere in } R^K

    Hoffman, Roberts, Yaida, "Robust learning with Jacobian regularization", 2019. Reuses a pass;
    each probe is one double backward pass.

    Args:
        logits: at `inputs` `(batch, classes)`, with their graph.
        inputs: x `(batch, ...)`, requiring grad and in the graph of `logits`.
        num_probes: projections to average.
        generator: of the projections, on the device of `logits`; by default torch's own.

    Returns:
        `(batch,)`, squared logits per squared input unit; unbiased.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    total = torch.zeros_like(logits[:, 0], dtype=torch.promote_types(logits.dtype, torch.float32))
    num_probes = whole("num_probes", num_probes, 1)
    for _ in range(num_probes):
        v = _unit(torch.randn(logits.shape, generator=generator, device=logits.device).to(total))
        pulled = differentiable_gradient(
            logits, inputs, v, what="jacobian_norm", alternative="jacobian_norm_forward"
        )
        total = total + at_least_float32(pulled).flatten(1).square().sum(1)
    return total * logits.shape[1] / num_probes


def jacobian_norm_forward(
    logits_at: Callable[[Tensor], Tensor],
    inputs: Tensor,
    logits: Tensor,
    step: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Squared Frobenius norm of the logits' Jacobian, from one more forward pass.

    .. math:: \|J\|_F^2 = D \, E \|J n\|^2, \qquad J n \approx (z(x + h n) - z(x)) / h,
              \qquad n \text{ uniform on the sphere in } R^D

    Args:
        logits_at: inputs to logits.
        inputs: x `(batch, ...)` of D numbers each.
        logits: at `inputs` `(batch, classes)`.
        step: h, L2 length in input units; scalar or `(batch,)`.
        generator: of the direction, on the device of `inputs`; by default torch's own.

    Returns:
        `(batch,)`, squared logits per squared input unit; unbiased as h -> 0.
    """
    x = inputs.detach()
    noise = torch.randn(x.shape, generator=generator, device=x.device).to(x)
    n = _unit(noise).reshape(x.shape).to(x)
    h = per_sample(step, x)
    change = at_least_float32(logits_at(x + h * n)) - at_least_float32(logits)
    return change.square().sum(1) / h.flatten().square() * x[0].numel()
