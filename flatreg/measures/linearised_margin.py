r"""Lowest margin in an eps-ball, to second order, by forward passes or by double backward.

.. math:: \min_{\|\delta\| \le \epsilon} m_r(x+\delta)
          = m(x) - \epsilon \|\nabla m_r\|_* - c\,\epsilon^2 / 2 + O(\epsilon^3), \qquad
          c = -d^T \nabla^2 m_r\, d

with m = z_y - max_{s != y} z_s, r the runner-up at x, m_r = z_y - z_r, and d the steepest
direction: ||d|| = 1, <grad m_r, d> = ||grad m_r||_*.

Why c needs d alone. By Taylor m_r(x+delta) = m + <g, delta> + delta^T M delta / 2 + O(eps^3), and
m_r(x) = m(x). At delta = -eps d the right side is the value above. Nothing in the ball lies lower
by more than O(eps^3). Linf, no pixel of g zero: once eps |M delta|_i < |g_i| no pixel wants to
leave its end of the interval, so -eps d is the minimum. L2, g not zero: the minimum is at
-eps (g + O(eps)) / |g + O(eps)|, and as <g, .> is stationary over the sphere at d, that turn of
O(eps) changes the value by O(eps^3) only. Leaving out c < 0 lowers the value, so it stays a bound.
What is not claimed: at a finite eps it is no certificate, pixels whose gradient is zero are not
seen, and the margin is the least of all m_s: a rival that overtakes r inside the ball may be lower.

The margin of a mixture of labels, sum_k w_k (z_k - z_r) with r the likeliest class that it is not
of, is smooth in x as m_r is, and the same holds for it. It asks nothing of the order of the
mixture's own classes, which the criterion sets by their shares: the sum of w_k softplus(1 - m_k),
with m_k the margin of class k over the others, would ask two mixed classes to lie above each other.

Multiplying the logits by a constant multiplies every term and changes no verdict: unlike relative
flatness the bound cannot be bought with confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flatreg.data.configuration import number, switch
from flatreg.models.double_backward import Method, check_method, differentiable_gradient
from flatreg.models.entrance import as_labels
from flatreg.models.precision import at_least_float32
from flatreg.threat import DenseNorm, steepest_direction

_EVEN = 1e-6  # probabilities that differ by less count as even


def own_classes(labels: Tensor) -> Tensor:
    """Weights of the classes that a mixture of labels is of, `(batch, classes)`, each row of sum 1.

    w_k = (q_k - min q) / sum_s (q_s - min q) for probabilities q: what is left of them without the
    part that is spread evenly over all classes and favours none. So w of smoothed labels is that of
    the labels, and w of two mixed ones is their shares. The least likely class is never an own one:
    with two classes in all the likelier one is left. Even probabilities have no own class, and
    w = 0.

    >>> own_classes(torch.tensor([[0.1, 0.1, 0.7, 0.1], [0.0, 0.25, 0.0, 0.75]]))
    tensor([[0.0000, 0.0000, 1.0000, 0.0000],
            [0.0000, 0.2500, 0.0000, 0.7500]])
    """
    labels = at_least_float32(labels)
    excess = labels - labels.amin(1, keepdim=True)
    excess = torch.where(excess > _EVEN, excess, 0)
    return excess / excess.sum(1, keepdim=True).clamp_min(_EVEN)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Likeliest class other than the label, `(batch,)`; of a mixture, than its own classes."""
    values = logits.detach()
    if labels.is_floating_point():
        return values.masked_fill(own_classes(labels) > 0, -torch.inf).argmax(1)
    return values.scatter(1, labels[:, None], -torch.inf).argmax(1)


def margin(logits: Tensor, labels: Tensor, rival: Tensor | None = None) -> Tensor:
    """Margin z_y - z_rival, `(batch,)`; `rival` is the runner-up when left out. Float32 at least.

    Of labels that are probabilities it is sum_k w_k (z_k - z_rival), w the weights of the classes
    that the mixture is of (`own_classes`): the mean margin of these over all other classes.

    Raises:
        ValueError: the labels are not of these logits, or of no class of them.

    >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
    tensor([2.])
    >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([[0.0, 0.5, 0.5]]))
    tensor([2.])
    """
    labels = as_labels(labels, *logits.shape, read=False)
    try:
        rival = runner_up(logits, labels) if rival is None else rival
    except RuntimeError:  # on the CPU, of a label that is no class
        as_labels(labels, *logits.shape)
        raise
    values = at_least_float32(logits)
    if labels.is_floating_point():
        own = own_classes(labels).to(values.dtype)
        return (own * (values - values.gather(1, rival[:, None]))).sum(1)
    picked = values.gather(1, torch.stack([labels, rival], 1))
    return picked[:, 0] - picked[:, 1]


class LinearisedMargin(NamedTuple):
    """A margin and a lower bound on it within the ball, each `(batch,)`, in units of the logits.

    Attributes:
        margin: m(x).
        slope: first-order decrease, eps ||grad m||_*; never negative.
        bend: second-order decrease, max(0, c) eps^2 / 2; 0 where it was not asked for.
        bound: margin - slope - bend.
    """

    margin: Tensor
    slope: Tensor
    bend: Tensor
    bound: Tensor


def linearised_margin(
    logits_at: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    logits: Tensor,
    *,
    eps: float,
    norm: DenseNorm = "linf",
    step: float = 1.0,
    subtract_curvature: bool = False,
    method: Method = "finite_difference",
) -> LinearisedMargin:
    r"""Second-order lower bound on the margin within `eps`, differentiable in the weights.

    With delta = -eps d, cut with the box [0,1], h the step, and all margins against the runner-up
    at x,

    .. math:: \text{slope} \approx (m(x) - m(x + h\delta)) / h

    or, with curvature, the central difference, for the one-sided slope holds a share h of the
    curvature already and would count it 1 + h times:

    .. math:: \text{slope} \approx (m(x - h\delta) - m(x + h\delta)) / 2h, \qquad
              \text{bend} \approx (2 m(x) - m(x - h\delta) - m(x + h\delta))_+ / 2h^2

    One backward pass to the inputs finds d; one more pass (two with curvature) gives the values.
    h = 1 makes the bound the margin at the FGSM point; a smaller step is local, and needs the
    curvature to say anything at eps. Finite differences after Finlay and Oberman, "Scaleable input
    gradient regularization", 2021.

    Args:
        logits_at: auxiliary pass, inputs to logits; for finite differences only.
        inputs: x `(batch, ...)`, requiring grad and in the graph of `logits`.
        labels: classes `(batch,)`, or probabilities `(batch, classes)`: see `margin`.
        logits: at `inputs` `(batch, classes)`; for double backward run the pass within
            `flatreg.models.double_backward.twice_differentiable`.
        eps: radius in [0,1] pixel units.
        norm: norm of the ball; the slope is its dual norm.
        step: h, of the finite difference, as a share of eps, in (0, 1].
        subtract_curvature: subtract the bend.
        method: "double_backward" takes gradient and curvature exactly.

    Returns:
        The bound and its terms. Where the box shortens the step, so does the slope (in L2 the cut
        step is not the steepest one that is left). The mirrored point x - h delta may leave the box
        by h eps: it serves the difference only, and cut by itself it would let the slope leak into
        the bend at every black or white pixel.

    Raises:
        ValueError: an unknown method, a step outside (0, 1], or, for double backward, an operator
            without a second derivative.
    """
    check_method(method)
    step = number("step", step, "(0, 1]")
    subtract_curvature = switch("subtract_curvature", subtract_curvature)
    rival = runner_up(logits, labels)
    here, x = margin(logits, labels, rival), inputs.detach()
    exact = method == "double_backward"
    if exact:
        gradient = differentiable_gradient(here, inputs, what="linearised_margin")
    else:
        (gradient,) = torch.autograd.grad(here.sum(), inputs, retain_graph=True)
    # The displacement of length eps that lowers the margin fastest; a constant.
    delta = (x - eps * steepest_direction(gradient.detach(), norm)).clamp(0, 1) - x
    bend = torch.zeros_like(here)
    if exact:
        slope = at_least_float32(-gradient * delta).flatten(1).sum(1)
        if subtract_curvature and gradient.requires_grad:
            (product,) = torch.autograd.grad(
                gradient, inputs, delta, create_graph=True, materialize_grads=True
            )
            bend = at_least_float32(-product * delta).flatten(1).sum(1) / 2
    else:
        below = margin(logits_at((x + step * delta).clamp(0, 1)), labels, rival)
        slope = (here - below) / step
        if subtract_curvature:
            above = margin(logits_at(x - step * delta), labels, rival)
            slope, bend = (above - below) / (2 * step), (2 * here - above - below) / (2 * step**2)
    # eps ||grad m||_* is not negative, its finite difference may be, and would then reward a low
    # margin at x for a high one at x + h delta: networks with BatchNorm in train mode, whose
    # statistics tell the two batches apart, learned just that.
    slope, bend = slope.clamp_min(0), bend.clamp_min(0)
    return LinearisedMargin(here, slope, bend, here - slope - bend)
