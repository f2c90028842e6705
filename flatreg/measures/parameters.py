"""The loss as a function of the weights, and products with its curvature there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from flatreg.models.double_backward import (
    Method,
    refuse_double_backward,
    refuse_missing_derivatives,
    twice_differentiable,
)
from flatreg.models.forward import local_module
from flatreg.models.precision import at_least_float32, cross_entropy

SampleLoss = Callable[[Tensor, Tensor], Tensor]
Vector = list[Tensor]
Product = Callable[[Vector], Vector]
Curvature = Literal["hessian", "gauss_newton"]

ALTERNATIVE = 'method="finite_difference"'


@dataclass(frozen=True, eq=False)
class LossInWeights:
    """Mean loss of one batch as a function of some of the weights; the model is not touched.

    Attributes:
        model: the module itself, never its DDP wrapper.
        inputs: `(batch, ...)`.
        labels: `(batch, ...)`, handed to `loss`.
        loss: `(logits, labels) -> (batch,)`.
        weights: where to take derivatives, by path: leaves that share the model's storage.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: SampleLoss
    weights: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        loss: SampleLoss = cross_entropy,
        parameters: Sequence[str] | None = None,
    ) -> LossInWeights:
        """In the parameters of these paths; left out, in all.

        Raises:
            ValueError: the model is sharded by FSDP2.
        """
        model = local_module(model)
        refuse_sharded(model)
        named = dict(model.named_parameters())
        chosen = named if parameters is None else {path: named[path] for path in parameters}
        leaves = {path: p.detach().requires_grad_() for path, p in chosen.items()}
        return cls(model, inputs, labels, loss, leaves)

    def logits(self, weights: Vector) -> Tensor:
        """Logits `(batch, classes)` at these weights."""
        named = dict(zip(self.weights, weights, strict=True))
        logits: Tensor = functional_call(self.model, named, (self.inputs,))
        return logits

    def __call__(self, weights: Vector) -> Tensor:
        """Mean loss at these weights."""
        return self.loss(self.logits(weights), self.labels).mean()

    @torch.enable_grad()
    def gradient(self, weights: Vector) -> tuple[Tensor, Vector]:
        """Mean loss at these weights and its gradient, both detached."""
        points = [w.detach().requires_grad_() for w in weights]
        value = self(points)
        return value.detach(), list(torch.autograd.grad(value, points, materialize_grads=True))


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that cannot be replaced in a functional call.

    Raises:
        ValueError: a part of the model is sharded by FSDP2.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("curvature in the weights needs whole weights, got a model under FSDP2")


def finite_step(weights: Vector, direction: Vector, step: float) -> Tensor:
    """Factor h at which h `direction` is `step` times as long as `weights`; a constant."""
    size, length = (
        torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(at_least_float32(t.detach())) for t in v])
        )
        for v in (weights, direction)
    )
    return torch.where((size > 0) & (length > 0), step * size / length, step)


def displaced(weights: Vector, direction: Vector, step: Tensor) -> Vector:
    """The point `weights` + `step` `direction`, in the precision of the weights."""
    return [w + (step * d).to(w.dtype) for w, d in zip(weights, direction, strict=True)]


def inner(first: Vector, second: Vector) -> Tensor:
    """Inner products, one a tensor `(len,)`, in float32 at least."""
    return torch.stack(
        [
            (at_least_float32(a) * at_least_float32(b)).sum()
            for a, b in zip(first, second, strict=True)
        ]
    )


def curvature_product(
    loss: LossInWeights,
    curvature: Curvature = "hessian",
    method: Method = "double_backward",
    step: float = 1e-2,
) -> Product:
    r"""Map v to H v, or to G v with the Gauss-Newton matrix :math:`G = J^T A J`.

    J is the Jacobian of the logits in the weights and A the Hessian of the loss in the logits, all
    of the mean loss of the batch. What does not depend on v is computed once.

    Args:
        loss: where to take it; the model should be in eval mode.
        curvature: which matrix. G is positive semi-definite for a convex loss.
        method: "finite_difference" needs no second derivative: H from the gradients, J from the
            logits, at the weights +- h v.
        step: length of h v as a share of that of the weights.

    Raises:
        ValueError: the model cannot be differentiated twice.
    """
    if method == "double_backward":
        refuse_double_backward(loss.model, curvature, ALTERNATIVE)
    if curvature == "gauss_newton":
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
        refuse_missing_derivatives(gradient, "hessian", ALTERNATIVE)
    curved = [gradient.requires_grad for gradient in gradients]

    def product(vector: Vector) -> Vector:
        outputs = [g for g, c in zip(gradients, curved, strict=True) if c]
        if not outputs:  # affine in the weights
            return [torch.zeros_like(v) for v in vector]
        along = [v.to(g) for v, g, c in zip(vector, gradients, curved, strict=True) if c]
        return list(
            torch.autograd.grad(outputs, weights, along, retain_graph=True, materialize_grads=True)
        )

    return product


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
        pushed = push_forward(logits, weights)
    curved = _logit_curvature(loss, logits)

    def product(vector: Vector) -> Vector:
        if method == "double_backward":
            change = pushed(vector)
        else:
            h = finite_step(weights, vector, step)
            with torch.no_grad():
                ahead, behind = (loss.logits(displaced(weights, vector, s)) for s in (h, -h))
            change = (at_least_float32(ahead) - at_least_float32(behind)) / (2 * h)
        pulled = curved(change) / len(logits)
        return list(
            torch.autograd.grad(
                logits, weights, pulled.to(logits), retain_graph=True, materialize_grads=True
            )
        )

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
        refuse_missing_derivatives(gradient, "gauss_newton", ALTERNATIVE)
    used = [gradient.requires_grad for gradient in pulled]

    def push(vector: Vector) -> Tensor:
        outputs = [g for g, u in zip(pulled, used, strict=True) if u]
        along = [v.to(g) for v, g, u in zip(vector, pulled, used, strict=True) if u]
        (change,) = torch.autograd.grad(
            outputs, dummy, along, retain_graph=True, create_graph=create_graph
        )
        return change

    return push


def _logit_curvature(loss: LossInWeights, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """Map u `(batch, classes)` to A u, A the Hessian of each sample's loss in its logits."""
    points = at_least_float32(logits.detach()).requires_grad_()
    total = loss.loss(points, loss.labels).sum()
    (slope,) = torch.autograd.grad(total, points, create_graph=True)

    def product(change: Tensor) -> Tensor:
        if not slope.requires_grad:  # an affine loss
            return torch.zeros_like(slope)
        return torch.autograd.grad(slope, points, change.to(slope), retain_graph=True)[0]

    return product
