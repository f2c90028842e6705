"""Two models on the same samples, against sums and loops written out."""

from dataclasses import replace
from functools import cache
from math import comb

import numpy as np
import pytest
from cases import trained_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.evaluation.compare import compare


@cache
def net(seed, n):
    return trained_net(n=n, seed=seed)


@cache
def evaluated(seed=0, n=60, eps=0.03, subset_seed=3):
    """A tiny model on the images of seed 0."""
    model, _, _ = net(seed, 40)
    _, x, y = net(0, 100)
    return evaluate(
        model,
        TensorDataset(x, y),
        eps=eps,
        attack="fast",
        samples=n,
        seed=subset_seed,
        diagnose=False,
        progress=False,
    )


def with_verdicts(verdicts):
    return replace(evaluated(), indices=list(range(len(verdicts))), verdicts=list(verdicts))


def mcnemar_by_sum(b, c):
    """Twice the lower tail of a fair coin, at most 1."""
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1.0, 2 * tail)


def bootstrap_by_loop(one, other, draws, seed):
    """Percentiles of the difference over resampled pairs, one draw and one sample at a time."""
    generator, n, differences = np.random.default_rng(seed), len(one), []
    for _ in range(draws):
        rows = generator.integers(n, size=n)
        differences.append(sum(int(other[r]) - int(one[r]) for r in rows) / n)
    differences.sort()
    return differences[round(0.025 * (draws - 1))], differences[round(0.975 * (draws - 1))]


VERDICTS = st.lists(st.tuples(st.integers(-2, 1), st.integers(-2, 1)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(VERDICTS)
def test_the_p_value_is_the_tail_of_a_fair_coin(pairs):
    one, other = zip(*pairs, strict=True)
    result = compare(with_verdicts(one), with_verdicts(other), draws=10)
    for found, right in (
        (result.attacked, lambda verdict: verdict == -1),
        (result.clean, lambda verdict: verdict != -2),
    ):
        b = sum(right(u) and not right(v) for u, v in pairs)
        c = sum(right(v) and not right(u) for u, v in pairs)
        assert (found.only_one, found.only_other) == (b, c)
        assert found.value == pytest.approx((c - b) / len(pairs))
        assert found.p_value == pytest.approx(mcnemar_by_sum(b, c), rel=1e-9)


def test_the_interval_is_that_of_a_slow_loop():
    one, other = evaluated(), evaluated(seed=1)
    result = compare(one, other, draws=4000)
    survives = [[v == -1 for v in e.verdicts] for e in (one, other)]
    right = [[v > -2 for v in e.verdicts] for e in (one, other)]
    for found, columns in ((result.attacked, survives), (result.clean, right)):
        low, high = bootstrap_by_loop(*columns, draws=2000, seed=99)
        assert found.low == pytest.approx(low, abs=1.01 / result.n)  # one sample of Monte Carlo
        assert found.high == pytest.approx(high, abs=1.01 / result.n)
        assert found.low <= found.value <= found.high and found.low < found.high


def test_the_interval_has_the_width_of_the_normal_one():
    generator = np.random.default_rng(0)
    one, other = generator.integers(-1, 1, size=(2, 20_000))  # more than are drawn at once
    found = compare(with_verdicts(one), with_verdicts(other), draws=1000).attacked
    gain = (other == -1).astype(float) - (one == -1)
    half = 1.96 * gain.std() / 20_000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.low < gain.mean() < found.high


def test_swapping_the_models_turns_the_sign():
    one, other = evaluated(), evaluated(seed=1)
    there, back = compare(one, other), compare(other, one)
    for a, b in ((there.attacked, back.attacked), (there.clean, back.clean)):
        assert (a.value, a.p_value) == (-b.value, b.p_value)
        assert (a.only_one, a.only_other) == (b.only_other, b.only_one)
        assert (a.low, a.high) == pytest.approx((-b.high, -b.low), abs=1e-12)
        assert a.value != 0


def test_a_model_does_not_differ_from_itself():
    result = compare(evaluated(), evaluated())
    for found in (result.attacked, result.clean):
        assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_seed_decides_the_interval():
    one, other = evaluated(), evaluated(seed=1)
    results = [compare(one, other, draws=50, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] and results[0].attacked != results[2].attacked


def test_an_advantage_of_many_samples_is_seen_and_of_one_is_not():
    weak = with_verdicts([-1] * 50 + [0] * 50)
    strong = compare(weak, with_verdicts([-1] * 70 + [0] * 30)).attacked
    even = compare(weak, with_verdicts([-1] * 51 + [0] * 49)).attacked
    assert strong.p_value == pytest.approx(2**-19) and strong.low > 0
    assert even.p_value == 1 and even.low == 0


def test_what_differs_is_named_in_one_line():
    one = evaluated()
    for message, other in {
        "of the same eps, got 0.03 and 0.02": evaluated(eps=0.02),
        "of the same norm, got linf and l2": replace(one, norm="l2"),
        "their indices differ: 60 and 50 samples": evaluated(n=50),
        r"their indices differ: at position \d+ stand \d+ and \d+": evaluated(subset_seed=4),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            compare(one, other)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        compare(one, one, draws=0)


def test_prints_what_a_reader_needs():
    text = str(compare(evaluated(), evaluated(seed=1)))
    lines = text.split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 100
    for part in ("linf eps 0.03, n = 60", "attacked", "clean", "points [", "p = ", "won", "lost"):
        assert part in text
