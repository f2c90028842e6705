"""Criteria: what a batch is trained on, clean or attacked.

Labels are class indices `(batch,)` or class probabilities `(batch, classes)`, as mixup and label
smoothing make them; `MART` takes indices alone.
"""

from typing import Annotated

from pydantic import Field

from flatreg.criteria.clean import CrossEntropy
from flatreg.criteria.mart import MART
from flatreg.criteria.pgd import PGDAT
from flatreg.criteria.single_step import FGSMRS, NFGSM
from flatreg.criteria.trades import TRADES

Criterion = Annotated[
    CrossEntropy | NFGSM | FGSMRS | PGDAT | TRADES | MART, Field(discriminator="kind")
]

__all__ = ["FGSMRS", "MART", "NFGSM", "PGDAT", "TRADES", "Criterion", "CrossEntropy"]
