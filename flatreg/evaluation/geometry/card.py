"""The geometry card of a model: what `measure` finds, as plain numbers that read back from JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.evaluation.geometry.by_outcome import ConfidenceBin, FlatnessByOutcome, estimate
from flatreg.measures.estimate import Estimate
from flatreg.measures.layer_flatness import NetworkFlatness

SCHEMA = 1
_CONFIG = ConfigDict(ser_json_inf_nan="strings")  # a feature radius may be infinite


@dataclass(frozen=True, config=_CONFIG)
class Spread:
    """Quartiles over samples, and their mean with its standard error (None for fewer than two)."""

    lower: float
    median: float
    upper: float
    mean: Estimate | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Of a `(n,)` tensor.

        >>> Spread.of(torch.arange(5.0)).median
        2.0
        """
        values = values.detach().double()
        finite = bool(values.isfinite().all())
        lower, median, upper = _quartiles(values)
        return cls(lower, median, upper, estimate(values) if finite else None, len(values))


@dataclass(frozen=True, config=_CONFIG)
class Band:
    """Quartiles over samples at every radius."""

    lower: list[float]
    median: list[float]
    upper: list[float]

    @classmethod
    def of(cls, values: Tensor) -> Band:
        """Of a `(samples, radii)` tensor."""
        rows = [_quartiles(column) for column in values.detach().double().unbind(1)]
        lower, median, upper = (list(column) for column in zip(*rows, strict=True))
        return cls(lower, median, upper)


@dataclass(frozen=True)
class KappaPart:
    """Relative flatness of the last layer; larger means sharper.

    Attributes:
        by_outcome: raw and at matched confidence, over right, wrong and attacked samples.
        by_confidence: raw, in bins of confidence.
        by_confidence_matched: the same with logits and head scaled; empty where no scale does it.
    """

    by_outcome: FlatnessByOutcome
    by_confidence: list[ConfidenceBin]
    by_confidence_matched: list[ConfidenceBin]


@dataclass(frozen=True)
class LayersPart:
    """Relative flatness and trace of every layer, of the mean loss of n samples.

    The standard errors are over probes: they do not cover the choice of the samples.
    """

    hessian: NetworkFlatness
    gauss_newton: NetworkFlatness
    n: int


@dataclass(frozen=True, config=_CONFIG)
class Directions:
    """Curvature of the loss in the input within a linear space of directions, over samples.

    Curvatures are second derivatives along unit vectors: loss per squared L2 input unit, signed.

    Attributes:
        dimension: of the space.
        slope: length of the gradient's projection onto the space.
        curvature: mean over the space, trace / dimension.
        along_gradient: along that projection.
        top: largest.
        residual: median over samples of what Lanczos left open in `top`.
    """

    dimension: int
    slope: Spread
    curvature: Spread
    along_gradient: Spread
    top: Spread
    residual: float


@dataclass(frozen=True)
class CurvaturePart:
    """Curvature of the loss in the input, on and off the data manifold.

    Attributes:
        manifold: which, with its settings.
        explained_variance: share of the training images' variance on it; None where there is none.
        on: along the manifold; None for one without tangent directions.
        off: away from it.
    """

    manifold: str
    explained_variance: float | None
    on: Directions | None
    off: Directions


@dataclass(frozen=True, config=_CONFIG)
class BoundsPart:
    """How far flatness bounds the loss in feature space, and what is the case.

    Attributes:
        radii: L2 lengths in feature space.
        local_bound: bound on the loss from slope and largest curvature here.
        relative_bound: the same from relative flatness.
        global_bound: bound from the distances of the class weights.
        worst_loss: largest loss found, a lower bound on the largest.
        feature_radius: how far the features can move before the prediction may change; exact,
            negative for samples that are wrong.
        lipschitz: largest stretch of the features found at each sample; an **estimate**, a lower
            bound on the Lipschitz constant. None where `lipschitz_refused` says why.
        lipschitz_kind: what these numbers are worth.
        reach: radius in feature space of the Linf ball of eps, by the median of that estimate.
    """

    radii: list[float]
    local_bound: Band
    relative_bound: Band
    global_bound: Band
    worst_loss: Band
    feature_radius: Spread
    lipschitz: Spread | None
    lipschitz_kind: Literal["estimate"]
    lipschitz_refused: str | None
    reach: float | None


@dataclass(frozen=True)
class Radius:
    """Of a perturbation of the weights: relative to |w|, entry by entry, if `adaptive`."""

    rho: float
    adaptive: bool


@dataclass(frozen=True)
class Rise:
    """Rise of the mean loss when the weights are perturbed.

    Attributes:
        kind: "worst case", L2 over all weights together, averaged over blocks of images; "average"
            over Gaussian noise on every weight.
        radius: of the ball, or standard deviation of the noise.
        value: of the rise.
        stderr: of `value`, over blocks or draws of the noise; None for one of them.
        n: blocks or draws.
    """

    kind: Literal["worst case", "average"]
    radius: Radius
    value: float
    stderr: float | None
    n: int

    @classmethod
    def of(cls, kind: Literal["worst case", "average"], radius: Radius, draws: Tensor) -> Rise:
        """Mean over `(n,)` blocks or draws."""
        found = estimate(draws)
        return cls(kind, radius, float(draws.mean()), found.stderr if found else None, len(draws))


@dataclass(frozen=True)
class SharpnessPart:
    """Sharpness of the whole network, of the mean loss of n images.

    Attributes:
        rises: worst-case and average, plain and adaptive.
        top_eigenvalue: of the Hessian in all weights, with its residual.
        trace: of the Hessian in all weights; the standard error is over probes.
        hessian_refused: why the two are None.
        n: images.
    """

    rises: list[Rise]
    top_eigenvalue: Estimate | None
    trace: Estimate | None
    hessian_refused: str | None
    n: int


@dataclass(frozen=True)
class GeometryCard:
    """What `measure` found about one model; a part that was not taken is None.

    Attributes:
        schema: raised when a field changes its meaning.
        model: its name.
        parameters: how many it has.
        data: name of the data.
        n: samples for what takes forward passes.
        probed: samples, out of those, for what differentiates twice.
        eps: Linf radius of the attack, in [0,1] pixel units.
        seed: of the subset, the attack and the probes.
        kappa, layers, curvature, bounds, sharpness: the parts.
        refused: why this model cannot be measured so, by part.
        notes: what to keep in mind when reading it.
        seconds: wall-clock by part.
        versions: of what computed it.
    """

    schema: int
    model: str
    parameters: int
    data: str
    n: int
    probed: int
    eps: float
    seed: int
    kappa: KappaPart | None
    layers: LayersPart | None
    curvature: CurvaturePart | None
    bounds: BoundsPart | None
    sharpness: SharpnessPart | None
    refused: dict[str, str]
    notes: list[str]
    seconds: dict[str, float]
    versions: dict[str, str]


def _quartiles(values: Tensor) -> Sequence[float]:
    """Nearest sample to each quartile: between two infinite ones nothing can be interpolated."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype, device=values.device)
    found: list[float] = values.quantile(quartiles, interpolation="nearest").tolist()
    return found
