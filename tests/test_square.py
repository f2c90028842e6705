import copy
import importlib
import math
from functools import cache, partial

import cases
import numpy as np
import pytest
import torch
from cases import small_net
from oracles import affine_is_robust
from torch import nn

from flatreg.attacks.pgd import noise, pgd
from flatreg.attacks.random_search import random_search
from flatreg.attacks.square import propose, square, start
from flatreg.threat import distance, rounding

# `flatreg.attacks.square` is the function once the package is imported.
square_module = importlib.import_module("flatreg.attacks.square")
ATTACKS = {
    "square": partial(square, queries=40),
    "noise": partial(noise, draws=12),
    "random search": partial(random_search, queries=12),
}
RADII = {"linf": 0.03, "l2": 0.3, "l1": 3.0}


@cache
def _trained():
    return cases.trained_net()


def trained_net(n=64):
    """A copy of the net that is fitted once, and the first of its data."""
    model, x, y = _trained()
    return copy.deepcopy(model), x[:n], y[:n]


def windows(height, width, share, least):
    """Sides of one window, for images at least as wide as high."""
    side = max(round(math.sqrt(share * height * width)), least)
    side += 1 if least == 3 and side % 2 == 0 else 0
    if side <= height:
        return side, side
    side = max(round(share * width), least)
    side += 1 if least == 3 and side % 2 == 0 else 0
    return height, min(side, width)


def pyramid_by_loops(rows, columns, power, turned):
    """The eta of the paper: nested rectangles, each laid on the one below."""
    if turned or rows == 1 < columns:
        return pyramid_by_loops(columns, rows, power, False).T
    halves = []
    for height in (rows // 2, rows - rows // 2):
        half = np.zeros((height, columns))
        for n in range(max(height, columns) // 2 + 1):
            for i in range(height):
                for j in range(columns):
                    if abs(i - height // 2) <= n and abs(j - columns // 2) <= n:
                        half[i, j] += 1 / (n + 1) ** (2 if power == 2 else 4)
        halves.append(half / length(half, power) if height else half)
    eta = np.concatenate([halves[0], -halves[1]])
    return eta / length(eta, power)


def length(array, power):
    return (np.abs(array) ** power).sum() ** (1 / power)


def query_by_loops(x, best, eps, numbers, share, norm):
    """One query of algorithm 2 or 3, one sample, channel by channel."""
    channels, height, width = x.shape
    rows, columns = windows(height, width, share, 1 if norm == "linf" else 3)
    corners = [
        int(u * (free + 1))
        for u, free in zip(numbers[:4], [height - rows, width - columns] * 2, strict=True)
    ]
    signs = [-1 if u < 0.5 else 1 for u in numbers[5:]]
    here = np.s_[corners[0] : corners[0] + rows, corners[1] : corners[1] + columns]
    there = np.s_[corners[2] : corners[2] + rows, corners[3] : corners[3] + columns]
    if norm == "linf":
        new = best.copy()
        for c in range(channels):
            new[c][here] = np.clip(x[c][here] + eps * signs[c], 0, 1)
        return new
    power = 2 if norm == "l2" else 1
    eta = pyramid_by_loops(rows, columns, power, numbers[4] < 0.5)
    change = best - x
    new = change.copy()
    unused = eps**power - length(change, power) ** power
    for c in range(channels):
        both = np.zeros((height, width), dtype=bool)
        both[here] = both[there] = True
        budget = max((np.abs(change[c][both]) ** power).sum() + unused / channels, 0)
        had = length(change[c][here], power)
        direction = signs[c] * eta + (change[c][here] / had if had else 0)
        new[c][there] = 0
        new[c][here] = direction / length(direction, power) * budget ** (1 / power)
    return np.clip(x + new, 0, 1)


def marks(step):
    return sum(step > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("shape", [(3, 11, 11), (1, 7, 16), (2, 1, 23)])
def test_a_query_is_the_papers_written_out_sample_by_sample(norm, shape):
    rng = np.random.default_rng(0)
    x, eps = rng.random((20, *shape)), RADII[norm] * rng.uniform(0.5, 1, 20)
    level = rng.integers(0, 10, 20)
    signs = torch.from_numpy(rng.random((20, shape[0], 10, max(shape[2], 10))))
    best = start(
        torch.from_numpy(x),
        torch.from_numpy(eps).reshape(-1, 1, 1, 1),
        signs[:, :, :1] if norm == "linf" else signs,
        norm,
    )
    for _ in range(2):  # from the first points, and from what comes of them
        numbers = rng.random((20, 5 + shape[0]), dtype=np.float32)
        fast = propose(
            torch.from_numpy(x),
            best,
            torch.from_numpy(eps).reshape(-1, 1, 1, 1),
            torch.from_numpy(numbers),
            torch.from_numpy(level),
            norm=norm,
            p_init=0.8,
        )
        for i in range(20):
            slow = query_by_loops(
                x[i], best[i].numpy(), eps[i], numbers[i], 0.8 / 2 ** level[i], norm
            )
            assert np.abs(fast[i].numpy() - slow).max() < 1e-9
        assert int(((fast - best).flatten(1) != 0).any(1).sum()) > 10
        best = fast


@pytest.mark.parametrize("norm", RADII)
def test_the_first_points_spend_all_of_the_radius_where_the_box_allows(norm):
    x, eps = torch.full((3, 2, 13, 17), 0.5).double(), torch.full((3, 1, 1, 1), 0.1).double()
    first = start(x, eps, torch.rand(3, 2, 1 if norm == "linf" else 10, 17), norm)
    assert torch.allclose(distance(first, x, norm), torch.tensor(0.1).double(), atol=1e-9)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", ATTACKS)
def test_images_stay_in_ball_and_box_and_fool_where_it_says_so(attack, norm):
    model, x, y = trained_net()
    eps, seen = RADII[norm], []
    result = ATTACKS[attack](
        model, x, y, eps=eps, norm=norm, callback=lambda row, _, at, __: seen.append((row, at))
    )
    for row, at in seen:
        assert float(distance(at, x[row], norm).max()) <= eps + rounding(x, norm)
        assert 0 <= float(at.min()) and float(at.max()) <= 1
    with torch.no_grad():
        assert torch.equal(model(result.inputs).argmax(1) != y, result.fooled)
        wrong_anyway = model(x).argmax(1) != y
    assert int(wrong_anyway.sum()) <= int(result.fooled.sum()) < len(x)
    if attack == "square":
        assert int(result.fooled.sum()) > int(wrong_anyway.sum()) + 5


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_verdict_does_not_depend_on_the_batch_it_is_in(attack, norm):
    model, x, y = trained_net()
    model, x, fool = model.double(), x.double(), ATTACKS[attack]
    together = fool(model, x, y, eps=RADII[norm], norm=norm, seed=3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for rows, size in zip(order.split(37), (10, None), strict=True):
        apart = fool(
            model,
            x[rows],
            y[rows],
            eps=RADII[norm],
            norm=norm,
            seed=3,
            indices=rows.tolist(),
            batch_size=size,
        )
        assert torch.equal(apart.fooled, together.fooled[rows])
        if attack != "noise":  # whose draws come in another order
            assert torch.allclose(apart.inputs, together.inputs[rows], rtol=0, atol=1e-9)
    if attack == "square":
        assert 0 < int(together.fooled.sum()) < len(x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_points_differ_between_samples_and_seeds(attack):
    model = small_net(batch_norm=False).eval()
    x = torch.full((2, 1, 16, 16), 0.5)
    with torch.no_grad():
        y = model(x).argmax(1)
    runs = [ATTACKS[attack](model, x, y, eps=0.001, seed=s).inputs for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_a_smaller_random_search_is_the_beginning_of_a_larger_one():
    model, x, y = trained_net(n=4)
    model.double()
    tried = []
    for queries in (20, 50):
        seen = []
        random_search(
            model,
            x.double(),
            y,
            eps=0.01,
            queries=queries,
            early_stop=False,
            callback=lambda _, __, at, ___, seen=seen: seen.append(at),
        )
        tried.append(torch.stack(seen))
        assert len(tried[-1].flatten(1).unique(dim=0)) == queries
    assert torch.equal(tried[0], tried[1][:20])


@pytest.mark.parametrize("attack", ATTACKS)
def test_passes_are_counted_and_none_goes_backward(attack):
    model, x, y = trained_net()
    seen = []

    def count(_, args):
        assert not torch.is_grad_enabled() and not args[0].requires_grad
        seen.append(len(args[0]))

    model.register_forward_pre_hook(count)
    result = ATTACKS[attack](model, x, y, eps=0.02)
    assert sum(seen) == result.forwards and result.backwards == 0
    queries = 40 if attack == "square" else 12
    left = int((~result.fooled).sum())
    assert left * queries <= result.forwards < len(x) * queries


class Rounded(nn.Module):
    """Gradient zero everywhere, or none at all, and as easily fooled as before."""

    def __init__(self, model, by):
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x):
        if self.by == "numpy":
            return torch.from_numpy(self.model(x).detach().numpy())
        return (20 * self.model(x)).round() / 20


def test_it_fools_models_without_a_gradient_where_pgd_fools_nobody():
    model, x, y = trained_net()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    assert int(pgd(Rounded(model, "round"), x, y, eps=0.03, steps=5).fooled.sum()) == 0
    for by in ("round", "numpy"):
        fooled = square(Rounded(model, by), x, y, eps=0.03, queries=100).fooled
        assert int(fooled.sum()) > 10
    with pytest.raises(ValueError, match="have no gradient"):
        pgd(Rounded(model, "numpy"), x, y, eps=0.03)


@pytest.mark.parametrize("norm", RADII)
def test_the_margin_of_the_best_point_never_rises(monkeypatch, norm):
    model, x, y = trained_net(n=32)
    margins = []

    def noting(inputs, best, *args, **kwargs):
        logits = model(best).detach()
        mine = logits.gather(1, y[:, None])[:, 0]
        margins.append(mine - logits.scatter(1, y[:, None], -torch.inf).amax(1))
        return propose(inputs, best, *args, **kwargs)

    monkeypatch.setattr(square_module, "propose", noting)
    square(model, x, y, eps=RADII[norm], norm=norm, queries=60, early_stop=False)
    path = torch.stack(margins)
    assert path.shape == (59, 32) and float(path.diff(dim=0).max()) < 1e-5
    assert float((path[-1] - path[0]).max()) < 0


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", RADII)
def test_the_scale_of_the_logits_changes_no_bit(attack, norm):
    model, x, y = trained_net()
    before = ATTACKS[attack](model, x, y, eps=RADII[norm], norm=norm)
    with torch.no_grad():
        model[-1].weight.mul_(1024)
        model[-1].bias.mul_(1024)
    after = ATTACKS[attack](model, x, y, eps=RADII[norm], norm=norm)
    assert torch.equal(before.fooled, after.fooled) and torch.equal(before.inputs, after.inputs)


@pytest.mark.parametrize("shape", [(12,), (1, 3, 4)])
def test_verdicts_on_an_affine_classifier_approach_the_closed_forms(shape):
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 12, generator=g, dtype=torch.float64))
        layer.bias.copy_(torch.randn(2, generator=g, dtype=torch.float64))
        x = torch.rand(150, 12, generator=g, dtype=torch.float64)
        y = layer(x).argmax(1)
    result = square(
        nn.Sequential(nn.Flatten(), layer), x.reshape(-1, *shape), y, eps=0.1, queries=400
    )
    exact = [affine_is_robust(layer.weight, layer.bias, *s, 0.1) for s in zip(x, y)]  # noqa: B905
    claimed = (~result.fooled).tolist()
    assert all(claim or not truth for claim, truth in zip(claimed, exact))  # noqa: B905
    assert sum(claimed) - sum(exact) <= 2 and 20 < sum(exact) < 130


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", ATTACKS)
def test_flat_inputs_and_per_sample_radii(attack, norm):
    model, x, y = trained_net()
    model, x = nn.Sequential(nn.Unflatten(1, (1, 16, 16)), model), x.flatten(1)
    eps = torch.full((len(x),), 2 * RADII[norm])
    eps[::2] = 0
    result = ATTACKS[attack](model, x, y, eps=eps, norm=norm)
    with torch.no_grad():
        wrong_anyway = model(x).argmax(1) != y
    assert result.inputs.shape == x.shape
    assert torch.equal(result.fooled[::2], wrong_anyway[::2])
    assert torch.allclose(result.inputs[::2], x[::2], atol=1e-7)
    if attack == "square":
        assert int(result.fooled[1::2].sum()) > int(wrong_anyway[1::2].sum())


def test_the_share_of_pixels_halves_at_the_papers_marks_and_no_number_comes_twice(monkeypatch):
    model, x, y = trained_net(n=2)
    levels, drawn = [], []

    def noting(inputs, best, eps, numbers, level, **kwargs):
        levels.append(level.tolist())
        drawn.append(numbers)
        return best

    monkeypatch.setattr(square_module, "propose", noting)
    square(model, x, y, eps=0.0, queries=500, early_stop=False)
    assert levels == [[marks(20 * step)] * 2 for step in range(1, 500)]
    assert len(torch.cat(drawn).unique(dim=0)) == 2 * 499


def test_bad_settings_are_refused_in_one_line():
    model, x, y = trained_net(n=4)
    for attack in (square, random_search):
        with pytest.raises(ValueError, match="queries: expected a whole number from 1, got 0"):
            attack(model, x, y, eps=0.1, queries=0)
    with pytest.raises(ValueError, match="draws: expected a whole number from 1, got 0"):
        noise(model, x, y, eps=0.1, draws=0)
    with pytest.raises(ValueError, match=r"p_init: expected a number in \(0, 1\], got 1.5"):
        square(model, x, y, eps=0.1, p_init=1.5)
    for attack in ATTACKS.values():
        with pytest.raises(ValueError, match="for 8 grey levels of 255 write 8/255"):
            attack(model, x, y, eps=8)
        with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got 'l3'"):
            attack(model, x, y, eps=0.1, norm="l3")
