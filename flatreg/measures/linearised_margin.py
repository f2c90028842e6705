r"""Lower bound on the margin in an eps-ball, to second order, from plain forward passes.

.. math:: m(x+\delta) \ge m(x) - \epsilon \|\nabla m(x)\|_* - c\,\epsilon^2 / 2,
          \qquad \|\delta\| \le \epsilon

with m = z_y - max_{s != y} z_s and c the curvature of -m along the steepest direction. Multiplying
the logits by a constant multiplies the bound and changes no verdict: unlike relative flatness it
cannot be bought with confidence. Gradient by finite difference along the detached steepest
direction, after Finlay and Oberman, "Scaleable input gradient regularization", 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatreg.precision import at_least_float32
from flatreg.threat import Norm, steepest_direction


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Likeliest class other than the label, `(batch,)`."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


def margin(logits: Tensor, labels: Tensor, rival: Tensor | None = None) -> Tensor:
    """Margin z_y - z_rival, `(batch,)`; `rival` is the runner-up when left out. Float32 at least.

    >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
    tensor([2.])
    """
    rival = runner_up(logits, labels) if rival is None else rival
    picked = at_least_float32(logits).gather(1, torch.stack([labels, rival], 1))
    return picked[:, 0] - picked[:, 1]


def linearised_margin(
    logits_at: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    logits: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    rho: float = 1.0,
    curvature: bool = False,
) -> Tensor:
    """Second-order lower bound on the margin within `eps`, differentiable in the weights.

    ||grad m||_* = (m(x) - m(x - h d)) / h with h = rho eps and d the steepest direction of m at x,
    both margins against the runner-up at x. One backward pass to the inputs finds d; one more pass
    (two with curvature) gives the value. rho = 1 makes it the margin at the FGSM point; a smaller
    rho is local, and then needs the curvature term to say anything at eps. With curvature the slope
    is the central difference: the one-sided one holds a share rho of the curvature already.

    Args:
        logits_at: auxiliary pass, inputs to logits.
        inputs: x `(batch, ...)`, requiring grad and in the graph of `logits`.
        labels: `(batch,)`.
        logits: at `inputs` `(batch, classes)`.
        eps: radius in [0,1] pixel units.
        norm: norm of the ball; the slope is its dual norm.
        rho: finite-difference step as a share of eps, in (0, 1].
        curvature: subtract relu(c) eps^2/2, c by a second difference along d.

    Returns:
        `(batch,)`, in units of the logits. Points are cut with the box [0,1], as the threat model
        is; where that shortens the step, so does the bound.
    """
    rival = runner_up(logits, labels)
    here = margin(logits, labels, rival)
    (gradient,) = torch.autograd.grad(here.sum(), inputs, retain_graph=True)
    d, h = steepest_direction(gradient, norm), rho * eps
    start = inputs.detach()
    below = margin(logits_at((start - h * d).clamp(0, 1)), labels, rival)
    if not curvature:
        return here - (here - below) / rho
    above = margin(logits_at((start + h * d).clamp(0, 1)), labels, rival)
    slope, bend = (above - below) / (2 * rho), (2 * here - above - below) / rho**2
    return here - slope - bend.clamp_min(0) / 2
