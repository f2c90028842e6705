r"""Relative flatness of the last layer, in closed form.

.. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle \operatorname{Tr} H_{s,s'}
          = \|\phi\|^2 \langle A, W W^T \rangle_F , \qquad A = \partial^2 \ell / \partial z^2

Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative Flatness and Generalization", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from flatreg.models.precision import in_one_precision

LogitLoss = Literal["cross_entropy", "bce", "mse"] | Callable[[Tensor, Tensor], Tensor]


def relative_flatness(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    *,
    loss: LogitLoss = "cross_entropy",
    labels: Tensor | None = None,
) -> Tensor:
    r"""Relative flatness kappa of the last layer, per sample; **larger means sharper**.

    For cross-entropy, with p = softmax(logits), it is the variance of the class weights under p:

    .. math:: \kappa = \|\phi\|^2 ( \sum_s p_s \|w_s\|^2 - \| \sum_s p_s w_s \|^2 )

    For binary cross-entropy summed over classes, with q = sigmoid(logits), and for the squared
    error summed over classes:

    .. math:: \kappa = \|\phi\|^2 \sum_s q_s (1 - q_s) \|w_s\|^2 , \qquad
              \kappa = 2 \|\phi\|^2 \|W\|_F^2

    None of the three depends on the label: a sample that is confidently wrong is as flat as one
    that is confidently right. kappa is invariant under phi -> c phi, W -> W/c and under orthogonal
    maps of feature space, not under a rescaling of single features; it costs a few products of the
    size of the head, and is differentiable through all arguments. No 1/d is applied.

    Args:
        features: input of the last layer `(batch, features)`.
        logits: its output `(batch, classes)`.
        weight: its weight `(classes, features)`.
        loss: `"cross_entropy"` (soft targets that sum to 1 included), `"bce"` or `"mse"`, each
            summed over classes. Otherwise any `loss(logits, labels) -> (batch,)`, each sample's
            from its own logits, twice differentiable; its Hessian in the logits costs one backward
            pass a class.
        labels: `(batch, ...)`, handed to a loss of your own; the others do not read them.

    Returns:
        `(batch,)` in the unit of the loss; float32 at least (half precision is cast up). Never
        negative for the losses with a name.

    Raises:
        TypeError: a model stands where the features should.
        ValueError: the shapes do not fit; the loss has another name, or is a function without
            labels or of the whole batch.

    >>> features, weight = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    >>> relative_flatness(features, torch.zeros(1, 2), weight)  # 25 * (1 - 1/2)
    tensor([12.5000])
    >>> relative_flatness(features, torch.zeros(1, 2), weight, loss="mse")  # 2 * 25 * 2
    tensor([100.])
    """
    with _without_autocast(features):
        features, logits, weight = _fitting(features, logits, weight)
        return _squared_norm(features) * _contracted(loss, logits, weight, labels)


def log_relative_flatness(features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    r"""Logarithm of kappa for cross-entropy, where kappa itself underflows; larger means sharper.

    With y the likeliest class, Q the probability of the others, r their probabilities given that
    it is one of them, and D_s = ||w_s - w_y||^2,

    .. math:: \log \kappa = \log \|\phi\|^2 + \log Q + \log \sum_s r_s D_s
              + \log \left( 1 - Q \frac{\| \sum_s r_s w_s - w_y \|^2}{\sum_s r_s D_s} \right)

    in which nothing vanishes as p saturates: with a margin m between the two likeliest logits the
    value falls like -m and its gradient in the logits stays of order one, while that of kappa goes
    to zero.

    Arguments as in `relative_flatness`; two classes at least.

    Returns:
        `(batch,)`, float32 at least. Where kappa is zero in exact arithmetic, features that are
        all zero or rows of `weight` that are all equal, the logarithm of the smallest normal number
        takes the place of that factor's, and has no gradient.

    Raises:
        ValueError: there is one class.

    >>> features, weight = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    >>> log_relative_flatness(features, torch.tensor([[1000.0, 0.0]]), weight)  # log(50) - 1000
    tensor([-996.0880])
    """
    with _without_autocast(features):
        features, logits, weight = _fitting(features, logits, weight)
        if logits.shape[1] < 2:
            raise ValueError(f"expected logits of two classes at least, got {tuple(logits.shape)}")
        top, weight = logits.detach().argmax(1), weight - weight.mean(0)
        log_rest = F.log_softmax(logits, 1).scatter(1, top[:, None], -torch.inf)
        log_q, given = log_rest.logsumexp(1), log_rest.softmax(1)
        spread = (given * _squared_distances(weight, top)).sum(1)
        smallest = torch.finfo(spread.dtype).tiny  # a head that starts at zero
        spread = spread.clamp_min(smallest)
        ratio = _squared_norm(given @ weight - weight[top]) / spread
        variance = log_q + spread.log() + torch.log1p(-log_q.exp() * ratio.clamp_max(1))
        return _squared_norm(features).clamp_min(smallest).log() + variance


def head_hessian_trace(features: Tensor, logits: Tensor) -> Tensor:
    r"""Trace of the Hessian of cross-entropy in the last layer's weight; larger means sharper.

    .. math:: \operatorname{Tr} H = \|\phi\|^2 ( 1 - \|p\|^2 ) = \|\phi\|^2 \sum_s p_s (1 - p_s)

    Not invariant under phi -> c phi, W -> W/c, which changes no prediction: it is for comparison.

    Arguments as in `relative_flatness`.

    Returns:
        `(batch,)`, float32 at least; of the weight alone, without the bias.

    >>> head_hessian_trace(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))  # 25 * (1 - 1/2)
    tensor([12.5000])
    """
    with _without_autocast(features):
        features, logits = in_one_precision(features, logits)
        return _squared_norm(features) * _class_variances(logits).sum(1)


def layerwise_flatness(features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    r"""Trace of the Hessian times the squared norm of the weight; larger means sharper.

    .. math:: \|W\|_F^2 \, \|\phi\|^2 ( 1 - \|p\|^2 )

    The layer-wise variant of relative flatness for cross-entropy (Adilova, Abourayya, Li, Dada,
    Petzka, Egger, Kleesiek, Kamp, "FAM: Relative Flatness Aware Minimization", 2023): one number
    scales all rows. At least kappa.

    Arguments as in `relative_flatness`.

    Returns:
        `(batch,)` in the unit of the loss; float32 at least.

    >>> layerwise_flatness(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.eye(2))
    tensor([25.])
    """
    with _without_autocast(features):
        features, logits, weight = _fitting(features, logits, weight)
        return weight.square().sum() * head_hessian_trace(features, logits)


def max_eigenvalue_flatness(features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    r"""Relative flatness by the largest eigenvalue of each class's block; larger means sharper.

    .. math:: \sum_s \|w_s\|^2 \lambda_{\max}(H_{s,s})
              = \|\phi\|^2 \sum_s \|w_s\|^2 p_s (1 - p_s)

    for cross-entropy (Petzka et al. 2021). A block H_{s,s} of the last layer has one eigenvalue
    other than zero, so this is also the sum of the diagonal terms of kappa.

    Arguments as in `relative_flatness`.

    Returns:
        `(batch,)` in the unit of the loss; float32 at least.

    >>> max_eigenvalue_flatness(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.eye(2))
    tensor([12.5000])
    """
    with _without_autocast(features):
        features, logits, weight = _fitting(features, logits, weight)
        return _squared_norm(features) * (_class_variances(logits) @ _squared_norm(weight))


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


def matching_scale(logits: Tensor, confidence: float) -> float | None:
    """`scale_to_confidence`, None where no scale gets there, as where no logit differs."""
    try:
        return scale_to_confidence(logits, confidence)
    except ValueError:
        return None


def _without_autocast(features: Tensor) -> torch.autocast:
    """Products in the precision of their factors: back in half precision they would cancel.

    Raises:
        TypeError: these are no features, as where a model is given.
    """
    if not isinstance(features, Tensor):
        raise TypeError(
            "expected the input of the last layer (batch, features), got a "
            f"{type(features).__name__}: flatreg.measures.pass_to_head(model, images, labels) takes"
            " a model, and its result has kappa()"
        )
    return torch.autocast(features.device.type, enabled=False)


def _fitting(features: Tensor, logits: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The three in one precision.

    Raises:
        ValueError: their shapes do not fit: kappa of other features would be a number too.
    """
    shapes = [tuple(tensor.shape) for tensor in (features, logits, weight)]
    batch, width, classes = len(features), features.shape[-1], logits.shape[-1]
    if shapes != [(batch, width), (batch, classes), (classes, width)]:
        raise ValueError(
            "expected features (batch, d), logits (batch, classes) and weight (classes, d), got "
            f"{', '.join(map(str, shapes))}"
        )
    return in_one_precision(features, logits, weight)


def _contracted(loss: LogitLoss, logits: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
    """<A, W W^T>_F per sample."""
    if callable(loss):
        if labels is None:
            raise ValueError("a loss of your own needs labels, got none")
        hessian = _logit_hessian(loss, logits, labels)
        contracted: Tensor = einsum(hessian, weight @ weight.T, "b s t, s t -> b")
        return contracted
    if loss == "cross_entropy":
        return _weight_variance(logits, weight)
    if loss == "bce":
        # 1 - sigmoid(z) has no digit left once z is large, sigmoid(-z) has them all.
        return (logits.sigmoid() * (-logits).sigmoid()) @ _squared_norm(weight)
    if loss == "mse":
        return 2 * weight.square().sum()
    raise ValueError(f"expected the loss cross_entropy, bce, mse or a function, got {loss!r}")


@torch.enable_grad()
def _logit_hessian(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
) -> Tensor:
    """Hessian of each sample's loss in its own logits `(batch, classes, classes)`."""
    points = logits if logits.requires_grad else logits.detach().requires_grad_()
    values = loss(points, labels)
    if values.shape != (len(points),):
        raise ValueError(
            f"expected a loss per sample ({len(points)},), got shape {tuple(values.shape)}: "
            'give one with reduction="none"'
        )
    (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    if not gradient.requires_grad:  # an affine loss
        return torch.zeros_like(gradient)[:, :, None].expand(*gradient.shape, gradient.shape[1])
    rows = [
        torch.autograd.grad(column.sum(), points, create_graph=True, materialize_grads=True)[0]
        for column in gradient.unbind(1)
    ]
    return torch.stack(rows, 1)


def _weight_variance(logits: Tensor, weight: Tensor) -> Tensor:
    """Variance of the rows of `weight` under softmax(logits), about the likeliest row.

    `sum p |w|^2 - |sum p w|^2` has no correct digit in float32 once p is near one-hot; shifted by
    w_y it keeps its relative precision, and any y gives the same value, so y is a constant to the
    gradient.
    """
    weight = weight - weight.mean(0)  # a variance: rows may share any offset, the Gram may not
    top = logits.detach().argmax(1)
    rest = F.softmax(logits, dim=1).scatter(1, top[:, None], 0.0)  # p without the likeliest class
    shift = rest @ weight - rest.sum(1, keepdim=True) * weight[top]
    return ((rest * _squared_distances(weight, top)).sum(1) - _squared_norm(shift)).clamp_min(0)


def _squared_distances(weight: Tensor, top: Tensor) -> Tensor:
    """||w_s - w_y||^2 `(batch, classes)` of all rows from the row of each sample."""
    if len(weight) > len(top):  # the Gram matrix would have more rows than are looked up
        squared, inner = _squared_norm(weight), weight[top] @ weight.T
    else:
        gram = weight @ weight.T
        squared, inner = gram.diagonal(), gram[top]
    return (squared[top, None] + squared[None, :] - 2 * inner).clamp_min(0)


def _class_variances(logits: Tensor) -> Tensor:
    """p_s (1 - p_s), where 1 - p of the likeliest class is the sum of the others'."""
    p, top = F.softmax(logits, 1), logits.detach().argmax(1)[:, None]
    rest = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    return p * (1 - p).scatter(1, top, rest)


def _squared_norm(rows: Tensor) -> Tensor:
    return rows.square().sum(1)
