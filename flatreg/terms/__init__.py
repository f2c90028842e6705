"""Terms: criteria, and penalties: strength times a measure, added to the criterion.

Every penalty is taken at the scale of what it bounds (of the eps-ball, of a relative change of the
weights), so that it has the unit of the loss and one strength serves several models and eps.
"""

from typing import Annotated

from pydantic import Field

from flatreg.terms.criteria import APGDAT, FGSMRS, MART, NFGSM, PGDAT, TRADES, Brier, CrossEntropy
from flatreg.terms.curvature import OffManifoldConfidence, OffManifoldCurvature
from flatreg.terms.fast_criteria import FGSMRSCS, LIET, NUAT
from flatreg.terms.flatness import LayerFlatness, RelativeFlatness
from flatreg.terms.input_slope import (
    GradAlign,
    InputGradient,
    JacobianNorm,
    LocalLinearity,
    MarginBound,
)
from flatreg.terms.stored_start import FGSMPGI

Criterion = Annotated[
    CrossEntropy
    | Brier
    | NFGSM
    | FGSMRS
    | FGSMRSCS
    | FGSMPGI
    | LIET
    | NUAT
    | PGDAT
    | APGDAT
    | TRADES
    | MART,
    Field(discriminator="kind"),
]
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
    "APGDAT",
    "FGSMPGI",
    "FGSMRS",
    "FGSMRSCS",
    "LIET",
    "MART",
    "NFGSM",
    "NUAT",
    "PGDAT",
    "TRADES",
    "Brier",
    "Criterion",
    "CrossEntropy",
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
