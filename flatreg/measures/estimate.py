"""A number that was estimated, how far it can be trusted, from how many draws; and quartiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

_NORMAL = 1.959963984540054  # 97.5th percentile of the standard normal
_CONFIG = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity and no nan


@dataclass(frozen=True, config=_CONFIG)
class Estimate:
    """A number with its 95% interval and the number of draws behind it.

    `kind` says what the interval is: of a `"mean"`, 1.96 standard errors on either side; of a
    `"share"`, Wilson's; of a `"median"`, the order statistics that enclose the true one 95 times of
    100; `"within"` encloses the value for certain; an `"exact"` number (a count, an extreme) has
    none.

    Attributes:
        value: the number.
        low: lower end of the interval.
        high: upper end.
        n: draws: samples, probes or trials.
        kind: see above.
    """

    value: float
    low: float
    high: float
    n: int
    kind: Literal["mean", "share", "median", "within", "exact"] = "exact"

    @classmethod
    def mean(cls, draws: Tensor) -> Estimate:
        """Mean of `(n,)` independent draws; the interval of a single one is nan.

        >>> import torch
        >>> str(Estimate.mean(torch.tensor([1.0, 3.0])))
        '2 ± 1'
        """
        draws = draws.detach().double()
        n = len(draws)
        reach = _NORMAL * float(draws.std()) / n**0.5 if n > 1 else math.nan
        value = float(draws.mean())
        return cls(value, value - reach, value + reach, n, "mean")

    @classmethod
    def share(cls, count: int, n: int) -> Estimate:
        """`count` of `n` trials, in [0, 1]; of no trial, nan.

        >>> str(Estimate.share(50, 100))
        '50.0% [40.4, 59.6]'
        """
        if not n:
            return cls(math.nan, 0.0, 1.0, 0, "share")
        from scipy.stats import binomtest  # a second to import

        interval = binomtest(count, n).proportion_ci(method="wilson")
        return cls(count / n, float(interval.low), float(interval.high), n, "share")

    @classmethod
    def median(cls, draws: Tensor) -> Estimate:
        """Median of `(n,)` independent draws; of none, nan.

        >>> import torch
        >>> str(Estimate.median(torch.arange(101.0)))
        '50 [40, 60]'
        """
        ordered, n = draws.detach().double().sort().values, len(draws)
        if not n:
            return cls(math.nan, math.nan, math.nan, 0, "median")
        from scipy.stats import binom  # a second to import

        rank = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)
        middle = float(ordered.quantile(0.5))
        return cls(middle, float(ordered[rank]), float(ordered[n - 1 - rank]), n, "median")

    @classmethod
    def within(cls, value: float, distance: float, n: int) -> Estimate:
        """What lies within `distance` of `value`, as an eigenvalue does within its residual."""
        return cls(value, value - distance, value + distance, n, "within")

    @classmethod
    def exact(cls, value: float, n: int) -> Estimate:
        """A count or an extreme, which estimates nothing."""
        return cls(value, value, value, n)

    @property
    def stderr(self) -> float:
        """Standard error of a mean; of the others half the interval over 1.96, as of a normal."""
        return (self.high - self.low) / (2 * _NORMAL)

    @property
    def count(self) -> int:
        """Trials of a share that succeeded."""
        return round(self.value * self.n)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        if self.kind == "mean":
            return f"{self.value:.3g} ± {self.stderr:.1g}"
        if self.kind == "within":
            return f"{self.value:.3g} (within {(self.high - self.low) / 2:.1g})"
        interval = "" if self.low == self.high else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True, config=_CONFIG)
class Quartiles:
    """Quartiles of a quantity over n samples; each is the value of a sample, so it may be infinite.

    `mean` is None for fewer than two samples and where a value is infinite.
    """

    lower: float
    median: float
    upper: float
    mean: Estimate | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Quartiles:
        """Of a `(n,)` tensor.

        >>> import torch
        >>> Quartiles.of(torch.arange(5.0)).median
        2.0
        """
        values = values.detach().double()
        averaged = len(values) > 1 and bool(values.isfinite().all())
        mean = Estimate.mean(values) if averaged else None
        return cls(*_quartiles(values, "nearest"), mean, len(values))


@dataclass(frozen=True, config=_CONFIG)
class QuantileBand:
    """Quartiles of a quantity over samples, at each offset along an axis.

    The axis of a path has the step of the attack, or the steps from the flip of the label; that of
    a bound has the distance in feature space.
    """

    offsets: Sequence[int | float]
    lower: list[float]
    median: list[float]
    upper: list[float]

    @classmethod
    def of(
        cls,
        columns: Iterable[tuple[float, Tensor]],
        interpolation: Literal["linear", "nearest"] = "linear",
    ) -> QuantileBand:
        """Of pairs of an offset and the values of the samples there, `(n,)`.

        `"nearest"` takes the value of a sample: between two infinite ones nothing can be
        interpolated.
        """
        found = [(at, _quartiles(values.double(), interpolation)) for at, values in columns]
        lower, median, upper = (list(q) for q in zip(*(q for _, q in found), strict=True))
        return cls([at for at, _ in found], lower, median, upper)


def _quartiles(values: Tensor, interpolation: str) -> tuple[float, float, float]:
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype, device=values.device)
    lower, median, upper = values.detach().quantile(levels, interpolation=interpolation).tolist()
    return lower, median, upper
