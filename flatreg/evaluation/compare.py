r"""Paired comparison of two models: is one more accurate on the same samples?

Intervals of two accuracies may overlap where the difference is certain: on the same samples both
are right or wrong together, and only the samples on which they disagree count.

.. math:: \Delta = \frac{n_{01} - n_{10}}{n}, \qquad
          p = \min\Big(1,\ 2 \sum_{k \le \min(n_{01}, n_{10})}
              \binom{n_{01} + n_{10}}{k} 2^{-(n_{01} + n_{10})}\Big)

with n_01 samples right in the other model only, n_10 in the one only, of n. The interval holds all
differences d that the score test does not reject at 5%,

.. math:: \frac{(n_{01} - n_{10} - n d)^2}{n\,(2 q(d) + d (1 - d))} \le 1.96^2, \qquad
          q(d) = \frac{\sqrt{B^2 - 4 A C} - B}{2 A}

where q(d) is the likeliest probability of n_10 under d, with A = 2n, B = (2n + n_10 - n_01) d -
n_01 - n_10 and C = -n_10 d (1 - d). Where nothing is discordant it is +-1.96^2 / (n + 1.96^2).

Where the exact test does not reject a difference of 0 at 5%, the interval is extended to hold 0.
Where the exact test rejects it, the score test at d = 0 does so too: its statistic is
(n_01 - n_10)^2 / (n_01 + n_10), which is less strict. So the interval holds 0 exactly where
p >= 0.05.

McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 1947; Dietterich, "Approximate statistical tests for comparing
supervised classification learning algorithms", Neural Computation 1998. The interval: Tango,
"Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 1998.
"""

from __future__ import annotations

import math

from pydantic.dataclasses import dataclass

from flatreg.evaluation.results import Evaluation

_NORMAL = 1.959963984540054  # 97.5th percentile of the standard normal
_LEVEL = 0.05  # of the test and the interval
_BISECTIONS = 60  # of an end of the interval: to the last bit


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the other model minus that of the one, on the same samples.

    Attributes:
        value: the difference, in [-1, 1].
        low: lower end of its 95% interval, which holds 0 exactly where `p_value` >= 0.05.
        high: upper end.
        only_one: samples that the one has right and the other wrong.
        only_other: samples that the other has right and the one wrong.
        n: samples.
        p_value: of McNemar's exact test, two-sided: how often a fair coin would split the samples
            they disagree on at least as unevenly.
    """

    value: float
    low: float
    high: float
    only_one: int
    only_other: int
    n: int
    p_value: float

    @classmethod
    def of(cls, only_one: int, only_other: int, n: int) -> PairedDifference:
        """Difference by the samples of n on which the models disagree.

        >>> print(PairedDifference.of(6, 12, 200))
        no difference shown: +3.0 points [-1.3, +7.6], p = 0.24, 12 won and 6 lost of 200
        >>> print(PairedDifference.of(2, 12, 200))
        other more accurate: +5.0 points [+1.6, +9.3], p = 0.013, 12 won and 2 lost of 200
        """
        from scipy.stats import binomtest  # a second to import

        disagree = only_one + only_other
        p_value = float(binomtest(only_one, disagree, 0.5).pvalue) if disagree else 1.0
        low, high = -_upper_end(only_one, only_other, n), _upper_end(only_other, only_one, n)
        if p_value >= _LEVEL:
            low, high = min(low, 0.0), max(high, 0.0)
        return cls((only_other - only_one) / n, low, high, only_one, only_other, n, p_value)

    def __str__(self) -> str:
        value, low, high = (100 * x for x in (self.value, self.low, self.high))
        direction = "other more accurate" if value > 0 else "other less accurate"
        return (
            f"{direction if self.p_value < _LEVEL else 'no difference shown'}: "
            f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], p = {self.p_value:.2g}, "
            f"{self.only_other} won and {self.only_one} lost of {self.n}"
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
    """

    eps: float
    norm: str
    n: int
    attacked: PairedDifference
    clean: PairedDifference

    def __str__(self) -> str:
        return (
            f"{self.norm} eps {self.eps:.4g}, n = {self.n}\n"
            f"  attacked  {self.attacked}\n"
            f"  clean     {self.clean}"
        )


def compare(one: Evaluation, other: Evaluation) -> Comparison:
    """Compare two models, sample by sample.

    Attacked accuracies are comparable under the same cascade only; a stronger one against `other`
    counts against it. `dataclasses.replace(result, samples_digest=None)` leaves out the check that
    the images are the same, such as for the same photographs, cut to two sizes.

    Args:
        one: the baseline.
        other: the same samples, eps and norm; a positive difference is in its favour.

    Raises:
        TypeError: one of them is no evaluation.
        ValueError: the evaluations differ in their indices, labels, images, eps or norm.
    """
    for given in (one, other):
        if not isinstance(given, Evaluation):
            raise TypeError(
                f"expected two results of flatreg.evaluate, got a {type(given).__name__}: write "
                "compare(evaluate(one, data, eps=...), evaluate(other, data, eps=...))"
            )
    for name in ("norm", "eps"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"expected evaluations of the same {name}, got {ours} and {theirs}")
    for name in ("indices", "labels"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(
                f"expected evaluations of the same samples, their {name} differ: "
                f"{_first_difference(ours, theirs)}"
            )
    if other_images(one, other):
        raise ValueError(
            "expected evaluations of the same samples, their images differ under the same indices: "
            "evaluate both models on one data set, cut to one size"
        )
    return Comparison(
        eps=one.eps,
        norm=one.norm,
        n=len(one.verdicts),
        attacked=_paired([v == -1 for v in one.verdicts], [v == -1 for v in other.verdicts]),
        clean=_paired([v > -2 for v in one.verdicts], [v > -2 for v in other.verdicts]),
    )


def other_images(one: Evaluation, other: Evaluation) -> bool:
    """Whether two results are known to be of other images or labels."""
    digests = {one.samples_digest, other.samples_digest} - {None}
    return len(digests) > 1


def _paired(one: list[bool], other: list[bool]) -> PairedDifference:
    pairs = list(zip(one, other, strict=True))
    only_one, only_other = pairs.count((True, False)), pairs.count((False, True))
    return PairedDifference.of(only_one, only_other, len(pairs))


def _upper_end(won: int, lost: int, n: int) -> float:
    """Largest difference that the score test does not reject, by bisection."""

    def rejected(difference: float) -> bool:
        a, c = 2 * n, -lost * difference * (1 - difference)
        b = (2 * n + lost - won) * difference - won - lost
        likeliest = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * likeliest + difference * (1 - difference))
        return (won - lost - n * difference) ** 2 > _NORMAL**2 * variance

    inside, outside = (won - lost) / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def _first_difference(one: list[int], other: list[int]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} samples"
    at = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return f"at position {at} stand {one[at]} and {other[at]}"
