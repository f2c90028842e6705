"""Training on the batch as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.criteria.losses import cross_entropy
from flatreg.terms import CONFIG, Need, Passes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CrossEntropy:
    """Cross-entropy of the clean batch."""

    kind: Literal["CrossEntropy"] = "CrossEntropy"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def __call__(self, passes: Passes) -> Tensor:
        """Loss per sample `(batch,)`."""
        return cross_entropy(passes["clean"])
