r"""Gauss-Newton trace of the loss in the input, on and off the data manifold, a number an arm.

The quantity of `flatreg.measures.fisher`, loss per squared input unit, at clean images:

.. math:: Tr(P G P) = E \|P J^T a\|^2, \qquad G = J^T (diag(p) - p p^T) J

J is the Jacobian of the logits in the input, p the softmax, a the random vectors of
`fisher_cotangents`. P projects off a PCA manifold of the training images, and for the part on it
onto it. G knows no label and is never negative. Measured, not trained on, it takes first
derivatives only, so that every differentiable model has it. Like kappa it moves with the scale of
the logits, so it is also given at matched confidence: the logits are scaled by one c at which
their median confidence is 0.9. **Larger means sharper.**
"""

from __future__ import annotations

import math

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.data.loading import subset
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.measures.estimate import Estimate
from flatreg.measures.input_curvature import fisher_cotangents
from flatreg.measures.manifold import PCAManifold
from flatreg.measures.relative_flatness import matching_scale
from flatreg.models.entrance import as_logits, pass_copy
from flatreg.models.precision import at_least_float32
from flatreg.models.state import untouched

CURVATURE_SAMPLES = 128
_RANK, _PROBES = 32, 8
_FITTED = 8192  # training images; more move the span of the first 32 components little


@dataclass(frozen=True)
class Sides:
    """Mean Gauss-Newton trace over the samples, loss per squared input unit."""

    off: Estimate
    on: Estimate


@dataclass(frozen=True)
class InputCurvature:
    """Gauss-Newton trace of the loss in the input at clean images; **larger means sharper**.

    Attributes:
        raw: of the model as it is.
        matched: at matched confidence; None where no scale reaches it.
        scale: c of the matched columns.
        rank: dimension of the manifold; `off` sums over the other `pixels - rank` directions.
        pixels: of an image, all channels.
        explained: share of the training images' variance on the manifold.
        probes: random signs a sample.
    """

    raw: Sides
    matched: Sides | None
    scale: float | None
    rank: int
    pixels: int
    explained: float
    probes: int


def data_manifold(images: Tensor) -> PCAManifold | None:
    """PCA manifold of the training images; None where they are too few, or of one pixel.

    Args:
        images: `(n, ...)`, uint8 or floats in [0,1].
    """
    rank = min(_RANK, len(images) - 1, images[0].numel() // 2 if len(images) else 0)
    if rank < 1:
        return None
    return PCAManifold(rank=rank).fit(images[subset(range(len(images)), _FITTED, 0)])


def measured_curvature(
    model: nn.Module,
    inputs: Tensor,
    manifold: PCAManifold | None,
    *,
    seed: int = 0,
    batch_size: int = CURVATURE_SAMPLES,
) -> InputCurvature | None:
    """Gauss-Newton trace at `inputs` of a model that is left untouched.

    Every process of a launch measures all samples; the result depends neither on their number nor
    on the batch size.

    Args:
        model: images in [0,1] to logits.
        inputs: `(n, ...)`.
        manifold: fitted.
        seed: of the signs.
        batch_size: samples at a time.

    Returns:
        None without a manifold, for fewer than two samples, where an operator of the model has no
        derivative, or where the result is not finite.
    """
    if manifold is None or manifold.fitted is None or len(inputs) < 2:
        return None
    try:
        with untouched(model):
            with torch.no_grad():
                logits = torch.cat([_logits(model, x) for x in torch.split(inputs, batch_size)])
            scale = matching_scale(logits, CONFIDENCE)
            signs = _signs(logits, seed)
            parts = (torch.split(values, batch_size) for values in (inputs, signs))
            chunks = list(zip(*parts, strict=True))
            sides = {
                c: _sides([_traces(model, x, xi, manifold, c) for x, xi in chunks])
                for c in (1.0, scale)
                if c is not None
            }
    except RuntimeError:  # no derivative, or none of a part
        return None
    raw = sides[1.0]
    if raw is None:
        return None
    return InputCurvature(
        raw=raw,
        matched=None if scale is None else sides[scale],
        scale=scale,
        rank=len(manifold.fitted.basis),
        pixels=inputs[0].numel(),
        explained=manifold.explained_variance,
        probes=_PROBES,
    )


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return as_logits(pass_copy(model, inputs), len(inputs))


def _signs(logits: Tensor, seed: int) -> Tensor:
    """Random signs `(batch, probes, classes)`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(logits), _PROBES, logits.shape[1])
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    return signs.to(logits.device, torch.promote_types(logits.dtype, torch.float32))


@torch.enable_grad()
def _traces(
    model: nn.Module, inputs: Tensor, signs: Tensor, manifold: PCAManifold, scale: float
) -> Tensor:
    """Traces per sample off and on the manifold `(2, batch)`, the logits scaled by `scale`."""
    points = inputs.detach().requires_grad_()
    logits = _logits(model, points)
    total = torch.zeros(2, len(inputs), dtype=torch.float64)
    scaled = scale * at_least_float32(logits.detach())
    for a in fisher_cotangents(scaled, signs.unbind(1)):
        (pulled,) = torch.autograd.grad(logits, points, a.to(logits), retain_graph=True)
        tangent, normal = manifold.split(points, scale * pulled)
        # In float64: the gradient of a confident sample underflows when squared.
        squares = [part.double().square().flatten(1).sum(1) for part in (normal, tangent)]
        total += torch.stack(squares).cpu()
    return total / signs.shape[1]


def _sides(traces: list[Tensor]) -> Sides | None:
    off, on = (Estimate.mean(side) for side in torch.cat(traces, 1))
    return Sides(off, on) if math.isfinite(off.value + on.value) else None
