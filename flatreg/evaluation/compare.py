r"""Two models on the same samples: is one more accurate, or were its samples kinder?

Intervals of two accuracies may overlap where the difference is beyond doubt: on the same samples
the two rise and fall together, and only the samples on which they disagree speak.

.. math:: \Delta = \frac{n_{01} - n_{10}}{n}, \qquad
          p = \min\Big(1,\ 2 \sum_{k \le \min(n_{01}, n_{10})}
              \binom{n_{01} + n_{10}}{k} 2^{-(n_{01} + n_{10})}\Big)

with n_01 samples right in the other model only, n_10 in the one only, of n.

McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 1947; Dietterich, "Approximate statistical tests for comparing
supervised classification learning algorithms", Neural Computation 1998. The interval: Efron,
"Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from flatreg.evaluation.results import Evaluation

_AT_ONCE = 2**22  # samples drawn at a time: 32 MB


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the other model minus that of the one, on the same samples.

    Attributes:
        value: the difference, in [-1, 1].
        low: 2.5th percentile of its bootstrap.
        high: 97.5th percentile.
        only_one: samples that the one has right and the other wrong.
        only_other: samples that the other has right and the one wrong.
        p_value: of McNemar's exact test, two-sided: how often a fair coin would split the samples
            they disagree on at least as unevenly.
    """

    value: float
    low: float
    high: float
    only_one: int
    only_other: int
    p_value: float

    def __str__(self) -> str:
        value, low, high = (100 * x for x in (self.value, self.low, self.high))
        return (
            f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], p = {self.p_value:.2g} "
            f"({self.only_other} won, {self.only_one} lost)"
        )


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        eps: radius in [0,1] pixel units.
        norm: of the ball.
        n: samples.
        attacked: difference of attacked accuracy; each is an upper bound under its own cascade.
        clean: difference of clean accuracy.
        draws: resamples of the bootstrap.
        seed: of the bootstrap.
    """

    eps: float
    norm: str
    n: int
    attacked: PairedDifference
    clean: PairedDifference
    draws: int
    seed: int

    def __str__(self) -> str:
        head = f"{self.norm} eps {self.eps:.4g}, n = {self.n}: "
        return f"{head}attacked {self.attacked}\n{'':<{len(head)}}clean    {self.clean}"


def compare(
    one: Evaluation, other: Evaluation, *, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two models, sample by sample.

    Attacked accuracies are comparable under the same cascade only; a stronger one against `other`
    counts against it.

    Args:
        one: the baseline.
        other: the same samples, eps and norm; a positive difference is in its favour.
        draws: resamples of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: the evaluations differ in their indices, labels, eps or norm; no draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    for name in ("norm", "eps"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"expected evaluations of the same {name}, got {ours} and {theirs}")
    if one.indices != other.indices:
        raise ValueError(
            "expected evaluations of the same samples, their indices differ: "
            f"{_first_difference(one.indices, other.indices)}"
        )
    if one.labels != other.labels:
        raise ValueError(
            "expected evaluations of the same samples, their labels differ: "
            f"{_first_difference(one.labels, other.labels)}"
        )
    verdicts = np.array([one.verdicts, other.verdicts])
    return Comparison(
        eps=one.eps,
        norm=one.norm,
        n=verdicts.shape[1],
        attacked=_paired(verdicts == -1, draws, seed),
        clean=_paired(verdicts > -2, draws, seed),
        draws=draws,
        seed=seed,
    )


def _paired(right: NDArray[np.bool_], draws: int, seed: int) -> PairedDifference:
    """Difference between the rows of `right` `(2, n)`."""
    gain = right[1].astype(np.int8) - right[0].astype(np.int8)
    only_one, only_other = int((gain < 0).sum()), int((gain > 0).sum())
    disagree = only_one + only_other
    low, high = np.quantile(_resampled(gain, draws, seed), [0.025, 0.975])
    from scipy.stats import binomtest  # a second to import

    p_value = float(binomtest(only_one, disagree, 0.5).pvalue) if disagree else 1.0
    value = (only_other - only_one) / len(gain)
    return PairedDifference(value, float(low), float(high), only_one, only_other, p_value)


def _resampled(gain: NDArray[np.int8], draws: int, seed: int) -> NDArray[np.float64]:
    """Mean of each of `draws` resamples of `gain`.

    Drawn are samples and not counts, so that the swapped comparison sees the same resamples.
    """
    generator, n = np.random.default_rng(seed), len(gain)
    rows = max(1, _AT_ONCE // n)
    sums = [
        gain[generator.integers(n, size=(min(rows, draws - start), n))].sum(1, dtype=np.int64)
        for start in range(0, draws, rows)
    ]
    return np.concatenate(sums) / n


def _first_difference(one: list[int], other: list[int]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} samples"
    at = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return f"at position {at} stand {one[at]} and {other[at]}"
