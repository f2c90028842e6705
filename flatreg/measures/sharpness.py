r"""Sharpness of the whole network: how the mean loss rises around the weights.

.. math:: \max_{\|\delta / c\| \le \rho} L(w + \delta) - L(w) , \qquad
          \mathbb{E}_{\delta \sim N(0, \sigma^2 \operatorname{diag} c^2)} L(w + \delta) - L(w)

with c = 1, or c = |w| (adaptive): entry by entry, so that rescalings of ReLU layers which leave the
function alone leave the sharpness alone. Andriushchenko, Croce, Müller, Hein, Flammarion, "A modern
look at the relationship between sharpness and generalization", ICML 2023. The maximum over batches
of m samples, averaged over the batches, is their m-sharpness.

The model is evaluated in eval mode at other weights by a functional call; its own stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from flatreg.data.configuration import number, switch, whole
from flatreg.measures.estimate import Estimate
from flatreg.measures.parameters import LossInWeights, SampleLoss, Vector, gaussian, inner
from flatreg.models.forward import local_module
from flatreg.models.precision import cross_entropy
from flatreg.models.state import untouched

BallNorm = Literal["l2", "linf"]
Batches = Iterable[tuple[Tensor, Tensor]]


def worst_case_sharpness(
    model: nn.Module,
    batches: Batches,
    *,
    rho: float,
    norm: BallNorm = "l2",
    adaptive: bool = False,
    steps: int = 20,
    restarts: int = 1,
    loss: SampleLoss = cross_entropy,
    seed: int = 0,
) -> Estimate:
    """Largest rise of a batch's mean loss found within the ball, averaged over the batches.

    Projected gradient ascent that goes back to its best point and halves its step wherever the loss
    did not rise: `steps` gradients from the weights themselves, then `restarts` times from a random
    point of the sphere. A lower bound on the maximum, never below 0.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        batches: pairs of inputs and labels.
        rho: radius: L2 over all parameters together, or Linf of each entry; in units of the
            weights, relative to |w| if `adaptive`.
        norm: "l2" or "linf".
        adaptive: scale the ball by |w|, entry by entry.
        steps: gradients per start.
        restarts: further starts.
        loss: `(logits, labels) -> (batch,)`.
        seed: of the random starts.

    Returns:
        Mean over the batches with its standard error (nan for one batch).

    Raises:
        ValueError: `rho` is negative, `norm` unknown, or there is no batch.
    """
    rho = number("rho", rho, "[0, inf)")
    if norm not in ("l2", "linf"):
        raise ValueError(f'norm must be "l2" or "linf", got {norm!r}')
    steps, restarts = whole("steps", steps, 1), whole("restarts", restarts, 0)
    adaptive = switch("adaptive", adaptive)

    def rise(at: LossInWeights) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        weights = list(at.weights.values())
        scales = _scales(weights, adaptive)
        starts = [[torch.zeros_like(w) for w in weights]]
        for _ in range(restarts):
            starts.append(_ascent_step(gaussian(weights, generator), rho, norm))
        found = [_ascend(at, scales, start, rho, norm, steps) for start in starts]
        base = at.gradient(weights)[0]
        return (torch.stack(found).amax() - base).clamp_min(0)

    return Estimate.mean(_over_batches(model, batches, loss, rise)[0])


def average_case_sharpness(
    model: nn.Module,
    batches: Batches,
    *,
    std: float,
    num_draws: int = 32,
    adaptive: bool = False,
    loss: SampleLoss = cross_entropy,
    seed: int = 0,
) -> Estimate:
    """Mean rise of the mean loss under Gaussian noise on the weights; negative if it falls.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        batches: pairs of inputs and labels; all see the same noise, each counts by its samples.
        std: standard deviation of the noise, relative to |w| if `adaptive`.
        num_draws: of the noise.
        adaptive: scale the noise by |w|, entry by entry.
        loss: `(logits, labels) -> (batch,)`.
        seed: of the noise.

    Returns:
        Mean over the draws with its standard error, which does not cover the choice of samples.

    Raises:
        ValueError: `std` is negative, `num_draws` below 1, or there is no batch.
    """
    std = number("std", std, "[0, inf)")
    num_draws, adaptive = whole("num_draws", num_draws, 1), switch("adaptive", adaptive)

    def rises(at: LossInWeights) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        weights = list(at.weights.values())
        scales = _scales(weights, adaptive)
        with torch.no_grad():
            base = at(weights)
            found = []
            for _ in range(num_draws):
                noise = [std * draw for draw in gaussian(weights, generator)]
                found.append(at(_moved(weights, scales, noise)) - base)
            return torch.stack(found)

    found, sizes = _over_batches(model, batches, loss, rises)
    return Estimate.mean((found.double() * (sizes / sizes.sum())[:, None]).sum(0))


def _over_batches(
    model: nn.Module, batches: Batches, loss: SampleLoss, measure: Callable[[LossInWeights], Tensor]
) -> tuple[Tensor, Tensor]:
    """`measure` of every batch, stacked, and the sizes of the batches."""
    found, sizes = [], []
    with untouched(local_module(model)):
        for inputs, labels in batches:
            found.append(measure(LossInWeights.of(model, inputs, labels, loss)))
            sizes.append(float(len(inputs)))
    if not found:
        raise ValueError("batches: expected at least one, got none")
    return torch.stack(found), torch.tensor(sizes, dtype=torch.float64, device=found[0].device)


def _scales(weights: Vector, adaptive: bool) -> Vector:
    return [w.detach().abs() if adaptive else torch.ones_like(w) for w in weights]


def _moved(weights: Vector, scales: Vector, e: Vector) -> Vector:
    """The point w + c e, detached."""
    return [w.detach() + c * v for w, c, v in zip(weights, scales, e, strict=True)]


def _ascent_step(slope: Vector, size: float, norm: BallNorm) -> Vector:
    """Steepest direction of length `size`; zero where the slope is."""
    if norm == "linf":
        return [size * g.sign() for g in slope]
    length = inner(slope, slope).sum().sqrt()
    return [(size * g / torch.where(length > 0, length, 1)).to(g.dtype) for g in slope]


def _projected(e: Vector, rho: float, norm: BallNorm) -> Vector:
    """Nearest point of the ball of radius `rho`."""
    if norm == "linf":
        return [v.clamp(-rho, rho) for v in e]
    length = inner(e, e).sum().sqrt()
    return [(v * torch.where(length > rho, rho / length, 1)).to(v.dtype) for v in e]


def _ascend(
    at: LossInWeights, scales: Vector, start: Vector, rho: float, norm: BallNorm, steps: int
) -> Tensor:
    """Largest loss found from `start`, in the coordinates e = delta / c where the ball is round."""
    weights, size = list(at.weights.values()), 2 * rho

    def evaluate(e: Vector) -> tuple[Tensor, Vector]:
        value, gradient = at.gradient(_moved(weights, scales, e))
        return value, [g * c for g, c in zip(gradient, scales, strict=True)]

    best, slope = evaluate(start)
    point = start
    for _ in range(steps):
        ahead = [v + d for v, d in zip(point, _ascent_step(slope, size, norm), strict=True)]
        candidate = _projected(ahead, rho, norm)
        value, new_slope = evaluate(candidate)
        if bool(value > best):
            best, slope, point = value, new_slope, candidate
        else:
            size /= 2
    return best
