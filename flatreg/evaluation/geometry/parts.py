"""The parts of the geometry card, each measured on a `ShardedMeasurement`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from flatreg.data.sharing import Batch, rank_and_world
from flatreg.evaluation.geometry.by_outcome import flatness_by_confidence, flatness_by_outcome
from flatreg.evaluation.geometry.card import (
    BOUND_CURVES,
    BoundsPart,
    CurvaturePart,
    Directions,
    KappaPart,
    LayersPart,
    Part,
    Radius,
    Rise,
    SharpnessPart,
)
from flatreg.evaluation.geometry.sharded import ShardedMeasurement, gathered
from flatreg.measures.estimate import Estimate, QuantileBand, Quartiles
from flatreg.measures.feature_bound import bound_curve, feature_radius
from flatreg.measures.input_curvature import normal_direction
from flatreg.measures.input_hessian import directional_curvature, normal_trace, top_curvature
from flatreg.measures.layer_flatness import FlatnessDraws, combine_flatness, flatness_draws
from flatreg.measures.lipschitz import feature_displacement, lipschitz_estimate
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.measures.sharpness import average_case_sharpness, worst_case_sharpness
from flatreg.measures.weight_hessian import Matrix, hessian_top_eigenvalue, hessian_trace_estimate
from flatreg.models.derivative_check import check_derivatives
from flatreg.models.entrance import logits_of
from flatreg.models.forward import run_forward
from flatreg.models.precision import cross_entropy

_MATRICES: tuple[Matrix, ...] = ("hessian", "gauss_newton")
_LANCZOS_STEPS = 16
# Radii of the bounds in units of the median feature radius: far below 1 the local bound is tight.
_MULTIPLES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
# The worst cases' radii are what SAM and ASAM perturb by, L2 over all weights together; the
# averages' are standard deviations of each weight, absolute and relative.
_WORST = (Radius(0.05, False), Radius(0.5, True))
_AVERAGE = (Radius(0.01, False), Radius(0.1, True))


def kappa_part(on: ShardedMeasurement) -> KappaPart:
    """Relative flatness by outcome and by confidence.

    Raises:
        ValueError: the model has no linear head.
    """
    by_outcome = flatness_by_outcome(on.passes)
    scale = by_outcome.scale
    matched = flatness_by_confidence(on.passes, scale=scale) if scale else []
    return KappaPart(by_outcome, flatness_by_confidence(on.passes), matched)


def layers_part(on: ShardedMeasurement) -> LayersPart:
    """Relative flatness and trace of every layer, by the Hessian and its Gauss-Newton part.

    Raises:
        ValueError: no layer is linear, or an operator lacks a second derivative.
    """
    # Every batch sees the same probes, so sharing the samples out changes nothing.
    probes, seed = on.settings.num_probes, on.settings.seed
    measured = partial(flatness_draws, on.model, num_probes=probes, seed=seed)

    def draws(batch: Batch) -> dict[str, FlatnessDraws]:
        found = {k: measured(batch.inputs, batch.labels, matrix=k) for k in _MATRICES}
        names = ("kappa", "trace", "squared_norms")
        return {k: replace(d, **{n: getattr(d, n).cpu() for n in names}) for k, d in found.items()}

    merged = on.per_batch("layers", draws)
    hessian, gauss_newton = (combine_flatness(merged[kind]) for kind in _MATRICES)
    return LayersPart(hessian, gauss_newton, len(on.probed))


def curvature_part(on: ShardedMeasurement) -> CurvaturePart:
    """Trace, direction of the gradient and top curvature, in the tangent and the normal space.

    Raises:
        ValueError: an operator lacks a second derivative, or has a wrong one; the manifold is not
            fitted, or to other images; it leaves no direction off the manifold.
    """
    manifold, pixels = on.manifold, math.prod(on.shape)
    tangent = manifold.tangent_dimension
    sides: dict[str, tuple[Manifold, int]] = {"off": (manifold, pixels - tangent)}
    if tangent:
        sides["on"] = (cast(Any, _TangentFirst(manifold)), tangent)
    if tangent >= pixels:
        raise ValueError(f"the manifold has {tangent} of {pixels} dimensions: none is off it")

    def rows(number: int, batch: Batch) -> dict[str, Tensor]:
        def losses(inputs: Tensor) -> Tensor:
            return cross_entropy(logits_of(on.model, inputs), batch.labels)

        what = {"what": "the curvature", "alternative": "the other parts"}
        check_derivatives(on.model, batch.inputs, 2, "inputs", **what)
        probes = {"num_probes": on.settings.num_probes, "seed": _block_seed(on, number)}
        return {
            f"{side}.{name}": values.cpu()
            for side, (space, dimension) in sides.items()
            for name, values in _directions(
                losses, batch.inputs, space, dimension, **probes
            ).items()
        }

    columns = on.per_block("curvature", rows)
    merged = {name: torch.cat(values) for name, values in columns.items()}

    def directions(side: str) -> Directions:
        names = ("slope", "curvature", "along_gradient", "top")
        quartiles = {name: Quartiles.of(merged[f"{side}.{name}"]) for name in names}
        residual = float(merged[f"{side}.residual"].median())
        return Directions(dimension=sides[side][1], residual=residual, **quartiles)

    explained = None if isinstance(manifold, IdentityManifold) else manifold.explained_variance
    tangential = directions("on") if tangent else None
    return CurvaturePart(repr(manifold), explained, tangential, directions("off"))


def bounds_part(on: ShardedMeasurement) -> BoundsPart:
    """Bounds on the loss over radii in feature space, and how far an eps-ball may reach.

    Raises:
        ValueError: the model has no linear head.
    """
    clean, settings = on.passes.clean, on.settings
    distances = feature_radius(clean.logits, clean.labels, clean.weight)
    radii = list(settings.radii or _default_radii(distances))
    position = {index: row for row, index in enumerate(on.indices)}
    rank, world = rank_and_world()
    own = torch.tensor([position[index] for index in on.probed[rank::world]]).long()
    device = next(on.model.parameters(), torch.empty(0)).device

    def curves(rows: Tensor) -> dict[str, Tensor]:
        at = (clean.logits[rows], clean.labels[rows], clean.weight)
        logits, labels, weight = (tensor.to(device) for tensor in at)
        curve = bound_curve(logits, labels, weight, radii)
        return {name: getattr(curve, name).cpu() for name in BOUND_CURVES}

    parts = gathered(curves(rows) for rows in torch.split(own, settings.batch_size) if len(rows))
    bands = {
        name: QuantileBand.of(zip(radii, torch.cat(curve, 1), strict=True), "nearest")
        for name, curve in parts.items()
    }
    lipschitz, refused = _lipschitz(on)
    reach = None
    if lipschitz:
        ball = (settings.eps, settings.norm)
        reach = float(feature_displacement(lipschitz.median, *ball, on.shape))
    return BoundsPart(
        feature_radius=Quartiles.of(distances),
        lipschitz=lipschitz,
        lipschitz_kind="estimate",
        lipschitz_refused=refused,
        reach=reach,
        **bands,
    )


def sharpness_part(on: ShardedMeasurement) -> SharpnessPart:
    """How the loss rises around the weights, and how it curves there.

    The worst case is over blocks of 16 images, a maximum each (m-sharpness).
    """

    def rises(number: int, batch: Batch) -> dict[str, Any]:
        pairs, size = [(batch.inputs, batch.labels)], len(batch.indices)
        worst = partial(worst_case_sharpness, on.model, pairs, restarts=0)
        average = partial(average_case_sharpness, on.model, pairs, num_draws=1)
        return {
            "block": number,
            "size": size,
            "worst": [worst(rho=r.size, adaptive=r.adaptive).value for r in _WORST],
            "average": [
                [average(std=r.size, adaptive=r.adaptive, seed=s).value for s in _probe_seeds(on)]
                for r in _AVERAGE
            ],
        }

    merged = on.per_block("sharpness", rises)
    order = torch.tensor(merged["block"]).argsort()
    weights = torch.tensor(merged["size"]).double()[order] / sum(merged["size"])
    worst = torch.tensor(merged["worst"]).double()[order]  # (blocks, radii)
    average = torch.tensor(merged["average"]).double()[order]  # (blocks, radii, draws)
    averages = (weights[:, None, None] * average).sum(0)
    trace, top, refused = _hessian(on)
    return SharpnessPart(
        [Rise("worst case", w, Estimate.mean(worst[:, i])) for i, w in enumerate(_WORST)]
        + [Rise("average", a, Estimate.mean(averages[i])) for i, a in enumerate(_AVERAGE)],
        top,
        trace,
        refused,
        len(on.probed),
    )


MEASURE_PART: dict[Part, Callable[[ShardedMeasurement], Any]] = {
    "kappa": kappa_part,
    "layers": layers_part,
    "curvature": curvature_part,
    "bounds": bounds_part,
    "sharpness": sharpness_part,
}


def _block_seed(on: ShardedMeasurement, number: int) -> int:
    return on.settings.seed * 2**20 + number


def _probe_seeds(on: ShardedMeasurement) -> range:
    """A seed for each probe, the same for every block and batch."""
    return range(_block_seed(on, 0), _block_seed(on, on.settings.num_probes))


class _TangentFirst:
    """A manifold with tangent and normal spaces exchanged."""

    def __init__(self, manifold: Manifold) -> None:
        self.manifold = manifold

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        tangent, normal = self.manifold.split(inputs, vectors)
        return normal, tangent


def _directions(
    loss_at: Any, inputs: Tensor, space: Manifold, dimension: int, *, num_probes: int, seed: int
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
    unit = normal_direction(scaled, inputs, space)
    return {
        "slope": largest * scaled.flatten(1).norm(dim=1),
        "curvature": trace.values / dimension,
        "along_gradient": directional_curvature(loss_at, inputs, unit),
        "top": top.values,
        "residual": top.residuals,
    }


def _default_radii(distances: Tensor) -> tuple[float, ...]:
    """From 0 to twice the median distance at which a right prediction may change."""
    inside = distances[(distances > 0) & distances.isfinite()]
    scale = float(inside.median()) if len(inside) else 1.0
    return tuple(scale * multiple for multiple in _MULTIPLES)


def _lipschitz(on: ShardedMeasurement) -> tuple[Quartiles | None, str | None]:
    """Largest stretch of the features found at each probed sample, or why there is none."""

    def stretch(number: int, batch: Batch) -> dict[str, Tensor]:
        def features_at(inputs: Tensor) -> Tensor:
            # A copy: the model may normalise in place, and these are where derivatives are taken.
            return run_forward(on.model, inputs.clone(), batch.labels, on.head).features

        found = lipschitz_estimate(features_at, batch.inputs, seed=_block_seed(on, number))
        return {"stretch": torch.as_tensor(found.value).cpu()}

    try:
        return Quartiles.of(torch.cat(on.per_block("bounds", stretch)["stretch"])), None
    except ValueError as error:
        return None, str(error)


def _hessian(on: ShardedMeasurement) -> tuple[Estimate | None, Estimate | None, str | None]:
    """Trace and largest eigenvalue of the Hessian of the mean loss, or why there is none."""

    def traces(batch: Batch) -> dict[str, Any]:
        pair = (batch.inputs, batch.labels)
        measured = partial(hessian_trace_estimate, on.model, *pair, num_probes=1)
        values = [measured(seed=seed).value for seed in _probe_seeds(on)]
        return {"size": len(batch.indices), "trace": values}

    def largest() -> Iterator[dict[str, Estimate]]:
        if rank_and_world()[0] == 0:
            pair = on.one_batch()
            yield {"top": hessian_top_eigenvalue(on.model, *pair, seed=on.settings.seed)}

    try:
        merged = on.per_batch("Hessian", traces)
        weights = torch.tensor(merged["size"]).double() / sum(merged["size"])
        trace = (weights[:, None] * torch.tensor(merged["trace"]).double()).sum(0)
        return Estimate.mean(trace), gathered(largest())["top"][0], None
    except ValueError as error:
        return None, None, str(error)
