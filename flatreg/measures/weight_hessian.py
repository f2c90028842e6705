"""The Hessian of the mean loss in the weights, and its Gauss-Newton part, by their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flatreg.data.configuration import whole
from flatreg.measures.estimate import Estimate
from flatreg.measures.lanczos import lanczos
from flatreg.measures.parameters import (
    LossInWeights,
    SampleLoss,
    Vector,
    displaced,
    finite_step,
    gaussian,
    inner,
)
from flatreg.models.derivative_check import check_derivatives
from flatreg.models.double_backward import (
    Method,
    check_method,
    pull_back,
    refuse_double_backward,
    refuse_missing_derivatives,
    twice_differentiable,
)
from flatreg.models.forward import local_module
from flatreg.models.precision import at_least_float32, cross_entropy
from flatreg.models.state import untouched

Product = Callable[[Vector], Vector]
Matrix = Literal["hessian", "gauss_newton"]


def hessian_top_eigenvalue(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    layers: Sequence[str] | None = None,
    steps: int = 20,
    matrix: Matrix = "hessian",
    method: Method = "double_backward",
    loss: SampleLoss = cross_entropy,
    seed: int = 0,
) -> Estimate:
    """Largest eigenvalue of the mean loss' Hessian in the weights, by Lanczos, with its residual.

    Within the residual of the value lies an eigenvalue: the largest one, up to what the search
    missed, so read it as a lower bound. Keeps `steps` vectors as long as the parameters.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        inputs: `(batch, ...)`.
        labels: `(batch, ...)`, handed to `loss`.
        layers: paths of linear layers and convolutions: the block of their weights. Left out, all
            parameters.
        steps: products with the matrix.
        matrix: "hessian" or "gauss_newton".
        method: "finite_difference" does without second derivatives.
        loss: `(logits, labels) -> (batch,)`; its mean is what is differentiated.
        seed: of the first direction.

    Raises:
        ValueError: there is no such layer, an unknown matrix or method, or the model cannot be
            differentiated twice.
    """
    with untouched(local_module(model)):
        at = LossInWeights.of(model, inputs, labels, loss, layers)
        product = curvature_product(at, matrix, method)
        weights = list(at.weights.values())

        def matvec(vectors: Tensor) -> Tensor:
            parts = torch.split(vectors[0], [w.numel() for w in weights])
            along = [v.reshape(w.shape) for v, w in zip(parts, weights, strict=True)]
            return torch.cat([p.flatten() for p in product(along)])[None]

        start = gaussian(weights, torch.Generator().manual_seed(seed))
        ritz = lanczos(matvec, torch.cat([v.flatten() for v in start])[None], steps)
    return Estimate.within(float(ritz.values[0, -1]), float(ritz.residuals[0, -1]), steps)


def hessian_trace_estimate(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    layers: Sequence[str] | None = None,
    num_probes: int = 32,
    matrix: Matrix = "hessian",
    method: Method = "double_backward",
    loss: SampleLoss = cross_entropy,
    seed: int = 0,
) -> Estimate:
    """Trace of the mean loss' Hessian in the weights, by Hutchinson's estimator.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        inputs: `(batch, ...)`.
        labels: `(batch, ...)`, handed to `loss`.
        layers: see `hessian_top_eigenvalue`.
        num_probes: products with the matrix.
        matrix: "hessian" or "gauss_newton".
        method: "finite_difference" does without second derivatives.
        loss: `(logits, labels) -> (batch,)`; its mean is what is differentiated.
        seed: of the probes.

    Raises:
        ValueError: there is no such layer, an unknown matrix or method, or the model cannot be
            differentiated twice.
    """
    num_probes = whole("num_probes", num_probes, 1)
    generator = torch.Generator().manual_seed(seed)
    with untouched(local_module(model)):
        at = LossInWeights.of(model, inputs, labels, loss, layers)
        product = curvature_product(at, matrix, method)
        draws = []
        for _ in range(num_probes):
            probe = [v.sign() for v in gaussian(list(at.weights.values()), generator)]
            draws.append(inner(probe, product(probe)).sum())
    return Estimate.mean(torch.stack(draws))


def curvature_product(
    loss: LossInWeights,
    matrix: Matrix = "hessian",
    method: Method = "double_backward",
    step: float = 1e-2,
) -> Product:
    r"""Map v to H v, or to G v with the Gauss-Newton matrix :math:`G = J^T A J`.

    J is the Jacobian of the logits in the weights and A the Hessian of the loss in the logits, all
    of the mean loss of the batch. What does not depend on v is computed once.

    Args:
        loss: where to take it; the model should be in eval mode.
        matrix: "hessian" is H, "gauss_newton" is G, positive semi-definite for a convex loss.
        method: "finite_difference" needs no second derivative: H from the gradients, J from the
            logits, at the weights +- h v.
        step: length of h v as a share of that of the weights.

    Raises:
        ValueError: an unknown matrix or method, or the model cannot be differentiated twice.
    """
    check_method(method)
    if matrix not in get_args(Matrix):
        raise ValueError(f"matrix must be 'hessian' or 'gauss_newton', got {matrix!r}")
    if method == "double_backward":
        refuse_double_backward(loss.model, matrix)
        by_passes = 'method="finite_difference"'
        at = loss.model, loss.inputs
        check_derivatives(*at, 2, "weights", what=matrix, alternative=by_passes)
    if matrix == "gauss_newton":
        return _gauss_newton_product(loss, method, step)
    if method == "finite_difference":
        return _hessian_product_by_differences(loss, step)
    return _hessian_product(loss)


@torch.enable_grad()
def _hessian_product(loss: LossInWeights) -> Product:
    weights = list(loss.weights.values())
    with twice_differentiable():
        gradients = torch.autograd.grad(
            loss(weights), weights, create_graph=True, materialize_grads=True
        )
    for gradient in gradients:
        refuse_missing_derivatives(gradient, "hessian")
    return pull_back(gradients, weights)


def _hessian_product_by_differences(loss: LossInWeights, step: float) -> Product:
    weights = list(loss.weights.values())

    def product(vector: Vector) -> Vector:
        h = finite_step(weights, vector, step)
        ahead = loss.gradient(displaced(weights, vector, h))[1]
        behind = loss.gradient(displaced(weights, vector, -h))[1]
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]

    return product


@torch.enable_grad()
def _gauss_newton_product(loss: LossInWeights, method: Method, step: float) -> Product:
    weights = list(loss.weights.values())
    with twice_differentiable():
        logits = loss.logits(weights)
    if method == "double_backward":
        push = push_forward(logits, weights)
    # A, by products: the Hessian of each sample's loss in its own logits.
    points = at_least_float32(logits.detach()).requires_grad_()
    total = loss.loss(points, loss.labels).sum()
    curve = pull_back(torch.autograd.grad(total, points, create_graph=True), [points])
    pull = pull_back([logits], weights)

    def product(vector: Vector) -> Vector:
        if method == "double_backward":
            change = push(vector)
        else:
            h = finite_step(weights, vector, step)
            with torch.no_grad():
                ahead, behind = (loss.logits(displaced(weights, vector, s)) for s in (h, -h))
            change = (at_least_float32(ahead) - at_least_float32(behind)) / (2 * h)
        return pull([curve([change])[0] / len(logits)])

    return product


def push_forward(
    logits: Tensor, weights: Vector, *, create_graph: bool = False
) -> Callable[[Vector], Tensor]:
    """Map v to J v by differentiating the pulled-back gradient, which is linear in what it pulls.

    Args:
        logits: with their graph.
        weights: leaves of it.
        create_graph: whether J v is to be differentiated in its turn.

    Raises:
        ValueError: an operator lacks the derivative.
    """
    dummy = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, weights, dummy, create_graph=True, materialize_grads=True)
    for gradient in pulled:
        refuse_missing_derivatives(gradient, "gauss_newton")
    product = pull_back(pulled, [dummy], create_graph=create_graph)
    return lambda vector: product(vector)[0]
