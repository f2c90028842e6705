"""Two models on the same samples, against sums and loops written out."""

import copy
import json
from dataclasses import replace
from functools import cache
from math import comb, log
from pathlib import Path

import numpy as np
import pytest
from cases import trained_net
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.optimize import minimize_scalar
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.evaluation.compare import Comparison, PairedDifference, compare


@cache
def net(seed, n):
    return trained_net(n=n, seed=seed)


@cache
def evaluated(seed=0, n=60, eps=0.03, subset_seed=3, brighter=False):
    """A tiny model on the images of seed 0."""
    model, _, _ = net(seed, 40)
    _, x, y = net(0, 100)
    return evaluate(
        model,
        TensorDataset((x + 0.1).clamp(max=1) if brighter else x, y),
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


def likeliest(b, c, difference, n):
    """Log-likelihood of the cells under a difference, by a fine search over p(other only)."""
    best = minimize_scalar(
        lambda p: -log_likelihood(b, c, n, p, difference),
        bounds=(max(difference, 0), (1 + difference) / 2),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return best.x


def log_likelihood(b, c, n, p, difference):
    """Of b samples the one alone has right (probability p - difference), c the other alone (p)."""
    cells = ((c, p), (b, p - difference), (n - b - c, 1 - 2 * p + difference))
    return sum(k * log(max(q, 1e-300)) for k, q in cells if k)


def score_statistic(b, c, n, difference):
    """Squared score of the difference: (its estimate - it)^2 over its variance under it."""
    p = likeliest(b, c, difference, n)
    variance = (2 * p - difference - difference**2) / n
    return ((c - b) / n - difference) ** 2 / variance


VERDICTS = st.lists(st.tuples(st.integers(-2, 1), st.integers(-2, 1)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(VERDICTS)
def test_the_p_value_is_the_tail_of_a_fair_coin(pairs):
    one, other = zip(*pairs, strict=True)
    result = compare(with_verdicts(one), with_verdicts(other))
    for found, right in (
        (result.attacked, lambda verdict: verdict == -1),
        (result.clean, lambda verdict: verdict != -2),
    ):
        b = sum(right(u) and not right(v) for u, v in pairs)
        c = sum(right(v) and not right(u) for u, v in pairs)
        assert (found.only_one, found.only_other) == (b, c)
        assert found.value == pytest.approx((c - b) / len(pairs))
        assert found.p_value == pytest.approx(mcnemar_by_sum(b, c), rel=1e-9)


def test_the_interval_excludes_zero_exactly_where_the_exact_test_rejects():
    """For every table of up to 40 samples; and where the test begins to reject, for larger ones."""
    tables = [(b, c, n) for n in range(1, 41) for b in range(n + 1) for c in range(n + 1 - b)]
    for disagree in (50, 101, 300, 999):
        fewest = next(k for k in range(disagree) if mcnemar_by_sum(k, disagree - k) >= 0.05)
        tables += [(k, disagree - k, 1000) for k in range(max(0, fewest - 3), fewest + 3)]
    for b, c, n in tables:
        found = PairedDifference.of(b, c, n)
        assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
        assert found.low <= found.value <= found.high and found.low < found.high
        assert -1 <= found.low and found.high <= 1


@pytest.mark.parametrize(
    ("b", "c", "n"), [(6, 12, 200), (2, 12, 200), (30, 80, 200), (0, 117, 200), (9, 9, 40)]
)
def test_the_interval_ends_where_the_score_test_begins_to_reject(b, c, n):
    found, critical = PairedDifference.of(b, c, n), 1.959963984540054**2
    for end in (found.low, found.high):
        assert score_statistic(b, c, n, end) == pytest.approx(critical, rel=1e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Drawn are tables of 200 samples from fixed cells; between 94% and 99.9% of 500 intervals."""
    generator = np.random.default_rng(0)
    for one, other in ((0.03, 0.06), (0.1, 0.1), (0.002, 0.5), (0.0, 0.01)):
        tables = generator.multinomial(200, [one, other, 1 - one - other], size=500)
        found = [PairedDifference.of(int(b), int(c), 200) for b, c, _ in tables]
        covered = sum(f.low <= other - one <= f.high for f in found) / 500
        assert covered >= 0.94


def test_the_interval_has_the_width_of_the_normal_one():
    generator = np.random.default_rng(0)
    one, other = generator.integers(-1, 1, size=(2, 20_000)).tolist()
    found = compare(with_verdicts(one), with_verdicts(other)).attacked
    gain = (np.array(other) == -1).astype(float) - (np.array(one) == -1)
    half = 1.96 * gain.std() / 20_000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.01)
    assert found.low < gain.mean() < found.high


def test_swapping_the_models_turns_the_sign():
    one, other = evaluated(), evaluated(seed=1)
    there, back = compare(one, other), compare(other, one)
    for a, b in ((there.attacked, back.attacked), (there.clean, back.clean)):
        assert (a.value, a.p_value) == (-b.value, b.p_value)
        assert (a.only_one, a.only_other) == (b.only_other, b.only_one)
        assert (a.low, a.high) == pytest.approx((-b.high, -b.low), abs=1e-12)
        assert a.value != 0


def test_a_model_does_not_differ_from_itself_and_the_interval_says_how_surely():
    """Of n samples without a disagreement the score interval has a closed form."""
    result, z = compare(evaluated(), evaluated()), 1.959963984540054
    for found in (result.attacked, result.clean):
        assert (found.value, found.p_value, found.only_one, found.only_other) == (0, 1, 0, 0)
        assert found.high == -found.low == pytest.approx(z**2 / (60 + z**2))


def test_a_stored_comparison_reads_back_as_it_was():
    adapter = TypeAdapter(Comparison)
    differences = (PairedDifference.of(6, 12, 200), PairedDifference.of(0, 0, 200))
    stored = Comparison(0.1, "linf", 200, *differences)
    assert adapter.validate_json(adapter.dump_json(stored)) == stored


def test_every_stored_comparison_agrees_with_its_test():
    reports = sorted((Path(__file__).parent.parent / "recipes/results").glob("*/report.json"))
    rows = [row for path in reports for row in json.loads(path.read_text())["rows"]]
    stored = [row["comparison"] for row in rows if row["comparison"]]
    assert len(stored) > 50
    for one in stored:
        read = TypeAdapter(Comparison).validate_python(one)
        for found, before in ((read.attacked, one["attacked"]), (read.clean, one["clean"])):
            assert (found.value, found.p_value) == pytest.approx(
                (before["value"], before["p_value"]), rel=1e-9
            )
            assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
            assert found.low < found.high


def test_an_advantage_of_many_samples_is_seen_and_of_one_is_not():
    weak = with_verdicts([-1] * 50 + [0] * 50)
    strong = compare(weak, with_verdicts([-1] * 70 + [0] * 30)).attacked
    even = compare(weak, with_verdicts([-1] * 51 + [0] * 49)).attacked
    assert strong.p_value == pytest.approx(2**-19) and strong.low > 0
    assert even.p_value == 1 and even.low < 0


def test_what_differs_is_named_in_one_line():
    one = evaluated()
    for message, other in {
        "of the same eps, got 0.03 and 0.02": evaluated(eps=0.02),
        "of the same norm, got linf and l2": replace(one, norm="l2"),
        "their images differ under the same indices": evaluated(brighter=True),
        "their indices differ: 60 and 50 samples": evaluated(n=50),
        r"their indices differ: at position \d+ stand \d+ and \d+": evaluated(subset_seed=4),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            compare(one, other)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"expected two results of flatreg.evaluate, got a Sequ"):
        compare(one, trained_net(n=1)[0])


def test_images_in_another_precision_or_of_an_older_result_are_no_others():
    model, x, y = trained_net(n=10)
    x = (255 * x).round() / 255
    quick = dict(eps=0.01, attack="fast", diagnose=False, progress=False)
    one = evaluate(model, TensorDataset(x, y), **quick)
    double = evaluate(copy.deepcopy(model).double(), TensorDataset(x.double(), y), **quick)
    bytes_ = evaluate(model, TensorDataset((255 * x).round().byte(), y), batch_size=3, **quick)
    assert one.samples_digest == double.samples_digest == bytes_.samples_digest is not None
    assert compare(one, replace(one, samples_digest=None)).attacked.value == 0


def test_prints_what_a_reader_needs():
    text = str(compare(evaluated(), evaluated(seed=1)))
    lines = text.split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 100
    for part in (
        "linf eps 0.03, n = 60",
        "attacked",
        "clean",
        "points [",
        "p = ",
        "won",
        "lost of",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("b", "c", "words"),
    [
        (2, 12, "other more accurate: +5.0 points ["),
        (12, 2, "other less accurate: -5.0 points ["),
        (6, 12, "no difference shown: +3.0 points ["),
        (0, 0, "no difference shown: +0.0 points [-1.9, +1.9]"),
    ],
)
def test_says_in_words_which_model_is_better(b, c, words):
    text = str(PairedDifference.of(b, c, 200))
    assert text.startswith(words) and text.endswith(f"{c} won and {b} lost of 200")
