import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import LIGHT, images, small_net, trained_net
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import affine_is_robust
from torch import nn

from flatreg.attacks import (
    apgd,
    cascade,
    eot,
    fgsm,
    fmn,
    noise,
    pgd,
    race,
    random_search,
    spot_check,
    square,
)
from flatreg.attacks.cascade import describe, stages
from flatreg.attacks.losses import LOSSES
from flatreg.attacks.options import complete
from flatreg.attacks.search import run
from flatreg.evaluation import attack_path

ATTACKS = {
    "pgd": partial(pgd, steps=20),
    "pgd rescaled": partial(pgd, steps=20, loss="rescaled_cross_entropy"),
    "apgd": partial(apgd, steps=20),
    "apgd margin": partial(apgd, steps=20, loss="margin"),
    "race": partial(race, heats=((9, 10, 2.5),), fmn=(2, 10), apgd=(2, 10)),
    "spot_check": partial(spot_check, attack=partial(pgd, steps=20), samples=16),
    "cascade": partial(cascade, attacks=LIGHT),
}


@dataclass(frozen=True)
class Brightness:
    """A toy search, written by the protocol: every pixel moves by one and the same amount."""

    queries: int
    loss: str = "margin"
    gradients: bool = False
    may_leave_ball: bool = False

    def init(self, jobs):
        return None

    def step(self, jobs, memory, answer):
        sign = 1 - 2 * (jobs.step % 2)
        part = (jobs.step // 2 + 1) / (self.queries // 2)
        change = (sign * part).reshape(-1, 1, 1, 1) * jobs.eps
        jobs.x = (jobs.inputs + change).clamp(0, 1)


def brightness(model, inputs, labels, *, eps, queries=9, **options):
    common = complete(options, "brightness")
    return run(Brightness(queries), model, inputs, labels, common, eps=eps)


def affine(n, classes, width, seed):
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, classes).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, width, generator=g, dtype=torch.float64))
        layer.bias.copy_(torch.randn(classes, generator=g, dtype=torch.float64))
    x = torch.rand(n, width, generator=g, dtype=torch.float64)
    return layer, x, layer(x).argmax(1)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
def test_verdicts_on_an_affine_classifier_are_the_closed_forms(attack, eps):
    model, x, y = affine(200, 2, 12, seed=0)
    result = ATTACKS[attack](model, x, y, eps=eps)
    exact = [affine_is_robust(model.weight, model.bias, *sample, eps) for sample in zip(x, y)]  # noqa: B905
    assert (~result.fooled).tolist() == exact
    assert 0 < sum(exact) < 200


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 5), st.integers(0, 10**6), st.floats(0.01, 0.3))
def test_the_cascade_is_exact_on_affine_classifiers_of_several_classes(classes, seed, eps):
    """Untargeted steps settle on one rival; an image fooled in truth and not here would show it."""
    model, x, y = affine(20, classes, 8, seed)
    result = cascade(model, x, y, eps=eps, attacks=LIGHT)
    exact = [affine_is_robust(model.weight, model.bias, *sample, eps) for sample in zip(x, y)]  # noqa: B905
    claimed = (~result.fooled).tolist()
    assert all(claim or not truth for claim, truth in zip(claimed, exact))  # noqa: B905
    assert sum(claimed) - sum(exact) <= 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_images_stay_in_ball_and_box_and_fool_where_it_says_so(attack):
    model, x, y = trained_net()
    result = ATTACKS[attack](model, x, y, eps=0.05)
    assert float((result.inputs - x).abs().max()) <= 0.05 + 1e-6
    assert 0 <= float(result.inputs.min()) and float(result.inputs.max()) <= 1
    assert torch.equal(model(result.inputs).argmax(1) != y, result.fooled)
    assert 0 < int(result.fooled.sum()) < len(x)


def test_fooled_samples_are_dropped_from_the_batch_and_passes_are_counted():
    model, x, y = trained_net()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    result = pgd(model, x, y, eps=0.05, steps=10)
    assert sum(seen) == result.forwards and seen == sorted(seen, reverse=True)
    assert seen[0] == len(x) and seen[-1] == int((~result.fooled).sum()) and len(seen) == 11
    assert result.backwards == sum(seen[:-1])
    seen.clear()
    result = apgd(model, x, y, eps=0.05, steps=10)
    assert sum(seen) == result.forwards
    assert result.backwards == sum(seen) - int((~result.fooled).sum())  # none for the last query


def test_per_sample_eps():
    model, x, y = trained_net()
    eps = torch.full((len(x),), 0.05)
    eps[::2] = 0.0
    for attack in (pgd, apgd, ATTACKS["cascade"]):
        result = attack(model, x, y, eps=eps)
        wrong_anyway = model(x).argmax(1) != y
        assert torch.equal(result.fooled[::2], wrong_anyway[::2])
        assert torch.equal(result.inputs[::2], x[::2])
        assert int(result.fooled[1::2].sum()) > int(wrong_anyway[1::2].sum())


@pytest.mark.parametrize("attack", [partial(pgd, random_start=True), apgd, ATTACKS["race"]])
def test_a_verdict_does_not_depend_on_the_batch_it_is_in(attack):
    model, x, y = trained_net()
    model, x = model.double(), x.double()
    together = attack(model, x, y, eps=0.03, seed=3, indices=range(len(x)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for rows in order.split(37):
        apart = attack(model, x[rows], y[rows], eps=0.03, seed=3, indices=rows.tolist())
        assert torch.equal(apart.fooled, together.fooled[rows])


def test_random_starts_differ_between_samples_and_seeds():
    model = small_net(batch_norm=False).eval()
    x = torch.full((2, 1, 16, 16), 0.5)
    y = model(x).argmax(1)
    starts = [
        pgd(model, x, y, eps=0.1, steps=0, random_start=True, seed=s).inputs for s in (0, 0, 1)
    ]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])
    assert float((starts[0] - x).abs().max()) > 0.09


@pytest.mark.parametrize("attack", ["pgd", "pgd rescaled", "apgd", "apgd margin", "cascade"])
@pytest.mark.parametrize(("scale", "allowed"), [(1024.0, 0), (1000.0, 1)])
def test_the_scale_of_the_logits_changes_no_verdict(attack, scale, allowed):
    model, x, y = trained_net(n=256)
    before = ATTACKS[attack](model, x, y, eps=0.02)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    after = ATTACKS[attack](model, x, y, eps=0.02)
    assert int((before.fooled != after.fooled).sum()) <= allowed
    assert 25 < int(before.fooled.sum()) < 230


def test_plain_cross_entropy_is_fooled_by_the_scale_of_the_logits():
    """Why the cascade does not climb it."""
    model, x, y = trained_net(n=256)
    before = pgd(model, x, y, eps=0.05, loss="cross_entropy")
    with torch.no_grad():
        model[-1].weight.mul_(1000)
        model[-1].bias.mul_(1000)
    after = pgd(model, x, y, eps=0.05, loss="cross_entropy")
    assert int(before.fooled.sum()) > int(after.fooled.sum()) + 50


def test_rescaled_cross_entropy_survives_equal_logits():
    z = torch.zeros(2, 3, requires_grad=True)
    loss = LOSSES["rescaled_cross_entropy"](z, torch.tensor([0, 1]))
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(z.grad.isfinite().all())


def test_a_cascade_names_the_stage_that_fooled():
    model, x, y = trained_net()
    attacks = [partial(pgd, steps=1), partial(apgd, steps=20, loss="margin")]
    result = cascade(model, x, y, eps=0.05, attacks=attacks)
    first = pgd(model, x, y, eps=0.05, steps=1)
    assert torch.equal(result.fooled_by == 0, first.fooled)
    assert int((result.fooled_by == 1).sum()) > 0


def test_attacking_touches_no_gradient_and_no_random_stream():
    model, x, y = trained_net()
    model.zero_grad()
    state = torch.get_rng_state()
    with torch.no_grad():  # as a caller might
        cascade(model, x[:16], y[:16], eps=0.05, attacks=LIGHT)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused_in_one_line():
    model, x, y = trained_net(n=4)
    for attack in (pgd, apgd, cascade):
        with pytest.raises(ValueError, match="for 8 grey levels of 255 write 8/255"):
            attack(model, x, y, eps=8)
        with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from -2"):
            attack(model, 4 * x - 2, y, eps=0.1)
        with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got 'l3'"):
            attack(model, x, y, eps=0.1, norm="l3")
        with pytest.raises(ValueError, match="eps must be >= 0 and finite, got -1"):
            attack(model, x, y, eps=-1, norm="l2")
        with pytest.raises(ValueError, match="seed: expected a whole number from 0, got -1"):
            attack(model, x, y, eps=0.1, seed=-1)
        with pytest.raises(TypeError, match=r"eps: expected a number, as 8 / 255, got '0.1'"):
            attack(model, x, y, eps="0.1")
        with pytest.raises(ValueError, match="whose rounding leaves the ball: attack model"):
            attack(copy.deepcopy(model).bfloat16(), x.bfloat16(), y, eps=0.1)
    with pytest.raises(ValueError, match=r"step_size: expected a number in \(0, inf\), got '1'"):
        pgd(model, x, y, eps=0.1, step_size="1")
    with pytest.raises(
        ValueError, match="one of fast, standard, standard-full, rand, got 'strong'"
    ):
        stages("strong")
    with pytest.raises(ValueError, match="at least one stage"):
        stages([])


@pytest.mark.parametrize(
    "attack", [apgd, fgsm, fmn, noise, pgd, random_search, square, partial(eot, attack=pgd)]
)
def test_an_option_that_no_attack_has_is_refused_by_name(attack):
    model, x, y = trained_net(n=4)
    name = getattr(attack, "func", attack).__name__
    with pytest.raises(TypeError, match=f"{name} has no setting 'early_stopp'; .* early_stop$"):
        attack(model, x, y, eps=0.1, early_stopp=False)
    with pytest.raises(TypeError, match="fgsm has no setting 'restarts'"):
        fgsm(model, x, y, eps=0.1, restarts=2)


def test_a_search_of_yours_runs_on_the_queue():
    model, x, y = trained_net()
    result = brightness(model, x, y, eps=0.3, batch_size=50)
    tried = [0] + [s * k * 0.3 / 4 for k in (1, 2, 3, 4) for s in (1, -1)]
    wrong = torch.stack([model((x + change).clamp(0, 1)).argmax(1) != y for change in tried])
    assert torch.equal(result.fooled, wrong.any(0))
    assert 0 < int(wrong[0].sum()) < int(result.fooled.sum()) < len(x)
    queried = torch.where(wrong.any(0), wrong.int().argmax(0) + 1, len(tried))
    assert result.forwards == int(queried.sum()) and result.backwards == 0
    stages = cascade(model, x, y, eps=0.3, attacks=[partial(brightness, queries=1), brightness])
    assert torch.equal(stages.fooled_by == 0, wrong[0]) and bool((stages.fooled_by == 1).any())


def test_stages_are_named_by_their_settings():
    assert [describe(s) for s in stages("fast")] == ["pgd(loss=margin, steps=10, step_size=0.5)"]
    assert describe(pgd) == "pgd" and stages(pgd) == (pgd,)


def test_probabilities_for_labels_are_refused():
    model, (x, y) = small_net(), images()
    soft = torch.nn.functional.one_hot(y, 5).float()
    for attack in (pgd, cascade, attack_path):
        with pytest.raises(ValueError, match="labels: expected class indices"):
            attack(model, x, soft, eps=0.1)
