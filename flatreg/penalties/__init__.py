"""Penalties: strength times a measure, added to the criterion.

Every penalty is taken at the scale of what it bounds (of the eps-ball, of a relative change of the
weights), so that it has the unit of the loss and one strength serves several models and eps.
"""

from typing import Annotated

from pydantic import Field

from flatreg.penalties.baselines import GradAlign, JacobianNorm, LocalLinearity
from flatreg.penalties.curvature import OffManifoldConfidence, OffManifoldCurvature
from flatreg.penalties.flatness import LayerFlatness, RelativeFlatness
from flatreg.penalties.margin import InputGradient, MarginBound

Penalty = Annotated[
    RelativeFlatness
    | LayerFlatness
    | InputGradient
    | OffManifoldCurvature
    | OffManifoldConfidence
    | MarginBound
    | GradAlign
    | LocalLinearity
    | JacobianNorm,
    Field(discriminator="kind"),
]

__all__ = [
    "GradAlign",
    "InputGradient",
    "JacobianNorm",
    "LayerFlatness",
    "LocalLinearity",
    "MarginBound",
    "OffManifoldConfidence",
    "OffManifoldCurvature",
    "Penalty",
    "RelativeFlatness",
]
