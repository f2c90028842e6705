"""Claims of a paper as conditions fixed beforehand, judged on the trained models of a run."""

from typing import Annotated

from pydantic import Field

from flatreg.claims.beyond_flatness import BeyondFlatness
from flatreg.claims.closed_form import ClosedForm
from flatreg.claims.files import claim_text, read_claim, write_claim
from flatreg.claims.label_blind import LabelBlind
from flatreg.claims.local_bound import LocalBound
from flatreg.claims.result import Check, ClaimResult, Trained, Verdict
from flatreg.claims.scaled_head import ScaledHead
from flatreg.claims.uncanny_valley import UncannyValley

Claim = Annotated[
    ClosedForm | LocalBound | UncannyValley | LabelBlind | ScaledHead | BeyondFlatness,
    Field(discriminator="kind"),
]

__all__ = [
    "BeyondFlatness",
    "Check",
    "Claim",
    "ClaimResult",
    "ClosedForm",
    "LabelBlind",
    "LocalBound",
    "ScaledHead",
    "Trained",
    "UncannyValley",
    "Verdict",
    "claim_text",
    "read_claim",
    "write_claim",
]
