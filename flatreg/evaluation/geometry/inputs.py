"""Curvature of the loss in the input, on and off the data manifold."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatreg.evaluation.geometry.card import CurvaturePart, Directions, Spread
from flatreg.evaluation.geometry.sharded import Survey, gathered
from flatreg.measures.input_curvature import normal_direction
from flatreg.measures.input_hessian import directional_curvature, normal_trace, top_curvature
from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, Manifold, PCAManifold
from flatreg.models.precision import cross_entropy

_LANCZOS_STEPS = 16


def curvature_part(survey: Survey) -> CurvaturePart:
    """Trace, direction of the gradient and top curvature, in the tangent and the normal space.

    Raises:
        ValueError: an operator lacks a second derivative; the manifold is not fitted, or to other
            images; it leaves no direction off the manifold.
    """
    manifold, model = survey.manifold, survey.model
    pixels = math.prod(survey.shape)
    tangent = tangent_dimension(manifold)
    sides: dict[str, tuple[Manifold, int]] = {"off": (manifold, pixels - tangent)}
    if tangent:
        sides["on"] = (cast(Any, _TangentFirst(manifold)), tangent)
    if tangent >= pixels:
        raise ValueError(f"the manifold has {tangent} of {pixels} dimensions: none is off it")

    def columns() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for number, batch in survey.blocks("curvature"):
            loss_at = partial(_losses, model, batch.labels)
            for side, (space, dimension) in sides.items():
                seed = survey.seed * 2**20 + number
                row = _directions(loss_at, batch.inputs, space, dimension, survey.num_probes, seed)
                for name, values in row.items():
                    found.setdefault(f"{side}.{name}", []).append(values.cpu())
        return found

    merged = {name: torch.cat(values) for name, values in gathered(columns).items()}

    def directions(side: str) -> Directions:
        spread = {
            name: Spread.of(merged[f"{side}.{name}"])
            for name in ("slope", "curvature", "along_gradient", "top")
        }
        residual = float(merged[f"{side}.residual"].median())
        return Directions(dimension=sides[side][1], residual=residual, **spread)

    share = None if isinstance(manifold, IdentityManifold) else manifold.explained_variance
    on = directions("on") if tangent else None
    return CurvaturePart(repr(manifold), share, on, directions("off"))


def tangent_dimension(manifold: Manifold) -> int:
    """Dimension of its tangent spaces.

    Raises:
        ValueError: it is not fitted.
    """
    if isinstance(manifold, PCAManifold):
        if manifold.fitted is None:
            raise ValueError("PCAManifold is not fitted: call .fit(images) first")
        return len(manifold.fitted.basis)
    return manifold.rank if isinstance(manifold, LocalPCAManifold) else 0


class _TangentFirst:
    """A manifold with tangent and normal spaces exchanged."""

    def __init__(self, manifold: Manifold) -> None:
        self.manifold = manifold

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        tangent, normal = self.manifold.split(inputs, vectors)
        return normal, tangent


def _losses(model: nn.Module, labels: Tensor, inputs: Tensor) -> Tensor:
    return cross_entropy(model(inputs), labels)


def _directions(
    loss_at: Any, inputs: Tensor, space: Manifold, dimension: int, num_probes: int, seed: int
) -> dict[str, Tensor]:
    """What `Directions` holds, a sample at a time, in the normal space of `space`."""
    points = inputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss_at(points).sum(), points)
    normal = space.split(inputs, gradient)[1]
    # Directions before squares: the gradient of a confident sample underflows when squared.
    largest = normal.abs().flatten(1).amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
    scaled = normal / largest.reshape(-1, *[1] * (normal.ndim - 1))
    trace = normal_trace(loss_at, inputs, manifold=space, num_probes=num_probes, seed=seed)
    top = top_curvature(loss_at, inputs, manifold=space, steps=_LANCZOS_STEPS, seed=seed)
    return {
        "slope": largest * scaled.flatten(1).norm(dim=1),
        "curvature": trace.values / dimension,
        "along_gradient": directional_curvature(
            loss_at, inputs, normal_direction(scaled, inputs, space)
        ),
        "top": top.values,
        "residual": top.residuals,
    }
