"""Spot checks: who is drawn, when all follow, the bound; the same in every batch and process."""

import copy
from functools import partial

import pytest
import torch
from cases import trained_net
from scipy.stats import hypergeom
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import AttackResult, noise, pgd, spot_check
from flatreg.attacks.spot_check import at_most, drawn

WEAK = partial(noise, draws=1)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=120)
    return model.double(), TensorDataset(x.double(), y)


def idle(model, inputs, labels, *, eps, **options):
    """An attack that fools nobody."""
    return AttackResult(inputs, torch.full_like(labels, -1), len(inputs), 0)


class Recorder:
    """An attack that notes whom it is run on."""

    def __init__(self, attack):
        self.attack, self.seen = attack, []

    def __call__(self, *args, **options):
        self.seen += options["indices"]
        return self.attack(*args, **options)


def test_a_success_among_few_is_the_end(case):
    """Nobody is left to go on to."""
    model, (x, y) = case[0], case[1].tensors
    found = spot_check(model, x[:40], y[:40], eps=0.3, attack=pgd)
    assert bool(found.fooled.any())
    assert torch.equal(found.fooled, pgd(model, x[:40], y[:40], eps=0.3).fooled)


def checked(case, attack, samples=16, **options):
    """Result of an evaluation whose spot check runs `attack`, and whom it attacked."""
    recorder = Recorder(attack)
    stages = [WEAK, partial(spot_check, attack=recorder, samples=samples)]
    options = dict(eps=0.03, diagnose=False, progress=False) | options
    return evaluate(*case, attack=stages, **options), sorted(recorder.seen)


@pytest.mark.parametrize("survivors", [1, 16, 17, 40, 300])
def test_the_bound_is_that_of_a_draw_without_replacement(survivors):
    samples = min(16, survivors)
    bound = at_most(survivors, samples)
    chance = [hypergeom(survivors, fooled, samples).pmf(0) for fooled in range(survivors + 1)]
    assert bound == max(fooled for fooled, p in enumerate(chance) if p > 0.05)


def test_many_survivors_are_bounded_by_the_rule_of_three():
    assert at_most(10**4, 64) / 10**4 == pytest.approx(1 - 0.05 ** (1 / 64), rel=0.01)


def test_a_weak_attack_is_run_on_the_drawn_alone(case):
    result, seen = checked(case, idle)
    survivors = [i for i, v in zip(result.indices, result.verdicts, strict=True) if v == -1]
    assert len(seen) == 16 < len(survivors) and set(seen) < set(survivors)
    check = result.stages[-1].spot_check
    assert (check.survivors, check.attacked) == (len(survivors), 16)
    assert check.at_most == at_most(len(survivors), 16)
    assert f"16 of {len(survivors)} survivors, fooled none" in str(result)
    assert None not in [m for v, m in zip(result.verdicts, result.attacked_margins) if v > -2]  # noqa: B905


def test_one_success_sends_the_attack_to_all_and_verdicts_are_those_of_a_cascade(case):
    result, seen = checked(case, pgd, curve=[0.01, 0.03, 0.05])
    plain = evaluate(*case, eps=0.03, attack=[WEAK, pgd], diagnose=False, progress=False)
    assert result.verdicts == plain.verdicts and len(seen) == len(set(seen)) > 16
    assert result.attacked_margins == plain.attacked_margins
    assert result.stages[-1].spot_check.attacked == len(seen)
    assert "attacked all" in str(result)
    lower = [point.accuracy.count for point in result.curve]
    assert lower == sorted(lower, reverse=True) and lower[1] <= result.attacked.count < lower[0]


def test_fewer_survivors_than_samples_are_all_attacked(case):
    result, seen = checked(case, idle, samples=1000)
    assert len(seen) == result.attacked.count and result.stages[-1].spot_check.at_most == 0


def test_a_flagged_finding_sends_the_attack_to_all(case):
    model, data = case
    saturated = copy.deepcopy(model)
    with torch.no_grad():
        [*saturated.parameters()][-1].mul_(1e5)
        [*saturated.parameters()][-2].mul_(1e5)
    result, seen = checked((saturated, data), idle, diagnose=True)
    assert any(f.verdict == "flagged" for f in result.findings)
    assert len(seen) == result.attacked.count == result.stages[-1].spot_check.survivors


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": 3}], ids=str)
def test_who_is_drawn_does_not_depend_on_the_batch(case, options):
    result, seen = checked(case, idle)
    other, again = checked(case, idle, **options)
    assert seen == again and other.verdicts == result.verdicts


def test_who_is_drawn_depends_on_the_seed_and_on_no_order():
    indices = list(range(100))
    assert drawn(indices, 10, 0) != drawn(indices, 10, 1)
    backwards = indices[::-1]
    assert {backwards[i] for i in drawn(backwards, 10, 0)} == set(drawn(indices, 10, 0))


def test_another_threat_has_a_spot_check_of_its_own(case):
    result, _ = checked(case, pgd, other_threats={"l2": 0.3})
    alone, _ = checked(case, pgd, eps=0.3, norm="l2")
    assert result.other_threats[0].verdicts == alone.verdicts
    assert result.other_threats[0].stages[-1].spot_check == alone.stages[-1].spot_check


def test_an_evaluation_that_is_called_again_draws_the_same(case, tmp_path):
    stages = [WEAK, partial(spot_check, attack=pgd, samples=16)]
    options = dict(eps=0.03, attack=stages, diagnose=False, progress=False, save_inputs=True)
    result, again = (evaluate(*case, folder=tmp_path, **options) for _ in range(2))
    for name in ("verdicts", "forwards", "backwards", "attacked_margins"):
        assert getattr(result, name) == getattr(again, name), name


@pytest.mark.parametrize("place", [0, 1])
def test_a_spot_check_stands_at_the_end_and_not_alone(case, place):
    stages = [partial(spot_check, attack=pgd), WEAK][: 1 + place]
    with pytest.raises(ValueError, match="last of several stages"):
        evaluate(*case, eps=0.03, attack=stages)


@pytest.mark.parametrize(
    "settings",
    [{}, {"attack": pgd, "samples": 0}, {"attack": "pgd"}],
    ids=["no attack", "no sample", "a name"],
)
def test_a_spot_check_without_sense_is_refused_before_anything_runs(case, settings):
    ran = Recorder(pgd)
    with pytest.raises(ValueError, match="a spot check needs attack=ATTACK and samples >= 1"):
        evaluate(*case, eps=0.1, attack=[ran, partial(spot_check, **settings)], progress=False)
    assert not ran.seen


class Drawn(torch.utils.data.Dataset):
    """Images that a transform draws anew whenever they are read."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        image, label = self.data[row]
        return (image + 0.3 * torch.randn(image.shape)).clamp(0, 1), label


def test_images_that_are_drawn_anew_are_refused(case):
    """Their spot check lowered attacked accuracy at eps 0, where nothing can move."""
    with pytest.raises(ValueError, match="leave random transforms out"):
        checked((case[0], Drawn(case[1])), pgd, eps=0.0)
