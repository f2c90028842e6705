"""Every criterion: its formula, its inner attack, its modes, its labels, its company."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from cases import TRAINED_WITH_BATCH_NORM, images, small_net
from oracles import flat_gradient, flat_weights
from pydantic import TypeAdapter
from torch import nn

from flatreg import (
    APGDAT,
    AWP,
    FGSMPGI,
    FGSMRS,
    FGSMRSCS,
    LIET,
    MART,
    NFGSM,
    NUAT,
    PGDAT,
    SAM,
    TRADES,
    Brier,
    CrossEntropy,
    Forward,
    MarginBound,
    Memory,
    Objective,
    OffManifoldCurvature,
    RelativeFlatness,
    backward,
    relative_flatness,
)
from flatreg.attacks.query import loss_and_gradient
from flatreg.data.configuration import configuration
from flatreg.models.precision import cross_entropy
from flatreg.models.state import kept_buffers
from flatreg.terms import Criterion
from flatreg.terms.criteria import AttackedLoss
from flatreg.terms.protocol import EpsWarmUp, HandlesMode, Term

EPS = 0.1
ATTACKING = [
    NFGSM(eps=EPS),
    FGSMRS(eps=EPS),
    PGDAT(eps=EPS, steps=3),
    APGDAT(eps=EPS, steps=6),
    TRADES(eps=EPS, steps=3, beta=2.0),
    MART(eps=EPS, steps=3, beta=3.0),
]
BRIER = [type(c)(eps=EPS, loss="brier") for c in ATTACKING if c.kind in ("NFGSM", "TRADES")]
# Their attacks and what they keep are in test_fast_criteria.py.
REMEMBERING = [NUAT(eps=EPS), FGSMRSCS(eps=EPS), LIET(eps=EPS), FGSMPGI(eps=EPS)]
BRIER += [type(c)(eps=EPS, loss="brier") for c in REMEMBERING]
CRITERIA = [CrossEntropy(), Brier(), *ATTACKING]
EVERY = [*CRITERIA, *REMEMBERING]
SOFT = [c for c in EVERY if c.kind != "MART"]
COMPARE = ("TRADES", "MART", "NUAT", "LIET", "FGSMPGI")
CLIMBERS = [c for c in ATTACKING if c.kind != "NFGSM"]  # NFGSM leaves the ball by design


def kind(value):
    return getattr(value, "kind", None)


def each(criteria, name="criterion"):
    return pytest.mark.parametrize(name, criteria, ids=kind)


def net(**options):
    return small_net(dtype=torch.float64, **options)


def batch(n=8):
    x, y = images(n)
    return x.double(), y


def one_hot(y, dtype=torch.float32):
    return F.one_hot(y, 5).to(dtype)


def attack(criterion, model, x, y, seed=1):
    torch.manual_seed(seed)
    return criterion.attack(model, x, y)


# A criterion of one's own.


@configuration
class Noise(AttackedLoss):
    kind: Literal["Noise"] = "Noise"

    def attack(self, model, inputs, labels):
        return self.noisy(inputs).clamp(0, 1)


def test_a_criterion_of_ones_own_adds_its_attack():
    noise = Noise(eps=0.1)
    assert isinstance(noise, Term) and isinstance(noise, HandlesMode)
    model, (x, y) = small_net(), images()
    torch.manual_seed(1)
    loss = Objective(model, noise)(x, y).total
    torch.manual_seed(1)
    moved = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(model(moved), y))
    with pytest.raises(ValueError, match="inner_mode"):
        Noise(eps=0.1, inner_mode="half")


# The formulas, a sample and a class at a time.


def entropy(label, z):
    p = z.exp() / z.exp().sum()
    if label.ndim:
        return -sum(label[k] * p[k].log() for k in range(len(z)))
    return -p[label].log()


def squared_error(label, z):
    p = z.exp() / z.exp().sum()
    at = label if label.ndim else F.one_hot(label, len(z))
    return sum((p[k] - at[k]) ** 2 for k in range(len(z)))


def divergence(z, moved):
    p, q = z.exp() / z.exp().sum(), moved.exp() / moved.exp().sum()
    return sum(p[k] * (p[k] / q[k]).log() for k in range(len(z)))


def jensen_shannon(z, moved):
    middle = ((z.softmax(0) + moved.softmax(0)) / 2).log()
    return (divergence(z, middle) + divergence(moved, middle)) / 2


def boosted(label, z):
    p = z.exp() / z.exp().sum()
    return -p[label].log() - (1 - max(p[k] for k in range(len(z)) if k != label)).log()


def formula(criterion, z, moved, y):
    """Loss per sample from attacked logits, and from clean ones or those where the attack began."""
    losses = []
    left, lengths, _ = torch.linalg.svd(moved - z, full_matrices=False)
    shares = left.square() @ lengths  # diagonal of the root of D D^T: its trace is ||D||_*
    for clean, attacked, label, share in zip(z, moved, y, shares, strict=True):
        trained_on = squared_error if getattr(criterion, "loss", "") == "brier" else entropy
        if criterion.kind == "CrossEntropy":
            losses.append(entropy(label, clean))
        elif criterion.kind == "Brier":
            losses.append(squared_error(label, clean))
        elif criterion.kind == "TRADES":
            robust = criterion.beta * divergence(clean, attacked)
            losses.append(trained_on(label, clean) + robust)
        elif criterion.kind == "MART":
            right = clean[label].exp() / clean.exp().sum()
            robust = criterion.beta * divergence(clean, attacked) * (1 - right)
            losses.append(boosted(label, attacked) + robust)
        elif criterion.kind == "NUAT":
            losses.append(trained_on(label, clean) + criterion.beta * share)
        elif criterion.kind == "LIET":
            apart = criterion.beta * jensen_shannon(clean, attacked)
            losses.append(trained_on(label, attacked) + apart)
        elif criterion.kind == "FGSMPGI":
            apart = criterion.beta * (attacked - clean).square().mean()
            losses.append(trained_on(label, attacked) + apart)
        else:
            losses.append(trained_on(label, attacked))
    return torch.stack(losses)


def passes(z, moved, y):
    return {
        "clean": Forward(nn.Identity(), z, y, z),
        "start": Forward(nn.Identity(), z, y, z),
        "attacked": Forward(nn.Identity(), moved, y, moved),
    }


def logits(seed=0, n=16):
    torch.manual_seed(seed)
    pair = (3 * torch.randn(n, 5, dtype=torch.float64) for _ in range(2))
    return tuple(z.requires_grad_() for z in pair)


def test_the_table_has_every_kind():
    kinds = {c["$ref"].split("/")[-1] for c in TypeAdapter(Criterion).json_schema()["oneOf"]}
    assert {c.kind for c in EVERY} == kinds


@each([*EVERY, *BRIER])
def test_loss_and_gradients_are_those_of_the_paper(criterion):
    y, results = torch.arange(16) % 5, []
    for loss_of in (lambda z, q: criterion(passes(z, q, y)), lambda *z: formula(criterion, *z, y)):
        z = logits()
        loss = loss_of(*z)
        slopes = torch.autograd.grad(loss.sum(), z, allow_unused=True)
        results.append([loss, *(s for s in slopes if s is not None)])
    assert len(results[0]) == (3 if criterion.kind in COMPARE else 2)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_mart_stays_finite_where_probabilities_round_to_nothing():
    """At logits 0 and 200: p_y = e^-200 is 0 in float32, 1 - p_r as well."""
    z = torch.tensor([[0.0, 200.0], [200.0, 0.0]]).requires_grad_()
    y = torch.tensor([0, 0])
    loss = MART(eps=EPS)(passes(z, z, y))
    assert loss.tolist() == [400.0, 0.0]
    (slope,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(slope, torch.tensor([[-2.0, 2.0], [0.0, 0.0]]))
    flipped = MART(eps=EPS, beta=2.0)(passes(z, z.flip(1), y))  # KL 200; (1 - p_y) 1 and 0
    assert flipped.tolist() == [400.0, 400.0]


# The inner attacks.


def by_hand(criterion, model, x, y, seed=1):
    """The attack as the papers write it: a loop around the gradient of what it climbs."""
    torch.manual_seed(seed)
    uniform = criterion.kind in ("FGSMRS", "PGDAT", "APGDAT")
    noise = torch.rand_like(x) if uniform else torch.randn_like(x)
    if criterion.kind in ("TRADES", "MART"):
        at = x + 0.001 * noise
    else:
        at = (x + EPS * (2 * noise - 1)).clamp(0, 1)
    if criterion.kind == "APGDAT":
        rows = range(len(x))
        return torch.stack([auto_pgd(criterion, model, x[i], at[i], y[i]) for i in rows])
    for _ in range(getattr(criterion, "steps", 1)):
        at.requires_grad_()
        (slope,) = torch.autograd.grad(climbed(criterion, model, x, at, y).sum(), at)
        step = criterion.step_size * EPS * slope.sign()
        at = torch.min(torch.max(at.detach() + step, x - EPS), x + EPS).clamp(0, 1)
    return at


def auto_pgd(criterion, model, x, at, label):
    """Algorithm 1 of Croce and Hein (2020) for one sample: the point of largest loss it meets."""
    steps, eps = criterion.steps, criterion.eps

    def loss(point):
        point = point.detach().requires_grad_()
        value = entropy(label, model(point[None])[0])
        (slope,) = torch.autograd.grad(value, point)
        unit = slope.sign() if criterion.norm == "linf" else slope / slope.square().sum().sqrt()
        return value.item(), unit

    def inside(point):
        change = (point - x).clamp(-eps, eps)
        if criterion.norm == "l2":
            change = (point - x) * min(1.0, eps / float((point - x).square().sum().sqrt()))
        return (x + change).clamp(0, 1)

    marks, gap, position = set(), 0.22, 0.0
    while position + gap < 1:
        position += gap
        marks.add(round(position * steps))
        gap = max(gap - 0.03, 0.06)
    size, before, rises, last_mark, halved = 2 * eps, at, 0, 0, False
    value, slope = loss(at)
    best, best_value, best_slope, value_at_mark = at, value, slope, -float("inf")
    lower = -float("inf")
    for step in range(steps):
        rises += value > lower
        if step in marks and step > last_mark:
            few = rises < 0.75 * (step - last_mark)
            halved = few or (not halved and best_value <= value_at_mark)
            if halved:
                size, at, slope = size / 2, best, best_slope
            last_mark, rises, value_at_mark = step, 0, best_value
        moved = inside(at + size * slope)
        momentum = 0.75 if step else 1.0
        moved = inside(at + momentum * (moved - at) + (1 - momentum) * (at - before))
        before, at, lower = at, moved, value
        value, slope = loss(at)
        if value > best_value:
            best, best_value, best_slope = at, value, slope
    return best.detach()


def climbed(criterion, model, x, at, y):
    """What the inner attack climbs, per sample."""
    pairs = zip(model(x).detach(), model(at), y, strict=True)
    if criterion.kind == "TRADES":
        return torch.stack([divergence(z, q) for z, q, _ in pairs])
    return torch.stack([entropy(label, q) for _, q, label in pairs])


@each(CLIMBERS)
def test_the_inner_attack_is_the_loop_of_the_paper(criterion):
    model, (x, y) = net().eval(), batch()
    torch.testing.assert_close(
        attack(criterion, model, x, y), by_hand(criterion, model, x, y), rtol=0, atol=1e-12
    )


@each(CLIMBERS)
def test_the_inner_attack_climbs_within_ball_and_box(criterion):
    model, (x, y) = net().eval(), batch()
    x = x.clamp(0.05, 0.95).round(decimals=1)  # black and white pixels: the box cuts the ball
    attacked = attack(criterion, model, x, y)
    assert float((attacked - x).abs().max()) <= EPS + 1e-12
    assert 0 <= float(attacked.min()) and float(attacked.max()) <= 1
    start = attack(replace(criterion, eps=1e-9), model, x, y)
    if criterion.kind != "FGSMRS":
        assert float((attacked - x).abs().mean()) > 0.3 * EPS
    rise = climbed(criterion, model, x, attacked, y) - climbed(criterion, model, x, start, y)
    assert bool((rise > 0).all())


def test_fgsmrs_is_one_step_of_1_25_eps_from_a_point_of_the_ball():
    model, (x, y) = net().eval(), batch()
    torch.manual_seed(1)
    start = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)
    moved = start.detach() + 1.25 * EPS * slope.sign()
    expected = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    torch.testing.assert_close(attack(FGSMRS(eps=EPS), model, x, y), expected, rtol=0, atol=1e-15)


@each(ATTACKING)
def test_an_attack_leaves_parameters_alone(criterion):
    model, (x, y) = net().train(), batch()
    kept = [torch.ones_like(p) if i % 2 else None for i, p in enumerate(model.parameters())]
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad
    attacked = attack(criterion, model, x, y)
    assert not attacked.requires_grad
    for p, grad in zip(model.parameters(), kept, strict=True):
        assert p.grad is grad and p.requires_grad
        assert grad is None or torch.equal(grad, torch.ones_like(p))


# A ball that grows.


@each(ATTACKING)
def test_a_schedule_attacks_in_the_ball_of_the_moment(criterion):
    x, y = batch()
    rising = replace(criterion, schedule=EpsWarmUp(fraction=0.5, begin=0.25))

    def loss(criterion, progress=1.0):
        objective = Objective(net().train(), criterion)
        objective.progress = progress
        torch.manual_seed(1)
        return objective(x, y).total

    for progress, factor in ((0.0, 1e-3), (0.25, 1e-3), (0.375, 0.5), (0.5, 1.0), (1.0, 1.0)):
        expected = loss(replace(criterion, eps=factor * EPS))
        torch.testing.assert_close(loss(rising, progress), expected, rtol=1e-12, atol=0)
    assert loss(rising) != loss(replace(criterion, eps=EPS / 2))


def test_the_shapes_of_the_growth():
    radius = lambda p, **k: EpsWarmUp(fraction=0.8, **k)(NFGSM(eps=EPS), p).eps / EPS  # noqa: E731
    for p in (0.1, 0.4, 0.7):
        assert radius(p) == pytest.approx(p / 0.8)
        assert radius(p, shape="cosine") == pytest.approx(0.5 - 0.5 * math.cos(math.pi * p / 0.8))
        assert radius(p, floor=0.6) == pytest.approx(max(0.6, p / 0.8))
        assert radius(p, begin=0.3) == pytest.approx(max(1e-3, (p - 0.3) / 0.5))
    with pytest.raises(ValueError, match=r"begin: expected less than fraction=0.5, got 0.5"):
        EpsWarmUp(fraction=0.5, begin=0.5)


# In L2.


def descent(model, x, y, start, steps, size):
    """PGD in L2 by hand, a sample at a time, where the box does not cut."""
    x_ = start.clone()
    for _ in range(steps):
        points = x_.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(points), y).sum(), points)
        for i in range(len(x)):
            x_[i] += size * g[i] / g[i].square().sum().sqrt()
            far = (x_[i] - x[i]).square().sum().sqrt()
            x_[i] = x[i] + (x_[i] - x[i]) * min(1.0, float(EPS_L2 / far))
    return x_


EPS_L2 = 0.3


@each(ATTACKING)
def test_attacks_in_l2_are_steps_along_the_unit_gradient(criterion):
    criterion = replace(criterion, norm="l2", eps=EPS_L2, inner_mode="eval")
    model, (x, y) = net().eval(), batch()
    x = 0.4 + 0.2 * x
    found = attack(criterion, model, x, y)
    torch.manual_seed(1)
    if criterion.kind in ("TRADES", "MART"):
        start = x + 0.001 * torch.randn_like(x)
    else:
        direction = torch.randn_like(x)
        length = torch.rand(len(x), dtype=x.dtype) ** (1 / 256)
        radius = EPS_L2 * getattr(criterion, "noise", 1.0)
        unit = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
        start = x + radius * length[:, None, None, None] * unit
    labels = model(x).softmax(1).detach() if criterion.kind == "TRADES" else y
    size = getattr(criterion, "step_size", 1.0) * EPS_L2
    if criterion.kind == "APGDAT":
        rows = zip(x, start, y, strict=True)
        expected = torch.stack([auto_pgd(criterion, model, *row) for row in rows])
    elif criterion.kind == "NFGSM":
        points = start.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(points), y).sum(), points)
        expected = (start + size * g / g.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    else:
        steps = getattr(criterion, "steps", 1)
        expected = descent(model, x, labels, start.clamp(0, 1), steps, size)
        assert float((found - x).flatten(1).norm(dim=1).max()) <= EPS_L2 * (1 + 1e-12)
    inside = ((expected > 0) & (expected < 1)).flatten(1).all(1)
    assert bool(inside.all())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_radius_above_one_is_for_l2_alone():
    assert PGDAT(norm="l2", eps=3).eps == MarginBound(norm="l2", eps=3).eps == 3
    for kind_ in (PGDAT, MarginBound):
        with pytest.raises(ValueError, match="write 3/255"):
            kind_(eps=3)


# Modes.


def test_defaults_of_the_inner_mode():
    modes = {c.kind: c.inner_mode for c in [*ATTACKING, *REMEMBERING]}
    assert {k for k, mode in modes.items() if mode == "eval"} == {"TRADES", "MART", "NUAT"}


@pytest.mark.parametrize("mode", ["train", "eval"])
@each([*ATTACKING, *REMEMBERING])
def test_the_inner_mode_is_kept_and_given_back(criterion, mode):
    criterion = replace(criterion, inner_mode=mode)
    model = nn.Sequential(*net(dropout=0.5), nn.BatchNorm1d(5, dtype=torch.float64)).train()
    model[1].eval()  # a frozen BatchNorm: back as it was, not as the model is
    x, y = batch()
    modes = [m.training for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    got = attack(criterion, model, x, y)
    assert [m.training for m in model.modules()] == modes and not all(modes)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    evaluated = attack(replace(criterion, inner_mode="train"), model.eval(), x, y)
    assert torch.equal(got, evaluated) == (mode == "eval")
    if mode == "train":
        model.train()[1].eval()
        with kept_buffers(model):
            assert torch.equal(got, attack(criterion, model, x, y))


@each([*ATTACKING, *REMEMBERING])
def test_modes_come_back_when_the_attack_fails(criterion):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = nn.Sequential(nn.BatchNorm2d(1), Fails()).train()
    model[0].eval()
    with pytest.raises(RuntimeError, match="no"):
        attack(replace(criterion, inner_mode="eval"), model, *images())
    assert [m.training for m in model.modules()] == [True, False, True]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_instance_norm_with_statistics_goes_through_both_modes(mode):
    """In train mode its buffers are taken away meanwhile, in eval mode it needs them."""
    model, (x, y) = net(batch_norm=False), batch()
    model[1] = nn.InstanceNorm2d(6, track_running_stats=True, dtype=torch.float64)
    bound = Objective(model.train(), PGDAT(eps=EPS, steps=1, inner_mode=mode)).bind(x, y)
    bound.prepare()
    assert torch.equal(model[1].running_mean, torch.zeros(6, dtype=torch.float64))
    bound()
    assert not torch.equal(model[1].running_mean, torch.zeros(6, dtype=torch.float64))


# Soft labels.


@each(SOFT)
def test_the_loss_of_a_mixture_is_the_mixture_of_the_losses(criterion):
    a, b = torch.arange(16) % 5, (torch.arange(16) + 2) % 5
    z = logits()
    mixed = 0.3 * one_hot(a, torch.float64) + 0.7 * one_hot(b, torch.float64)
    parts = [criterion(passes(*z, y)) for y in (a, b)]
    # |p - y|^2 of a mixture lies below the mixture of both by the spread of the labels.
    spread = 0.3 * 0.7 * 2 if criterion.kind == "Brier" else 0.0
    expected = 0.3 * parts[0] + 0.7 * parts[1] - spread
    torch.testing.assert_close(criterion(passes(*z, mixed)), expected)
    torch.testing.assert_close(criterion(passes(*z, mixed)), formula(criterion, *z, mixed))


def outcome(criterion, penalties, labels, dtype=torch.float32):
    """Loss, gradients and attacked images of one step on a model in train mode."""
    dropout = 0.0 if any(p.kind == "LayerFlatness" for p in penalties) else 0.2
    model, (x, _) = small_net(dropout=dropout, dtype=dtype).train(), images()
    torch.manual_seed(1)
    memory = Memory(samples=len(x))
    memory.start_epoch(0)
    objective = Objective(model, criterion, penalties, memory=memory)
    bound = objective.bind(x.to(dtype), labels, torch.arange(len(x)))
    loss = bound().total
    loss.backward()
    attacked = [] if bound.attacked is None else [bound.attacked]
    return [loss.detach(), *attacked, *(p.grad for p in model.parameters())]


@each(SOFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_probabilities_give_the_bits_of_class_indices(criterion, dtype):
    _, y = images()
    hard = outcome(criterion, [], y, dtype)
    for labels in (one_hot(y), one_hot(y, torch.float64), y.int(), y.float()):
        soft = outcome(criterion, [], labels, dtype)
        assert all(torch.equal(a, b) for a, b in zip(hard, soft, strict=True))


WITH_SOFT = [
    *TRAINED_WITH_BATCH_NORM,
    OffManifoldCurvature(strength=0.5, eps=EPS, fraction=0.5),
]


@each(WITH_SOFT, "penalty")
def test_every_penalty_goes_with_trades_and_with_soft_labels(penalty):
    _, y = images()
    trades = TRADES(eps=EPS, steps=1)
    hard, soft = (outcome(trades, [penalty], labels) for labels in (y, one_hot(y)))
    torch.testing.assert_close(hard, soft)
    smooth = outcome(trades, [penalty], 0.9 * one_hot(y) + 0.02)
    assert all(bool(v.isfinite().all()) for v in smooth) and not torch.equal(hard[0], smooth[0])


def test_soft_labels_in_bfloat16():
    _, y = images()
    labels = 0.9 * one_hot(y) + 0.02
    full = outcome(PGDAT(eps=EPS, steps=2), [], labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert outcome(PGDAT(eps=EPS, steps=2), [], labels)[0].item() == pytest.approx(
            full.item(), rel=0.02
        )
    z = logits()[0].detach()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for of in (torch.bfloat16, torch.float32, torch.float64):
            loss = cross_entropy(z[:8].to(dtype), labels.to(of))
            expected = F.cross_entropy(z[:8], labels.double(), reduction="none")
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(loss.double(), expected, rtol=0.03, atol=0.03)


def test_climb_is_wrong_where_the_likeliest_class_is_not_said():
    z = torch.eye(5)[:, :5]
    labels = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [0.6, 0.4, 0, 0, 0],
            [0, 0.5, 0.5, 0, 0],
            [0.5, 0, 0, 0.5, 0],
            [0.2, 0.2, 0.2, 0.2, 0.2],
        ]
    )
    _, _, wrong = loss_and_gradient(nn.Identity(), z, labels, "cross_entropy")
    assert wrong.tolist() == [False, True, False, False, False]  # a tie has two right answers


@each(EVERY)
def test_labels_that_the_model_has_no_class_for_are_refused_in_one_line(criterion):
    model, (x, y) = net(), batch()
    memory, rows = Memory(samples=len(x)), torch.arange(len(x))
    memory.start_epoch(0)
    objective = Objective(model, criterion, memory=memory)
    with pytest.raises(ValueError, match=r"^labels: expected 0 to 4, got \d to 7$"):
        objective.bind(x, torch.where(rows == 0, 7, y), rows)()
    assert float(objective.bind(x, y, rows)().total.detach()) > 0
    with pytest.raises(ValueError, match=r"^expected a batch of one sample or more"):
        objective.bind(x[:0], y[:0], rows[:0])


def test_what_needs_a_class_refuses_probabilities():
    x, y = images()
    soft, model = one_hot(y), small_net()
    expected = r"labels: expected class indices \(8,\), got probabilities of shape \(8, 5\)$"
    with pytest.raises(ValueError, match=f"^MART: {expected}"):
        Objective(model, MART(eps=EPS))(x, soft)
    with pytest.raises(ValueError, match=f"^MART: {expected}"):
        MART(eps=EPS)(passes(*logits(n=8), soft))
    for criterion in SOFT:
        memory = Memory(samples=len(x))
        memory.start_epoch(0)
        bound = Objective(model, criterion, memory=memory).bind(x, soft[:, :4], torch.arange(8))
        with pytest.raises(ValueError, match=r"expected .*probabilities .*\(8, 5"):
            bound()


@pytest.mark.parametrize("cls", [type(c) for c in [*ATTACKING, *REMEMBERING]])
def test_settings_are_checked(cls):
    for wrong in ({"eps": 8}, {"step_size": 0}, {"inner_mode": "test"}, {"beta": -1}, {"steps": 0}):
        with pytest.raises(ValueError):
            cls(**{"eps": EPS, **wrong})
    assert cls(eps="8/255").eps == 8 / 255
    if cls is MART:
        with pytest.raises(ValueError, match="loss"):
            MART(eps=EPS, loss="brier")


def test_the_brier_score_of_mixtures_and_in_half_precision():
    z, _ = logits(n=4)
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 4).double()
    found = Brier()(passes(z, z, mixed))
    torch.testing.assert_close(found, (z.softmax(1) - mixed).square().sum(1))
    half = Brier()(passes(z.bfloat16(), z, torch.zeros(4, dtype=torch.long)))
    assert half.dtype == torch.float32
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    assert Brier()(passes(sure, sure, torch.tensor([0, 0]))).tolist() == [0.0, 2.0]


# What they cost, as docs/penalties.md has it.


class Counted(nn.Module):
    """Counts the samples that pass forward and backward."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient):
        self.backwards += len(gradient)


def table():
    """Of the page, by kind: forward and backward passes of a step."""
    page = (Path(__file__).parent.parent / "docs/penalties.md").read_text(encoding="utf-8")
    lines = page.split("## Criteria")[1].split("\n## ")[0].splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| `")]
    return {row[1].strip(" `"): tuple(map(float, row[-4:-2])) for row in cells}


def test_the_page_has_the_passes_of_a_step_of_every_criterion():
    found = {}
    for criterion in (type(c)(**({"eps": EPS} if hasattr(c, "eps") else {})) for c in EVERY):
        model, (x, y), memory = Counted(net(batch_norm=False)), batch(), Memory(samples=8)
        objective = Objective(model, criterion, memory=memory)
        memory.start_epoch(0)
        for number in range(4):
            if number == 2:  # the first two are passed again, to see whether the model repeats
                model.forwards = model.backwards = 0
            objective.bind(x, y, torch.arange(8))().total.backward()
        found[criterion.kind] = (model.forwards / 16, model.backwards / 16)
    assert found == table()


# In company.


@pytest.mark.parametrize("wrap", ["plain", "SAM", "AWP"])
@each(CRITERIA)
def test_the_gradient_of_a_step_is_its_formula_and_the_attack_is_made_once(
    criterion, wrap, monkeypatch
):
    model, (x, y), calls = net().eval(), batch(4), []
    if criterion.kind not in ("CrossEntropy", "Brier"):
        cls, original = type(criterion), type(criterion).attack

        def counted(self, *arguments):
            calls.append(original(self, *arguments))
            return calls[-1]

        monkeypatch.setattr(cls, "attack", counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if wrap != "plain":
        optimizer = SAM(optimizer, rho=0.1) if wrap == "SAM" else AWP(optimizer, gamma=0.05)
    bound = Objective(model, criterion, [RelativeFlatness(strength=0.1)]).bind(x, y)
    before = flat_weights(model)
    backward(optimizer, bound)
    assert len(calls) == (criterion.kind not in ("CrossEntropy", "Brier"))
    assert torch.equal(flat_weights(model), before)
    attacked = calls[0] if calls else x

    def loss(at):
        z, phi = at(x), at[:-1](x)
        kappa = relative_flatness(phi, z, at[-1].weight) / 32
        return (formula(criterion, z, at(attacked), y) + 0.1 * kappa).mean()

    g = flat_gradient(model, loss)
    if wrap == "SAM":
        g = flat_gradient(model, loss, 0.1 * g / g.norm())
    elif wrap == "AWP":
        g = flat_gradient(model, loss, layerwise(model, g, 0.05))
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, g, rtol=1e-8, atol=1e-12)


def layerwise(model, g, gamma):
    """AWP: a share gamma of the norm of every weight matrix, along its own gradient."""
    pieces, start = [], 0
    for p in model.parameters():
        piece = g[start : start + p.numel()]
        share = gamma * p.detach().norm() / piece.norm() if p.ndim > 1 else 0.0
        pieces.append(share * piece)
        start += p.numel()
    return torch.cat(pieces)


@each([TRADES(eps=EPS, steps=2), MART(eps=EPS, steps=2)])
def test_under_ddp_one_pass_of_two_goes_through_the_wrapper(criterion, tmp_path):
    """In train mode with BatchNorm; the second pass through DDP would overwrite its buffers."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        plain, model, (x, y), outer = net().train(), net().train(), batch(), []
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_forward_hook(lambda *_: outer.append(1))
        for at in (plain, wrapped):
            torch.manual_seed(1)
            objective = Objective(at, criterion, [RelativeFlatness(strength=0.1)])
            objective.check(x)
            outer.clear()
            optimizer = SAM(torch.optim.SGD(at.parameters(), lr=0.1), rho=0.1)
            backward(optimizer, objective.bind(x, y))
        assert len(outer) == 2  # one in each pass of SAM
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
        for a, b in zip(plain.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_training_with_trades_lowers_the_worst_kl_in_the_ball():
    """A larger beta more than a smaller one, against training on the clean batch alone."""
    ends = []
    for beta in (0.0, 1.0, 6.0):
        model, (x, y) = net(batch_norm=False).eval(), batch(32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        objective = Objective(model, TRADES(beta=beta, eps=EPS, steps=2, step_size=1.0))
        for _ in range(20):
            backward(optimizer, objective.bind(x, y))
            optimizer.step()
            optimizer.zero_grad()
        attacked = attack(TRADES(eps=EPS), model, x, y)
        ends.append(climbed(TRADES(eps=EPS), model, x, attacked, y).mean().item())
    assert ends[2] < 0.6 * ends[1] < 0.54 * ends[0]
