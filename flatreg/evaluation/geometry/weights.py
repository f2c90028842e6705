"""Flatness in the weights: layer by layer, and of the whole network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flatreg.data.loading import Batch, rank_and_world
from flatreg.evaluation.geometry.card import LayersPart, Radius, Rise, SharpnessPart
from flatreg.evaluation.geometry.sharded import Survey, gathered
from flatreg.measures.estimate import Estimate
from flatreg.measures.layer_flatness import FlatnessDraws, combine_flatness, flatness_draws
from flatreg.measures.sharpness import average_case_sharpness, worst_case_sharpness
from flatreg.measures.weight_hessian import (
    Matrix,
    hessian_top_eigenvalue,
    hessian_trace_estimate,
)

# The worst cases' radii are what SAM and ASAM perturb by, L2 over all weights together; the
# averages' are standard deviations of each weight, absolute and relative.
_WORST = (Radius(0.05, False), Radius(0.5, True))
_AVERAGE = (Radius(0.01, False), Radius(0.1, True))
_CURVATURES: tuple[Matrix, ...] = ("hessian", "gauss_newton")


def layers_part(survey: Survey) -> LayersPart:
    """Relative flatness and trace of every layer, by the Hessian and its Gauss-Newton part.

    Every batch sees the same probes, so that sharing the samples out changes nothing.

    Raises:
        ValueError: no layer is linear, or an operator lacks a second derivative.
    """

    def columns() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {kind: [] for kind in _CURVATURES}
        for batch in survey.batches("layers"):
            for kind in _CURVATURES:
                draws = flatness_draws(
                    survey.model,
                    batch.inputs,
                    batch.labels,
                    num_probes=survey.num_probes,
                    matrix=kind,
                    seed=survey.seed,
                )
                found[kind].append(_on_cpu(draws))
        return found

    merged = gathered(columns)
    hessian, gauss_newton = (combine_flatness(merged[kind]) for kind in _CURVATURES)
    return LayersPart(hessian, gauss_newton, len(survey.probed))


def sharpness_part(survey: Survey) -> SharpnessPart:
    """How the loss rises around the weights, and how it curves there.

    The worst case is over blocks of 16 images, a maximum each (m-sharpness).
    """

    def columns() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"block": [], "size": [], "worst": [], "average": []}
        for number, batch in survey.blocks("sharpness"):
            found["block"].append(number)
            found["size"].append(len(batch.indices))
            for kind, rises in (("worst", _worst), ("average", _average)):
                found[kind].append(rises(survey, batch))
        return found

    merged = gathered(columns)
    order = torch.tensor(merged["block"]).argsort()
    shares = torch.tensor(merged["size"]).double()[order] / sum(merged["size"])
    worst = torch.tensor(merged["worst"]).double()[order]  # (blocks, radii)
    average = torch.tensor(merged["average"]).double()[order]  # (blocks, radii, draws)
    averages = (shares[:, None, None] * average).sum(0)
    trace, top, refused = _hessian(survey)
    return SharpnessPart(
        [Rise.of("worst case", w, worst[:, i]) for i, w in enumerate(_WORST)]
        + [Rise.of("average", a, averages[i]) for i, a in enumerate(_AVERAGE)],
        top,
        trace,
        refused,
        len(survey.probed),
    )


def _worst(survey: Survey, batch: Batch) -> list[float]:
    """Largest rise of the loss of a block, a number for each radius."""
    pairs = [(batch.inputs, batch.labels)]
    return [
        worst_case_sharpness(
            survey.model, pairs, rho=radius.rho, adaptive=radius.adaptive, restarts=0
        ).value
        for radius in _WORST
    ]


def _average(survey: Survey, batch: Batch) -> list[list[float]]:
    """Rise of the loss of a block at each radius, under the draws that all blocks see."""
    pairs = [(batch.inputs, batch.labels)]

    def rise(radius: Radius, seed: int) -> float:
        return average_case_sharpness(
            survey.model, pairs, std=radius.rho, adaptive=radius.adaptive, num_draws=1, seed=seed
        ).value

    return [[rise(radius, seed) for seed in _seeds(survey)] for radius in _AVERAGE]


def _hessian(survey: Survey) -> tuple[Estimate | None, Estimate | None, str | None]:
    """Trace and largest eigenvalue of the Hessian of the mean loss, or why there is none."""

    def draws() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"size": [], "trace": []}
        for batch in survey.batches("Hessian"):
            found["size"].append(len(batch.indices))
            found["trace"].append(
                [
                    hessian_trace_estimate(
                        survey.model, batch.inputs, batch.labels, num_probes=1, seed=seed
                    ).value
                    for seed in _seeds(survey)
                ]
            )
        return found

    def largest() -> dict[str, list[Any]]:
        if rank_and_world()[0]:
            return {}
        inputs, labels = survey.everything()
        return {"top": [hessian_top_eigenvalue(survey.model, inputs, labels, seed=survey.seed)]}

    try:
        merged = gathered(draws)
        shares = torch.tensor(merged["size"]).double() / sum(merged["size"])
        trace = (shares[:, None] * torch.tensor(merged["trace"]).double()).sum(0)
        return Estimate.mean(trace), gathered(largest)["top"][0], None
    except ValueError as error:
        return None, None, str(error)


def _seeds(survey: Survey) -> range:
    """A seed for each probe."""
    return range(survey.seed * 2**20, survey.seed * 2**20 + survey.num_probes)


def _on_cpu(draws: FlatnessDraws) -> FlatnessDraws:
    return replace(
        draws,
        kappa=draws.kappa.cpu(),
        trace=draws.trace.cpu(),
        squared_norms=draws.squared_norms.cpu(),
    )
