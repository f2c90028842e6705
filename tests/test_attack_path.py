from functools import cache, partial

import numpy as np
import pytest
import torch
from cases import trained_net
from oracles import relative_flatness_by_hessian

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import cascade
from flatreg.attacks.eot import eot
from flatreg.attacks.fmn import fmn
from flatreg.attacks.options import AttackResult
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.random_search import random_search
from flatreg.attacks.square import square
from flatreg.evaluation.attack_path import (
    AttackPath,
    aligned_bands,
    attack_path,
    bands_by_flip,
    bands_by_step,
)
from flatreg.report.figures.report import path_figure
from flatreg.report.figures.style import save
from flatreg.threat import distance

ARRAYS = ("distance", "loss", "relative_flatness", "confidence", "margin")


@cache
def right_net(n=24):
    """A trained model in float64 and images it classifies right."""
    model, x, y = trained_net()
    model, x = model.double(), x.double()
    rows = (model(x).argmax(1) == y).nonzero().flatten()[:n]
    return model, x[rows], y[rows]


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in (*ARRAYS, "flip"))


def pgd_by_hand(model, x, y, eps, steps, step_size):
    """Images of PGD on the margin, one sample at a time, no sample stopping early."""
    columns = []
    for image, label in zip(x, y, strict=True):
        at, seen = image.clone(), [image]
        for _ in range(steps):
            at = at.detach().requires_grad_()
            z = model(at[None])[0]
            values = z.tolist()
            rival = max((s for s in range(5) if s != label), key=lambda s: values[s])
            (slope,) = torch.autograd.grad(z[rival] - z[label], at)
            at = (at.detach() + step_size * eps * slope.sign()).clamp(image - eps, image + eps)
            at = at.clamp(0, 1)
            seen.append(at)
        columns.append(torch.stack(seen))
    return torch.stack(columns, 1)


def test_every_quantity_is_what_it_says_at_the_images_of_pgd():
    model, x, y = right_net()
    x, y = x[:2], y[:2]
    path = attack_path(model, x, y, eps=0.1, attack=partial(pgd, steps=3, step_size=0.4))
    iterates = pgd_by_hand(model, x, y, 0.1, 3, 0.4)
    head = model[-1]
    assert path.margin.shape == (4, 2)
    for step, images in enumerate(iterates):
        for i, (image, label) in enumerate(zip(images, y, strict=True)):
            phi = model[:-1](image[None])[0].detach()
            z = model(image[None])[0].detach()
            p = z.exp() / z.exp().sum()
            others = [float(z[s]) for s in range(5) if s != label]
            kappa = relative_flatness_by_hessian(phi, head.weight.data, head.bias.data, label)
            expected = {
                "distance": float((image - x[i]).abs().max()),
                "loss": float(-p[label].log()),
                "relative_flatness": float(kappa),
                "confidence": float(p.max()),
                "margin": float(z[label]) - max(others),
            }
            found = {name: float(getattr(path, name)[step, i]) for name in ARRAYS}
            assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)
    for i, flip in enumerate(path.flip.tolist()):
        wrong = [s for s in range(4) if int(model(iterates[s, i][None]).argmax()) != y[i]]
        assert flip == (wrong[0] if wrong else -1)


def test_the_path_climbs_to_the_flip_and_goes_down_beyond():
    model, x, y = right_net()
    path = attack_path(model, x, y, eps=0.2, matched=0.9)
    assert path.margin.shape == (21, len(x)) and not path.distance[0].any()
    samples = torch.arange(len(x))
    assert bool((path.flip > 0).all())
    assert bool((path.margin[path.flip, samples] < 0).all())
    assert bool((path.margin[path.flip - 1, samples] >= 0).all())
    for kappa in (path.relative_flatness, path.matched_relative_flatness):
        at_flip = kappa[path.flip, samples].median()
        assert float(kappa[0].median()) < float(at_flip) > float(kappa[-1].median())
    at_flip = path.confidence[path.flip, samples].median()
    assert float(path.confidence[0].median()) > float(at_flip)
    assert float(path.confidence[-1].median()) > float(at_flip)  # confidently wrong


@pytest.mark.parametrize(
    ("attack", "rows"),
    [
        (partial(pgd, steps=5), 6),
        (partial(pgd, steps=5, random_start=True), 7),
        (fgsm, 2),
        (partial(apgd, steps=5), 7),
    ],
)
def test_row_0_is_the_clean_image_and_counted_once(attack, rows):
    model, x, y = right_net()
    path = attack_path(model, x, y, eps=0.1, attack=attack)
    assert path.margin.shape == (rows, len(x))
    assert not path.distance[0].any() and bool(path.distance[1].all())
    clean = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(path.loss[0], clean, rtol=1e-12)


@pytest.mark.parametrize(
    ("attack", "lines"),
    [
        (partial(eot, attack=partial(pgd, steps=6), draws=2), 7),
        (partial(fmn, steps=6), 7),
        (partial(square, queries=6), 7),
        (partial(random_search, queries=6), 7),
        (partial(noise, draws=6), 2),
        (fgsm, 2),
    ],
)
def test_every_attack_of_ours_can_be_followed(attack, lines):
    """From the clean image on, wherever its first point is; of noise the first draw."""
    model, x, y = right_net()
    path = attack_path(model, x, y, eps=0.1, attack=attack)
    assert len(path.distance) == lines
    assert not path.distance[0].any() and path.distance[-1].any()
    assert bool(path.relative_flatness.isfinite().all())
    may_leave_the_ball = getattr(attack, "func", attack) is fmn
    assert may_leave_the_ball or float(path.distance.max()) <= 0.1 * (1 + 1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [partial(pgd, steps=6), partial(apgd, steps=12)])
def test_the_path_has_the_points_of_the_attack_in_every_norm(attack, norm):
    model, x, y = right_net()
    eps = {"linf": 0.1, "l2": 1.0, "l1": 6.0}[norm]
    points = []
    attack(
        model,
        x,
        y,
        eps=eps,
        norm=norm,
        seed=7,
        early_stop=False,
        callback=lambda rows, steps, at, left: points.append(at),
    )
    path = attack_path(model, x, y, eps=eps, norm=norm, attack=attack, seed=7)
    tail = -len(points)
    expected = torch.stack([distance(at, x, norm) for at in points])
    assert torch.allclose(path.distance[tail:], expected, rtol=1e-12)
    if attack.func is pgd or norm != "l1":  # L1-APGD starts outside the ball
        assert float(path.distance.max()) <= eps * (1 + 1e-9)
    else:
        assert float(path.distance.max()) > 1.5 * eps


@pytest.mark.parametrize("batch_size", [None, 5, 1000])
@pytest.mark.parametrize(
    ("several", "one"),
    [
        (partial(pgd, steps=4, restarts=3), partial(pgd, steps=4)),
        (partial(apgd, steps=4, restarts=2), partial(apgd, steps=4)),
        (partial(apgd, steps=4, targets=3), partial(apgd, steps=4, targets=1)),
    ],
)
def test_of_several_jobs_a_sample_the_first_is_followed(several, one, batch_size):
    model, x, y = right_net()
    follow = partial(attack_path, model, x, y, eps=0.1, seed=2, batch_size=batch_size)
    assert same(follow(attack=several), follow(attack=one))


def test_a_path_does_not_depend_on_the_batch_it_is_in():
    model, x, y = right_net()
    attack = partial(apgd, steps=4)
    follow = partial(attack_path, model, eps=0.1, attack=attack, seed=3)
    together = follow(x, y, indices=range(100, 100 + len(x)))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    apart = follow(x[rows], y[rows], indices=[100 + r for r in rows.tolist()], batch_size=5)
    for name in ARRAYS:
        found, expected = getattr(apart, name), getattr(together, name)[:, rows]
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-12)
    assert torch.equal(apart.flip, together.flip[rows])


def test_kappa_at_matched_confidence_is_that_of_the_head_scaled_to_it():
    model, x, y = right_net()
    path = attack_path(model, x, y, eps=0.1, matched=0.8)
    scaled = right_net.__wrapped__()[0]
    logits = model(x).detach()
    for c in np.geomspace(1e-2, 1e2, 9001):  # the slow way to the scale
        if float((c * logits).softmax(1).amax(1).median()) >= 0.8:
            break
    with torch.no_grad():
        scaled[-1].weight.mul_(c)
        scaled[-1].bias.mul_(c)
    raw = attack_path(scaled, x, y, eps=0.1, matched=0.8)
    assert float(raw.confidence[0].median()) == pytest.approx(0.8, rel=1e-3)
    expected = path.matched_relative_flatness
    assert torch.allclose(raw.relative_flatness, expected, rtol=0.05)
    assert torch.allclose(raw.matched_relative_flatness, expected, rtol=1e-9)
    assert not torch.allclose(path.relative_flatness, expected, rtol=0.1)


def test_matched_kappa_is_none_where_not_asked_for_or_out_of_reach():
    model, x, y = right_net()
    assert attack_path(model, x, y, eps=0.1).matched_relative_flatness is None
    constant = right_net.__wrapped__()[0]
    with torch.no_grad():
        constant[-1].weight.zero_()
        constant[-1].bias.zero_()
    path = attack_path(constant, x, y, eps=0.1, matched=0.9)
    assert path.matched_relative_flatness is None and not path.relative_flatness.any()


def test_an_attack_that_cannot_be_followed_is_refused_in_one_line():
    model, x, y = right_net()

    def silent(model, inputs, labels, **options):
        never = torch.full_like(labels, -1)
        return AttackResult(inputs, never, 0, 0)

    def stopping(model, inputs, labels, **options):
        return pgd(model, inputs, labels, **{**options, "early_stop": True})

    def closed(model, inputs, labels, *, eps, norm, seed, indices, batch_size):
        return silent(model, inputs, labels)

    refused = {
        closed: "takes callback and early_stop, got closed",
        cascade: "takes callback and early_stop, got cascade",
        silent: "got 0 to 0 steps a sample from silent",
        stopping: r"got \d to \d steps a sample from stopping",
    }
    for attack, message in refused.items():
        with pytest.raises(ValueError, match=message) as error:
            attack_path(model, x, y, eps=0.1, attack=attack)
        assert "\n" not in str(error.value)


def test_bad_input_is_refused_in_one_line():
    model, x, y = right_net()
    with pytest.raises(ValueError, match="for 8 grey levels of 255 write 8/255"):
        attack_path(model, x, y, eps=8)
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got 'l3'"):
        attack_path(model, x, y, eps=0.1, norm="l3")
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values from"):
        attack_path(model, 4 * x - 2, y, eps=0.1)
    with pytest.raises(ValueError, match=r"matched: expected a number in \(0, 1\), got 90"):
        attack_path(model, x, y, eps=0.1, matched=90)


def test_following_leaves_no_gradient_and_no_random_stream():
    model, x, y = right_net()
    model.zero_grad()
    state = torch.get_rng_state()
    with torch.no_grad():  # as a caller might
        path = attack_path(model, x, y, eps=0.1, attack=partial(apgd, steps=3))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and not path.loss.requires_grad


def path_of(flip, steps=9, seed=0):
    """A path of random values whose labels flip at these rows."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(5, steps, len(flip), generator=g, dtype=torch.float64)
    distances, loss, kappa, confidence, margin = values
    return AttackPath(distances, loss, kappa, None, confidence, margin, torch.tensor(flip))


def test_bands_are_quartiles_of_the_samples_at_each_offset():
    path = path_of([3, 5, -1, 0, 2, 8, 5])
    values = path.loss.numpy()
    by_step = bands_by_step(path, path.loss)
    assert by_step.offsets == list(range(9))
    for row, *quartiles in zip(range(9), by_step.lower, by_step.median, by_step.upper, strict=True):
        begun_right = [values[row, i] for i in (0, 1, 2, 4, 5, 6)]
        assert quartiles == pytest.approx(np.quantile(begun_right, [0.25, 0.5, 0.75]))
    by_flip = bands_by_flip(path, path.loss, 4)
    reached = {}
    for offset in range(-4, 5):
        at = [(f + offset, i) for i, f in enumerate(path.flip.tolist()) if f > 0]
        inside = [values[step, i] for step, i in at if 0 <= step < 9]
        if len(inside) >= 2.5:  # half of the five that flip
            reached[offset] = np.quantile(inside, [0.25, 0.5, 0.75])
    assert by_flip.offsets == list(reached) == [-4, -3, -2, -1, 0, 1, 2, 3]
    found = list(zip(by_flip.lower, by_flip.median, by_flip.upper, strict=True))
    assert np.allclose(found, list(reached.values()))


def test_a_peak_at_the_flip_is_smeared_by_step_and_sharp_at_the_flip():
    path = path_of([2, 4, 6])
    peak = torch.zeros(9, 3)
    peak[path.flip, torch.arange(3)] = 1
    assert max(bands_by_step(path, peak).median) == 0
    band = bands_by_flip(path, peak, 2)
    assert dict(zip(band.offsets, band.median, strict=True)) == {-2: 0, -1: 0, 0: 1, 1: 0, 2: 0}


def test_paths_with_nothing_to_align_have_no_band():
    robust, wrong = aligned_bands(path_of([-1, -1]), 3), aligned_bands(path_of([0, 0]), 3)
    assert list(robust.by_step) == ["kappa", "confidence", "loss"] and not robust.by_flip
    assert not wrong.by_step and not wrong.by_flip and wrong.flipped == robust.flipped == 0


def test_one_path_or_several_are_drawn(tmp_path):
    model, x, y = right_net()
    path = attack_path(model, x, y, eps=0.1, attack=partial(pgd, steps=6), matched=0.9)
    save(path_figure(path), tmp_path / "one.png")
    save(path_figure({"robust": path_of([-1, -1])}), tmp_path / "named.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("one.png", "named.png"))
