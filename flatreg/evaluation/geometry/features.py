"""Flatness as a bound on the loss in feature space, beside the loss itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatreg.data.loading import rank_and_world
from flatreg.evaluation.geometry.by_outcome import flatness_by_confidence, flatness_by_outcome
from flatreg.evaluation.geometry.card import Band, BoundsPart, KappaPart, Spread
from flatreg.evaluation.geometry.sharded import Survey, gathered
from flatreg.measures.feature_bound import bound_curve, feature_radius
from flatreg.measures.lipschitz import feature_displacement, lipschitz_estimate
from flatreg.models.forward import run_forward
from flatreg.models.heads import find_head

# Of the median feature radius: far below 1 the local bound is tight.
_SHARES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
_CURVES = ("local_bound", "relative_bound", "global_bound", "worst_loss")


def kappa_part(survey: Survey) -> KappaPart:
    """Relative flatness by outcome and by confidence.

    Raises:
        ValueError: the model has no linear head.
    """
    passes = survey.passes
    by_outcome = flatness_by_outcome(passes)
    scale = by_outcome.scale
    matched = flatness_by_confidence(passes, scale=scale) if scale else []
    return KappaPart(by_outcome, flatness_by_confidence(passes), matched)


def bounds_part(survey: Survey) -> BoundsPart:
    """Bounds on the loss over radii in feature space, and how far an eps-ball may reach.

    Raises:
        ValueError: the model has no linear head.
    """
    passes = survey.passes
    distances = feature_radius(passes.logits, passes.labels, passes.weight)
    radii = survey.radii or _default_radii(distances)
    position = {index: row for row, index in enumerate(survey.indices)}
    rank, world = rank_and_world()
    share = torch.tensor([position[index] for index in survey.probed[rank::world]]).long()
    device = next(survey.model.parameters(), torch.empty(0)).device

    def columns() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in _CURVES}
        for rows in torch.split(share, survey.batch_size):
            if not len(rows):
                continue
            curve = bound_curve(
                passes.logits[rows].to(device),
                passes.labels[rows].to(device),
                passes.weight.to(device),
                radii,
            )
            for name in _CURVES:
                found[name].append(getattr(curve, name).T.cpu())
        return found

    merged = {name: Band.of(torch.cat(rows)) for name, rows in gathered(columns).items()}
    lipschitz, refused = _lipschitz(survey)
    reach = None
    if lipschitz:
        reach = float(feature_displacement(lipschitz.median, survey.eps, "linf", survey.shape))
    return BoundsPart(
        radii=list(radii),
        feature_radius=Spread.of(distances),
        lipschitz=lipschitz,
        lipschitz_kind="estimate",
        lipschitz_refused=refused,
        reach=reach,
        **merged,
    )


def _default_radii(distances: Tensor) -> tuple[float, ...]:
    """From 0 to twice the median distance at which a right prediction may change."""
    inside = distances[(distances > 0) & distances.isfinite()]
    scale = float(inside.median()) if len(inside) else 1.0
    return tuple(scale * share for share in _SHARES)


def _lipschitz(survey: Survey) -> tuple[Spread | None, str | None]:
    """Largest stretch of the features found at each probed sample, or why there is none."""

    def columns() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"stretch": []}
        head = None
        for number, batch in survey.blocks("bounds"):
            head = head or find_head(survey.model, batch.inputs)

            def features_at(inputs: Tensor, head: Any = head, labels: Tensor = batch.labels) -> Any:
                return run_forward(survey.model, inputs, labels, head).features

            seed = survey.seed * 2**20 + number
            stretch = lipschitz_estimate(features_at, batch.inputs, seed=seed).value
            found["stretch"].append(torch.as_tensor(stretch).cpu())
        return found

    try:
        return Spread.of(torch.cat(gathered(columns)["stretch"])), None
    except ValueError as error:
        return None, str(error)
