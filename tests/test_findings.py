"""Findings: which sign fires on which defect, and on nothing else; catastrophic overfitting."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import small_net, trained_net
from torch import nn
from torch.utils.data import TensorDataset

import flatreg
from flatreg import Estimate
from flatreg.attacks import cascade, fgsm, pgd
from flatreg.attacks.cascade import PRESETS
from flatreg.data.sharing import Batch
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import (
    catastrophic_overfitting,
    chance_finding,
    forward_checks,
    forward_findings,
    masking_checks,
    masking_findings,
)
from flatreg.evaluation.geometry import measure
from flatreg.threat import Threat, whole_box

# FGSM and PGD accuracy of small networks trained on digits at 16x16, every fourth epoch of 30.
COLLAPSED = {  # plain FGSM training, eps 0.3
    "fgsm": [0.101, 0.101, 0.128, 0.295, 0.434, 0.167, 0.122, 0.108],
    "pgd": [0.101, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
}
SOUND = {  # PGD training with five steps, eps 0.1
    "fgsm": [0.198, 0.674, 0.747, 0.788, 0.792, 0.830, 0.812, 0.823],
    "pgd": [0.194, 0.611, 0.726, 0.740, 0.743, 0.788, 0.781, 0.788],
}
PLAIN = {"fgsm": [0.316, 0.257, 0.208], "pgd": [0.212, 0.080, 0.049]}  # no adversary at all
# 60,000 Fashion-MNIST images, eps 0.1, every second epoch of 20, n = 1000.
SLOW = {  # MarginBound, which is fooled more and more from the eighth epoch on
    "fgsm": [0.631, 0.713, 0.749, 0.765, 0.776, 0.772, 0.772, 0.756, 0.759, 0.773],
    "pgd": [0.579, 0.655, 0.683, 0.671, 0.629, 0.552, 0.423, 0.335, 0.311, 0.284],
}
PLAIN_AND_LONG = {  # with label smoothing it learns to withstand the step, and was never robust
    "fgsm": [0.259, 0.296, 0.376, 0.401, 0.405, 0.388, 0.399, 0.391, 0.391, 0.401],
    "pgd": [0.061, 0.058, 0.040, 0.028, 0.012, 0.002, 0.001, 0.000, 0.000, 0.000],
}


def verdicts(history, n=288):
    one_step, several = history["fgsm"], history["pgd"]
    return [
        catastrophic_overfitting(one_step[:i], several[:i], n).verdict == "flagged"
        for i in range(1, len(one_step) + 1)
    ]


def test_measured_trainings_are_told_apart():
    assert verdicts(COLLAPSED) == [False, False, False, True, True, True, False, False]
    assert not any(verdicts(SOUND))
    assert not any(verdicts(PLAIN))
    assert verdicts(SLOW, 1000) == [False] * 7 + [True] * 3
    assert not any(verdicts(PLAIN_AND_LONG, 1000))


@pytest.mark.parametrize(
    ("fgsm", "pgd", "flagged"),
    [
        ([0.4, 0.9], [0.4, 0.0], True),
        ([0.4, 0.9], [0.4, 0.46], False),  # at its best so far
        ([0.4, 0.9], [0.4, 0.39], True),  # more than half of 0.9 is lost
        ([0.6, 0.9], [0.5, 0.46], False),  # less than half is
        ([0.2, 0.2], [0.19, 0.06], False),  # a gap of 0.14 is usual
        ([0.2, 0.22], [0.19, 0.06], True),
        ([0.5, 0.4], [0.4, 0.0], False),  # both fall: no adversary trains here
        ([0.5, 0.44], [0.4, 0.0], True),  # within a standard error, 0.07
        ([0.3, 0.4], [0.09, 0.0], False),  # a third was never robust: nothing to lose
        ([0.3, 0.4], [0.11, 0.0], True),
        ([0.9], [0.0], False),  # nothing to fall from yet
    ],
)
def test_where_the_line_is(fgsm, pgd, flagged):
    finding = catastrophic_overfitting(fgsm, pgd, 50)
    assert (finding.verdict == "flagged") == flagged == (finding.value > finding.threshold)
    assert finding.value == pytest.approx(fgsm[-1] - pgd[-1]) and finding.n == 50


@pytest.mark.parametrize(("fgsm", "pgd"), [([], []), ([0.1], [0.1, 0.2])])
def test_histories_that_do_not_match_are_refused(fgsm, pgd):
    with pytest.raises(ValueError, match=f"got {len(fgsm)} and {len(pgd)}"):
        catastrophic_overfitting(fgsm, pgd, 10)


class Wave(nn.Module):
    """Margin of class 0: a wave of period eps along the brightness, so that one step comes back."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        phase = 2 * math.pi * (x.flatten(1).mean(1) - 0.5) / self.eps
        margin = torch.cos(phase + 0.3) + 0.5
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def test_a_model_that_withstands_one_step_alone_is_flagged():
    data = [(torch.full((1, 4, 4), 0.5), 0)] * 20
    result = evaluate(
        Wave(0.2), data, eps=0.2, attack=(fgsm, *PRESETS["fast"]), diagnose=False, progress=False
    )
    one_step, several = result.stages[0].accuracy.value, result.attacked.value
    assert (one_step, several) == (1.0, 0.0)
    finding = catastrophic_overfitting([0.5, one_step], [0.4, several], result.n)
    assert finding.verdict == "flagged"


def test_the_single_step_is_the_full_step_of_the_margin():
    torch.manual_seed(0)
    x, y, eps = 0.3 + 0.4 * torch.rand(16, 1, 4, 4), torch.arange(16) % 3, 0.1
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    y = model(x).argmax(1)
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    own = logits.gather(1, y[:, None]).squeeze(1)
    rival = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((rival - own).sum(), inputs)
    torch.testing.assert_close(fgsm(model, x, y, eps=eps).inputs, x + eps * gradient.sign())


CE_ZERO, MARGIN_ZERO = "zero-gradient share", "zero-gradient share of the margin"
SATURATED, GAP, STUCK = "saturation share", "cross-entropy gap", "loss not increased"
STOCHASTIC, BATCH = "stochastic forward", "batch dependence"
WEAKER, BLACK, UNBOUNDED = "weaker attack wins", "black box wins", "unbounded attack fails"
BUDGET, JUMPS = "larger budget wins", "margin jumps"
FORWARDS, BACKWARDS = 172, 90
TINY = torch.finfo(torch.float32).tiny
EPS = {"linf": 0.015, "l2": 0.15, "l1": 1.2}
STRONG = (partial(pgd, steps=10), partial(pgd, steps=40, step_size=0.1, random_start=True))


class Changed(nn.Module):
    """A model with something before and after it."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def right(model, x, y):
    with torch.no_grad():
        keep = model(x).argmax(1) == y
    return x[keep], y[keep]


def forward_guards(model, inputs, **options):
    return forward_findings(forward_checks(model, inputs, **options))


def observe(model, x, y, norm="linf", attacks=STRONG, eps=None, rows=None, **options):
    eps, rows = EPS[norm] if eps is None else eps, range(len(x)) if rows is None else rows
    attack = partial(cascade, attacks=attacks, eps=eps, norm=norm, indices=rows)
    return masking_checks(
        model,
        Batch(list(rows), x, y),
        Threat(norm=norm, eps=eps),
        seed=0,
        survived=~attack(model, x, y).fooled,
        **options,
    )


def flagged(findings):
    return {f.name for f in findings if f.verdict == "flagged"}


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=128)
    x, y = right(model, x, y)
    return model, x[:64], y[:64]


@pytest.mark.parametrize("norm", EPS)
def test_a_sound_evaluation_is_not_flagged(case, norm):
    checks = observe(*case, norm=norm)
    findings = masking_findings(checks)
    assert flagged(findings) == set() and len({f.name for f in findings}) == len(findings) == 12
    assert {f.n for f in findings if f.name != STUCK} == {len(case[1])}
    assert 0.1 < float(checks["survived"].float().mean()) < 0.9
    assert not any(checks[name].isnan().any() for name in checks)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_a_scale_that_hides_the_truth_from_cross_entropy_is_flagged(case, norm):
    model, x, y = case
    findings = masking_findings(observe(Changed(model, after=lambda z: 1000 * z), x, y, norm))
    assert flagged(findings) == {CE_ZERO, SATURATED, GAP, STUCK}
    spread = float((1000 * model(x)).detach().aminmax(dim=1).max.median())
    (saturation,) = (f for f in findings if f.name == SATURATED)
    assert spread > 1000 and "median" in saturation.meaning


def test_every_sample_is_observed_as_a_slow_reference_sees_it(case):
    model, x, y = case
    scaled = Changed(model, after=lambda z: 30 * z)
    checks = observe(scaled, x, y)
    for i in range(len(x)):
        image = x[i : i + 1].clone().requires_grad_()
        logits = scaled(image)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1]), image)
        logits = logits.detach()
        assert bool(checks["zero_gradient_cross_entropy"][i]) == (float(slope.abs().max()) < TINY)
        assert bool(checks["saturated"][i]) == (float(logits.softmax(1).max()) == 1)
        spread = float(logits.max() - logits.min())
        assert float(checks["logit_spread"][i]) == pytest.approx(spread, rel=1e-4)
    assert 0 < int(checks["zero_gradient_cross_entropy"].sum()) < len(x)
    assert 0 < int(checks["saturated"].sum()) < len(x)


@pytest.mark.parametrize(("scale", "moved"), [(1, True), (100, False)])
def test_who_did_not_move_is_who_survives_cross_entropy_at_no_higher_loss(case, scale, moved):
    model, x, y = case
    scaled = Changed(model, after=lambda z: scale * z)
    checks = observe(scaled, x, y)
    attacked = pgd(scaled, x, y, eps=EPS["linf"], loss="cross_entropy")
    with torch.no_grad():
        end, start = (
            F.cross_entropy(scaled(at), y, reduction="none") for at in (attacked.inputs, x)
        )
    survivors = ~attacked.fooled
    assert torch.equal(checks["survives_cross_entropy"], survivors)
    assert torch.equal(checks["stuck_cross_entropy"], survivors & (end <= start))
    stuck, left = int(checks["stuck_cross_entropy"].sum()), int(survivors.sum())
    assert left > 5 and (stuck == 0 if moved else stuck > left / 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_checks_of_parts_are_checks_of_the_whole(case, norm):
    model, x, y = copy.deepcopy(case[0]).double(), case[1][:32].double(), case[2][:32]
    whole, parts = observe(model, x, y, norm), []
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).split(19):
        part = observe(model, x[rows], y[rows], norm, rows=rows.tolist(), batch_size=6)
        parts.append((rows, part))
    order = torch.cat([rows for rows, _ in parts])
    for name, values in whole.items():
        gathered = torch.cat([part[name] for _, part in parts])
        torch.testing.assert_close(gathered, values[order])


def test_the_cost_is_what_the_docstring_says():
    """On a linear model that nothing fools, the most expensive case."""
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    forwards, backwards = [], []

    def count(_, args):
        forwards.append(len(args[0]))
        backwards.append(len(args[0]) * args[0].requires_grad)

    layer.register_forward_pre_hook(count)
    x, y = torch.rand(8, 16), torch.zeros(8, dtype=torch.long)
    everyone = torch.ones(8, dtype=torch.bool)
    batch, threat = Batch(list(range(8)), x, y), Threat(norm="linf", eps=0.1)
    masking_checks(layer, batch, threat, seed=0, survived=everyone)
    assert (sum(forwards) / 8, sum(backwards) / 8) == (FORWARDS, BACKWARDS)


def test_gradients_that_rounding_takes_away_are_flagged(case):
    model = Changed(case[0], before=lambda x: (8 * x).round() / 8)
    x, y = right(model, *case[1:])
    found = flagged(masking_findings(observe(model, x, y, eps=0.2)))
    assert found >= {CE_ZERO, MARGIN_ZERO, UNBOUNDED, BLACK, WEAKER}
    assert not found & {STOCHASTIC, BATCH, SATURATED}


def test_in_a_ball_of_one_point_nothing_is_flagged(case):
    """No attack moves at eps 0: that its loss stays where it began is no sign."""
    model = case[0]
    x, y = right(model, *case[1:])
    assert not flagged(masking_findings(observe(model, x, y, eps=0.0)))


def test_a_weak_attack_is_flagged_by_a_larger_budget(case):
    model, x, y = case
    weak = observe(model, x, y, attacks=[partial(pgd, steps=1, step_size=0.05)], eps=0.05)
    assert BUDGET in flagged(masking_findings(weak))
    assert BUDGET not in flagged(masking_findings(observe(model, x, y, eps=0.05)))
    fallen = weak["fooled_by_budget"]
    assert not bool((fallen & ~weak["survived"]).any())


class Ripples(nn.Module):
    """A ramp down to the other class, under ripples that turn the gradient in every pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.02 * torch.sin(400 * x))


def test_gradients_that_mislead_lose_to_a_weaker_attack_or_to_a_black_box(case):
    model, x, y = case
    rippled = Ripples(model)
    x, y = right(rippled, x, y)
    found = flagged(masking_findings(observe(rippled, x, y, eps=0.08)))
    assert found & {WEAKER, BLACK}


def test_a_random_forward_is_flagged_and_not_taken_for_batch_dependence(case):
    model, x, _ = case
    for before in (partial(F.dropout, p=0.1, training=True), lambda x: x + torch.randn_like(x)):
        assert flagged(forward_guards(Changed(model, before), x)) == {STOCHASTIC}
    assert flagged(forward_guards(model, x)) == set()


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_batchnorm_in_train_mode_is_flagged_at_any_batch_size(batch_size):
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = small_net().eval()
    assert flagged(forward_guards(model, x, batch_size=batch_size)) == set()
    model[1].train()
    assert flagged(forward_guards(model, x, batch_size=batch_size)) == {BATCH}
    alone = forward_guards(model, x[:1], batch_size=batch_size)
    assert flagged(alone) == {BATCH} and alone[0].n == 1


def test_probabilities_are_refused_and_their_logarithm_is_not(case):
    model, x, y = case
    for observed in (partial(observe, x=x, y=y), partial(forward_guards, inputs=x)):
        with pytest.raises(ValueError, match="expected logits, the model returns prob") as error:
            observed(Changed(model, after=lambda z: z.softmax(1)))
        assert "\n" not in str(error.value)
        observed(Changed(model, after=lambda z: z.log_softmax(1)))


def test_a_forward_through_numpy_is_refused(case):
    model, x, y = case
    through = Changed(model, after=lambda z: torch.from_numpy(z.detach().numpy()))
    with pytest.raises(ValueError, match="no gradient in the inputs"):
        observe(through, x, y)


def test_the_whole_box_is_within_the_unbounded_radius():
    x = torch.zeros(2, 3, 4, 4)
    for norm, order in {"linf": torch.inf, "l2": 2, "l1": 1}.items():
        farthest = float(torch.linalg.vector_norm((1 - x).flatten(1), ord=order, dim=1).max())
        assert whole_box(x, norm) == pytest.approx(farthest)


def made(n=100, **shares):
    """Checks in which these many of `n` samples show each sign; the others show none."""
    names = (
        "zero_gradient_cross_entropy",
        "zero_gradient_margin",
        "margin_jumps",
        "saturated",
        "logit_spread",
        "survives_cross_entropy",
        "stuck_cross_entropy",
        "survives_margin",
        "fooled_by_weaker",
        "survived",
        "fooled_by_black_box",
        "survives_unbounded",
        "fooled_by_budget",
        "changes_when_repeated",
        "changes_with_batch",
    )
    return {name: torch.arange(n) < shares.get(name, 0) for name in names}


def test_nothing_is_said_about_no_samples():
    assert masking_findings(made(n=0)) == []


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, set()),
        (dict(zero_gradient_cross_entropy=5), set()),
        (dict(zero_gradient_cross_entropy=6), {CE_ZERO}),
        (dict(zero_gradient_margin=6), {MARGIN_ZERO}),
        (dict(margin_jumps=5), set()),
        (dict(margin_jumps=6), {JUMPS}),
        (dict(saturated=43), set()),
        (dict(saturated=44), {SATURATED}),
        (dict(survives_cross_entropy=5), set()),
        (dict(survives_cross_entropy=6), {GAP}),
        (dict(survives_cross_entropy=58, survives_margin=50), set()),  # within the noise
        (dict(survives_cross_entropy=70, survives_margin=50), {GAP}),
        (dict(survives_margin=50), set()),  # a better attack on this model is no sign of masking
        (dict(survives_cross_entropy=50, survives_margin=50, stuck_cross_entropy=5), set()),
        (dict(survives_cross_entropy=50, survives_margin=50, stuck_cross_entropy=6), {STUCK}),
        (dict(survives_cross_entropy=5, survives_margin=5, stuck_cross_entropy=5), set()),
        (dict(fooled_by_weaker=3), {WEAKER}),
        (dict(fooled_by_black_box=3), {BLACK}),
        (dict(survives_unbounded=6), {UNBOUNDED}),
        (dict(survived=50, fooled_by_budget=8), set()),
        (dict(survived=50, fooled_by_budget=12), {BUDGET}),
        (dict(changes_when_repeated=6), {STOCHASTIC}),
        (dict(changes_with_batch=6), {BATCH}),
    ],
)
def test_where_the_line_of_each_finding_is(shares, expected):
    findings = masking_findings(made(**shares))
    assert flagged(findings) == expected
    assert all((f.verdict == "flagged") == (f.value > f.threshold) for f in findings)
    assert all(f.meaning and f.reference for f in findings)


BROKEN = {
    "divided twice": lambda m, x, y: (m, x / 255, y),
    "labels shifted": lambda m, x, y: (m, x, (y + 1) % 5),
    "labels shuffled": lambda m, x, y: (m, x, y.roll(1)),
    "untrained": lambda m, x, y: (small_net(3).eval(), x, y),
}


@pytest.mark.parametrize("diagnose", [True, False])
def test_a_broken_setup_does_not_look_sound(diagnose):
    """Nothing that guesses as well as the model is of accuracy 0.0 with no finding."""
    model, x, y = trained_net(n=80)
    options = dict(eps=0.02, attack="fast", diagnose=diagnose, progress=False)
    found = evaluate(model, TensorDataset(x, y), **options).findings[0]
    assert (found.name, found.verdict) == ("clean accuracy at chance", "ok")
    for name, spoil in BROKEN.items():
        broken, images, labels = spoil(model, x, y)
        result = evaluate(broken, TensorDataset(images, labels), **options)
        found = result.findings[0]
        with torch.no_grad():
            right = int((broken(images).argmax(1) == labels).sum())
        assert right < 24, name  # of 80, of which 16 are guessed
        assert (found.verdict, found.n) == ("flagged", 80), name
        assert "check normalisation, labels and weights" in found.meaning
        assert found.meaning in str(result)
        assert flatreg.model_info(result, name="", architecture="", dataset="")["unreliable"]
    card = measure(small_net(3), TensorDataset(x, y), eps=0.1, parts=["kappa"], progress=False)
    assert any("check normalisation, labels and weights" in note for note in card.notes)


@pytest.mark.parametrize(("right", "n", "flagged"), [(23, 80, True), (24, 80, False), (0, 9, True)])
def test_chance_is_told_by_an_interval(right, n, flagged):
    """Wilson's, by hand, at 1.96 standard errors; five classes."""
    z, p = 1.959963984540054, right / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = (middle - half) / (1 + z**2 / n)
    found = chance_finding(Estimate.share(right, n), 5)
    assert found.threshold == pytest.approx(low, abs=1e-12)
    assert (found.verdict == "flagged") == flagged == (low < 0.2)
