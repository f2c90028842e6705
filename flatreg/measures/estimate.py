"""A number that was estimated, and how well."""

from __future__ import annotations

import math

from pydantic.dataclasses import dataclass
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` independent draws (samples or probes) and its standard error; nan for n = 1."""

    value: float
    stderr: float
    n: int

    @classmethod
    def of(cls, draws: Tensor) -> Estimate:
        """Of a `(n,)` tensor of independent draws.

        >>> import torch
        >>> Estimate.of(torch.tensor([1.0, 3.0]))
        Estimate(value=2.0, stderr=1.0, n=2)
        """
        draws = draws.detach().double()
        n = len(draws)
        stderr = float(draws.std()) / n**0.5 if n > 1 else math.nan
        return cls(float(draws.mean()), stderr, n)

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.1g}"
