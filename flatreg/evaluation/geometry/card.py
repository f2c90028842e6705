"""The geometry card of a model: what `measure` finds, as plain numbers that read back from JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from flatreg.evaluation.geometry.by_outcome import ConfidenceBin, FlatnessByOutcome
from flatreg.measures.estimate import Estimate, QuantileBand, Quartiles
from flatreg.measures.layer_flatness import NetworkFlatness
from flatreg.threat import Norm

Part = Literal["kappa", "layers", "curvature", "bounds", "sharpness"]
PARTS: tuple[Part, ...] = get_args(Part)
SCHEMA = 1
_CONFIG = ConfigDict(ser_json_inf_nan="strings")  # a bound may be infinite


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
    slope: Quartiles
    curvature: Quartiles
    along_gradient: Quartiles
    top: Quartiles
    residual: float


@dataclass(frozen=True)
class CurvaturePart:
    """Curvature of the loss in the input, on and off the data manifold.

    Attributes:
        manifold: which, with its settings.
        explained_variance: fraction of the training images' variance on it; None without manifold.
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

    The offsets of the bands are radii: L2 lengths in feature space.

    Attributes:
        local_bound: bound on the loss from slope and largest curvature here.
        relative_bound: the same from relative flatness.
        global_bound: bound from the distances of the class weights.
        worst_loss: largest loss found, a lower bound on the largest.
        feature_radius: how far the features can move before the prediction may change; exact,
            negative for samples that are wrong.
        lipschitz: largest stretch of the features found at each sample; an **estimate**, a lower
            bound on the Lipschitz constant. None where `lipschitz_refused` says why.
        lipschitz_kind: what these numbers are worth.
        reach: radius in feature space of the eps-ball of the attack, by the median of that
            estimate.
    """

    local_bound: QuantileBand
    relative_bound: QuantileBand
    global_bound: QuantileBand
    worst_loss: QuantileBand
    feature_radius: Quartiles
    lipschitz: Quartiles | None
    lipschitz_kind: Literal["estimate"]
    lipschitz_refused: str | None
    reach: float | None

    @property
    def radii(self) -> Sequence[float]:
        """At which the bounds are given."""
        return self.worst_loss.offsets


BOUND_CURVES = ("local_bound", "relative_bound", "global_bound", "worst_loss")


@dataclass(frozen=True)
class Radius:
    """Size of a perturbation of the weights: relative to |w|, entry by entry, if `adaptive`.

    `size` is the radius of the ball of a worst case, and the standard deviation of the noise of an
    average.
    """

    size: float
    adaptive: bool


@dataclass(frozen=True)
class Rise:
    """Rise of the mean loss when the weights are perturbed.

    Attributes:
        kind: "worst case", L2 over all weights together, averaged over blocks of images; "average"
            over Gaussian noise on every weight.
        radius: of the ball, or standard deviation of the noise.
        rise: in units of the loss; its n counts blocks, or draws of the noise.
    """

    kind: Literal["worst case", "average"]
    radius: Radius
    rise: Estimate


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
        eps: radius of the attack, in [0,1] pixel units.
        seed: of the subset, the attack and the probes.
        kappa, layers, curvature, bounds, sharpness: the parts.
        refused: why this model cannot be measured so, by part.
        notes: what to keep in mind when reading it.
        seconds: wall-clock by part.
        versions: of what computed it.
        norm: of the attack.
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
    norm: Norm
