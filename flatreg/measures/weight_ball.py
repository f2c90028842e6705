"""A ball around the weights, and the highest loss found in it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flatreg.measures.parameters import LossInWeights, Vector, inner

BallNorm = Literal["l2", "linf"]


def times(vector: Vector, factor: float) -> Vector:
    """Every tensor by the factor."""
    return [v * factor for v in vector]


def move(weights: Vector, scales: Vector, e: Vector) -> Vector:
    """The point w + c e, detached."""
    return [w.detach() + c * v for w, c, v in zip(weights, scales, e, strict=True)]


def ascent_step(slope: Vector, size: float, norm: BallNorm) -> Vector:
    """Steepest direction of length `size`; zero where the slope is."""
    if norm == "linf":
        return [size * g.sign() for g in slope]
    length = inner(slope, slope).sum().sqrt()
    return [(size * g / torch.where(length > 0, length, 1)).to(g.dtype) for g in slope]


def project(e: Vector, rho: float, norm: BallNorm) -> Vector:
    """Nearest point of the ball of radius `rho`."""
    if norm == "linf":
        return [v.clamp(-rho, rho) for v in e]
    length = inner(e, e).sum().sqrt()
    return [(v * torch.where(length > rho, rho / length, 1)).to(v.dtype) for v in e]


def ascend(
    at: LossInWeights, scales: Vector, start: Vector, rho: float, norm: BallNorm, steps: int
) -> Tensor:
    """Best loss on the way, in the coordinates e = delta / c where the ball is round."""
    weights, size = list(at.weights.values()), 2 * rho

    def evaluate(e: Vector) -> tuple[Tensor, Vector]:
        value, gradient = at.gradient(move(weights, scales, e))
        return value, [g * c for g, c in zip(gradient, scales, strict=True)]

    best, slope = evaluate(start)
    point = start
    for _ in range(steps):
        ahead = [v + d for v, d in zip(point, ascent_step(slope, size, norm), strict=True)]
        candidate = project(ahead, rho, norm)
        value, new_slope = evaluate(candidate)
        if bool(value > best):
            best, slope, point = value, new_slope, candidate
        else:
            size /= 2
    return best
