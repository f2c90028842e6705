r"""Relative flatness of the last layer, in closed form.

.. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle \operatorname{Tr} H_{s,s'}
          = \|\phi\|^2 \langle A, W W^T \rangle_F , \qquad A = \partial^2 \ell / \partial z^2

Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative Flatness and Generalization", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from flatreg.precision import at_least_float32


def relative_flatness(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Relative flatness kappa of the last layer, per sample; **larger means sharper**.

    For cross-entropy, with p = softmax(logits), it is the variance of the class weights under p:

    .. math:: \kappa = \|\phi\|^2 ( \sum_s p_s \|w_s\|^2 - \| \sum_s p_s w_s \|^2 )

    which does not depend on the label: a sample that is confidently wrong is as flat as one that
    is confidently right. It is invariant under phi -> c phi, W -> W/c, costs as much as the head,
    and is differentiable through all arguments. No 1/d is applied.

    Args:
        features: input of the last layer `(batch, features)`.
        logits: its output `(batch, classes)`.
        weight: its weight `(classes, features)`.
        loss: left out, cross-entropy (soft targets that sum to 1 included). Otherwise any
            `loss(logits, labels) -> (batch,)`, each sample's from its own logits, twice
            differentiable; its Hessian in the logits costs one backward pass a class.
        labels: `(batch, ...)`, handed to `loss`.

    Returns:
        `(batch,)` in the unit of the loss; float32 at least (half precision is cast up). Never
        negative for cross-entropy.

    >>> features, weight = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    >>> relative_flatness(features, torch.zeros(1, 2), weight)  # 25 * (1 - 1/2)
    tensor([12.5000])
    """
    # Autocast would put the products below back into half precision, where they cancel.
    with torch.autocast(features.device.type, enabled=False):
        features, logits, weight = (at_least_float32(t) for t in (features, logits, weight))
        squared_norm = features.square().sum(1)
        if loss is None:
            return squared_norm * _weight_variance(logits, weight)
        if labels is None:
            raise ValueError("a loss of your own needs labels, got none")
        hessian = _logit_hessian(loss, logits, labels)
        contracted: Tensor = einsum(hessian, weight @ weight.T, "b s t, s t -> b")
        return squared_norm * contracted


@torch.enable_grad()
def _logit_hessian(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
) -> Tensor:
    """Hessian of each sample's loss in its own logits `(batch, classes, classes)`."""
    points = logits if logits.requires_grad else logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(points, labels).sum(), points, create_graph=True)
    if not gradient.requires_grad:  # an affine loss
        return torch.zeros_like(gradient)[:, :, None].expand(*gradient.shape, gradient.shape[1])
    rows = [
        torch.autograd.grad(column.sum(), points, create_graph=True, materialize_grads=True)[0]
        for column in gradient.unbind(1)
    ]
    return torch.stack(rows, 1)


def scale_to_confidence(logits: Tensor, confidence: float) -> float:
    """Factor c > 0 at which the median confidence, max softmax(c * logits), is `confidence`.

    kappa moves with the scale of the logits, so two models are compared at one confidence:
    `relative_flatness(features, c * logits, c * weight)`, each with its own c.

    Args:
        logits: `(batch, classes)`.
        confidence: between 1/classes and 1.

    Raises:
        ValueError: no scale reaches that confidence.

    >>> scale_to_confidence(torch.tensor([[2.0, 0.0]]), 0.75)  # log(3) / 2
    0.549...
    """
    logits = logits.detach().double()

    def median(scale: float) -> float:
        return float(F.softmax(scale * logits, 1).amax(1).median())

    low, high = 1e-9, 1e9
    if not median(low) < confidence < median(high):
        raise ValueError(f"no scale of these logits has a median confidence of {confidence}")
    for _ in range(100):  # halves the ratio of 1e18 down to rounding
        middle = (low * high) ** 0.5
        low, high = (middle, high) if median(middle) < confidence else (low, middle)
    return high


def _weight_variance(logits: Tensor, weight: Tensor) -> Tensor:
    """Variance of the rows of `weight` under softmax(logits), about the likeliest row.

    `sum p |w|^2 - |sum p w|^2` has no correct digit in float32 once p is near one-hot; shifted by
    w_y it keeps its relative precision, and any y gives the same value, so y is a constant to the
    gradient.
    """
    weight = weight - weight.mean(0)  # a variance: rows may share any offset, the Gram may not
    top = logits.detach().argmax(1)
    rest = F.softmax(logits, dim=1).scatter(1, top[:, None], 0.0)  # p without the likeliest class
    gram = weight @ weight.T
    squared = gram.diagonal()
    distances = (squared[top, None] + squared[None, :] - 2 * gram[top]).clamp_min(0)
    shift = rest @ weight - rest.sum(1, keepdim=True) * weight[top]
    return ((rest * distances).sum(1) - shift.square().sum(1)).clamp_min(0)
