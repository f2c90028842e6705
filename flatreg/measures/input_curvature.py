r"""Curvature of the loss in the input, per sample, along directions of the caller's choice.

| estimator             | unit                          | differentiable through        |
|-----------------------|-------------------------------|-------------------------------|
| `second_difference`   | :math:`n^T H n`, signed       | forward passes                |
| `chord`               | squared curvature x radius^4  | forward passes                |
| `gradient_difference` | squared curvature             | double backward               |
| `fisher`              | :math:`Tr(P G P)`, >= 0       | double backward               |

H is the Hessian of the loss in the input, G its Gauss-Newton part, P the projector off the
manifold. `loss_at` maps inputs `(batch, ...)` to a loss per sample `(batch,)` and must move no
BatchNorm statistics in training (`Forward.logits_at` does not). Losses in half precision are too
coarse for a small step. A double backward runs its own passes under math attention and refuses
operators without a second derivative (hardsigmoid). Exact counterparts: `input_hessian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from flatreg.data.configuration import whole
from flatreg.measures.input_gradient import gradient_at, positive, values_of
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import differentiable_gradient
from flatreg.models.precision import at_least_float32
from flatreg.threat import per_sample, unit_length

LossAt = Callable[[Tensor], Tensor]
FORWARD_ONLY = "second_difference or chord"


def normal_direction(vectors: Tensor, inputs: Tensor, manifold: Manifold | None = None) -> Tensor:
    """Off-manifold part of `vectors` at `inputs`, of unit L2 length; zero where it is zero."""
    return unit_length((manifold or IdentityManifold()).split(inputs, vectors)[1])


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

    Raises:
        ValueError: a step that is not above 0.
    """
    h = per_sample(positive("step", step, math.inf), inputs)
    middle = values_of(loss_at, inputs) if loss is None else loss
    ahead, behind = (values_of(loss_at, inputs + side * h * direction) for side in (1, -1))
    rise = ahead - 2 * middle + behind
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

    Raises:
        ValueError: a fraction outside (0, 1).
    """
    a = per_sample(positive("fraction", fraction, 1), inputs)
    start = values_of(loss_at, inputs) if loss is None else loss
    between = values_of(loss_at, (1 - a) * inputs + a * displaced)
    a = a.flatten()
    return (between - (1 - a) * start - a * values_of(loss_at, displaced)).square()


def gradient_difference(
    loss_at: LossAt,
    inputs: Tensor,
    step: float | Tensor,
    *,
    manifold: Manifold | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    r"""Squared curvature :math:`\|P(\nabla\ell(x+hn) - \nabla\ell(x))\|^2 / h^2`.

    n = P sign(g) / ||P sign(g)||, zero where the gradient g is; P projects off the manifold. CURE
    (Moosavi-Dezfooli et al., CVPR 2019). Differentiable by **double backward**.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        step: h, L2 length in input units; scalar or `(batch,)`.
        manifold: left out, every direction is off-manifold.
        gradient: of the loss at `inputs`, with its graph, if known already (from
            `differentiable_gradient`); saves one of two passes.

    Returns:
        `(batch,)`, tends to ||P H n||^2 as h -> 0.

    Raises:
        ValueError: a step that is not above 0; an operator without a second derivative.
    """
    manifold = manifold or IdentityManifold()
    names = {"what": "gradient_difference", "alternative": FORWARD_ONLY}
    if gradient is None:
        gradient = gradient_at(loss_at, inputs, **names)
    n = normal_direction(gradient.detach().sign(), inputs, manifold)
    h = per_sample(positive("step", step, math.inf), inputs)
    ahead = gradient_at(loss_at, inputs + h * n, **names)
    normal = manifold.split(inputs, ahead - gradient)[1]
    return normal.flatten(1).square().sum(1) / h.flatten().square()


def fisher(
    logits: Tensor,
    inputs: Tensor,
    *,
    manifold: Manifold | None = None,
    num_probes: int = 1,
    signs: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Trace of the Gauss-Newton curvature off the manifold, by random signs.

    .. math:: Tr(P G P) = E \|P J^T a\|^2, \qquad G = J^T (diag(p) - p p^T) J, \qquad
              a = \sqrt p \odot \xi - p \langle \sqrt p, \xi \rangle

    J is the Jacobian of the logits in the input, p the softmax, :math:`\xi` random signs. G is
    the curvature of cross-entropy without the curvature of the network: never negative, and free
    of the label as relative flatness is. As E a a^T = diag(p) - p p^T for every p, the gradient is
    unbiased too; the Fisher form with sampled labels (Martens 2020) loses the part of it
    through p. Reuses a pass; each probe is one **double backward** pass.

    Args:
        logits: at `inputs` `(batch, classes)`, with their graph; run the pass within
            `flatreg.models.double_backward.twice_differentiable` when the model has attention.
        inputs: x `(batch, ...)`, requiring grad and in the graph of `logits`.
        manifold: left out, every direction is off-manifold.
        num_probes: sign vectors to average.
        signs: sign vectors to use instead of random ones, `(num_probes, batch, classes)`.
        generator: of the signs, on the device of `logits`; by default torch's own.

    Returns:
        `(batch,)`, loss per squared input unit; unbiased, 0 only where G vanishes.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    manifold = manifold or IdentityManifold()
    if signs is None:
        shape = (whole("num_probes", num_probes, 1), *logits.shape)
        signs = torch.randint(2, shape, generator=generator, device=logits.device) * 2 - 1
    traces = []
    for a in fisher_cotangents(logits, signs):
        pulled = differentiable_gradient(logits, inputs, a, what="fisher", alternative=FORWARD_ONLY)
        normal = at_least_float32(manifold.split(inputs, pulled)[1])
        traces.append(normal.flatten(1).square().sum(1))
    return torch.stack(traces).mean(0)


def fisher_cotangents(logits: Tensor, signs: Iterable[Tensor]) -> Iterator[Tensor]:
    r"""Vectors a in logit space with :math:`E\, a a^T = diag(p) - p p^T`, p the softmax.

    .. math:: a = \sqrt p \odot \xi - p \langle \sqrt p, \xi \rangle

    Args:
        logits: `(batch, classes)`; a keeps their graph.
        signs: random signs :math:`\xi` `(batch, classes)`, one for each a.

    Yields:
        `(batch, classes)`, in float32 at least.
    """
    log_probs = at_least_float32(logits).log_softmax(1)
    root = (log_probs / 2).exp()  # the gradient of p.sqrt() is infinite where p underflows
    for xi in signs:
        xi = xi.to(root)
        yield root * xi - log_probs.exp() * (root * xi).sum(1, keepdim=True)
