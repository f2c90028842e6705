"""Measure the geometry of a model: one card with everything flatreg can say about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flatreg.data.loading import batches, map_style, rank_and_world, subset
from flatreg.evaluation.geometry.card import SCHEMA, GeometryCard
from flatreg.evaluation.geometry.features import bounds_part, kappa_part
from flatreg.evaluation.geometry.inputs import curvature_part, tangent_dimension
from flatreg.evaluation.geometry.sharded import Part, Survey
from flatreg.evaluation.geometry.weights import layers_part, sharpness_part
from flatreg.evaluation.results import versions
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import is_piecewise_linear
from flatreg.models.forward import local_module
from flatreg.models.state import untouched
from flatreg.threat import check_eps

PARTS: tuple[Part, ...] = get_args(Part)
_TAKE: dict[Part, Callable[[Survey], Any]] = {
    "kappa": kappa_part,
    "layers": layers_part,
    "curvature": curvature_part,
    "bounds": bounds_part,
    "sharpness": sharpness_part,
}
_KINKS = (
    "activations are piecewise linear (ReLU): between their kinks the network is linear in its "
    "input, and second derivatives see the curvature of the softmax only"
)


def measure(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: float,
    samples: int | None = 512,
    probed: int = 64,
    manifold: Manifold | None = None,
    num_probes: int = 32,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 128,
    parts: Iterable[Part] = PARTS,
    name: str | None = None,
    data_name: str | None = None,
    notes: Iterable[str] = (),
    progress: bool = True,
) -> GeometryCard:
    """Measure the geometry of a classifier; **larger numbers mean sharper** wherever they are.

    The model is evaluated in eval mode and left untouched. Where a process group exists the samples
    are shared out and every process returns the whole card; random directions are keyed so that
    neither the number of processes nor the batch size changes a number beyond rounding.

    Args:
        model: images in [0,1] to logits; a DDP wrapper too. In float32.
        data: map-style dataset of (image, label), or a loader of one; images are uint8 or in [0,1].
        eps: Linf radius of the attack that makes the "attacked" samples, in [0,1] pixel units.
        samples: size of a fixed, seeded subset, for what takes forward passes; None for all.
        probed: how many of them are used for what differentiates twice; the largest eigenvalue of
            the Hessian takes them as one batch.
        manifold: fitted; left out, every direction in the input is off the manifold.
        num_probes: random directions an estimate, two at least.
        radii: L2 lengths in feature space for the bounds; left out, up to twice the median distance
            at which a prediction may change.
        seed: of the subset, the attack and the probes.
        batch_size: samples at a time.
        parts: which to take.
        name: of the model, for the card.
        data_name: of the data, for the card.
        notes: for the card.
        progress: show bars.

    Returns:
        The card. A part that this model refuses is named there with the reason.

    Raises:
        ValueError: an unknown part, too few probes, images or eps outside [0,1], a negative radius,
            an iterable dataset, a model in half precision.
    """
    check_eps(eps)
    wanted = set(parts)
    _check(wanted, num_probes, probed, radii, manifold)
    taken = [part for part in PARTS if part in wanted]
    dataset, loading = map_style(data)
    indices = subset(len(dataset), samples, seed)  # type: ignore[arg-type]
    few = [indices[row] for row in subset(len(indices), probed, seed)]
    module = local_module(model)
    remarks = list(notes)
    results: dict[str, Any] = {}
    refused: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with untouched(module):
        first = next(batches(module, dataset, indices[:2], 2, loading)).inputs
        survey = Survey(
            model=module,
            dataset=dataset,
            loading=loading,
            indices=indices,
            probed=few,
            shape=tuple(first.shape[1:]),
            eps=eps,
            manifold=manifold or IdentityManifold(),
            radii=None if radii is None else tuple(radii),
            num_probes=num_probes,
            seed=seed,
            batch_size=batch_size,
            progress=progress and rank_and_world()[0] == 0,
        )
        if "curvature" in taken:
            with torch.enable_grad():
                kinked = is_piecewise_linear(module(first.requires_grad_()))
            remarks += [_KINKS] if kinked else []
        for part in taken:
            started = time.perf_counter()
            try:
                results[part] = _TAKE[part](survey)
            except ValueError as error:
                refused[part] = str(error)
            seconds[part] = time.perf_counter() - started
    return GeometryCard(
        schema=SCHEMA,
        model=name or type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        data=data_name or type(dataset).__name__,
        n=len(indices),
        probed=len(few),
        eps=eps,
        seed=seed,
        **{part: results.get(part) for part in PARTS},
        refused=refused,
        notes=remarks,
        seconds=seconds,
        versions=versions(),
    )


def _check(
    parts: set[Part],
    num_probes: int,
    probed: int,
    radii: Sequence[float] | None,
    manifold: Manifold | None,
) -> None:
    unknown = parts - set(PARTS)
    if unknown:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {unknown.pop()}")
    if num_probes < 2 or probed < 1:
        raise ValueError(f"expected num_probes >= 2 and probed >= 1, got {num_probes} and {probed}")
    if radii is not None and (not radii or not all(r >= 0 for r in radii)):
        raise ValueError(f"radii must be lengths >= 0, got {list(radii)}")
    if manifold is not None:
        tangent_dimension(manifold)
