"""Race: far samples are given up, the nearest targets are searched, others change nothing."""

import pytest
import torch
from cases import trained_net
from torch import nn

from flatreg.attacks import race
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.search import likeliest


def affine(classes, width, n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, classes).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, width, generator=draws, dtype=torch.float64))
        layer.bias.zero_()
    x = 0.3 + 0.4 * torch.rand(n, width, generator=draws, dtype=torch.float64)
    return layer, x, layer(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_affine_models_of_any_number_of_classes_are_judged_by_the_closed_form(classes):
    """Within eps of the image; the nearest class need not be the likeliest other one."""
    model, x, y = affine(classes, 40, 60)
    gap = (model(x).gather(1, y[:, None]) - model(x)).detach()
    slope = (model.weight[y][:, None] - model.weight[None]).abs().sum(2).detach()
    distance = (gap / slope).nan_to_num(torch.inf)  # linf, of each class
    distance = distance.scatter(1, y[:, None], torch.inf)
    among = likeliest(QueriedModel(model), x, y, 9)
    exact = distance.gather(1, among).amin(1)
    eps = float(exact.median())
    result = race(model, x, y, eps=eps)
    clear = (exact - eps).abs() > 1e-6  # of nine classes the race tries, the nearest
    assert torch.equal(result.fooled[clear], (exact <= eps)[clear])
    assert 0 < int(result.fooled.sum()) < len(x)


def test_samples_whose_nearest_image_is_far_cost_the_heats_alone():
    model, x, y = affine(10, 40, 20)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    far = race(model, x, y, eps=1e-6, heats=((9, 10, 2.5),))
    hook.remove()
    assert not far.fooled.any()
    assert far.forwards == sum(seen) == 20 * (1 + 9 * 11)
    assert far.backwards <= 20 * 9 * 11


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_sample_changes_the_verdict_of_another(norm):
    model, x, y = trained_net(n=60)
    model, x, eps = model.double(), x.double(), {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]
    short = dict(heats=((4, 6, 2.5), (2, 8, 1.5)), fmn=(1, 6), apgd=(2, 12))
    together = race(model, x, y, eps=eps, norm=norm, indices=range(60), **short)
    assert 0 < int(together.fooled.sum()) < 60
    for rows in torch.arange(60).flip(0).split(17):
        some = dict(norm=norm, indices=rows.tolist(), batch_size=5, **short)
        apart = race(model, x[rows], y[rows], eps=eps, **some)
        assert torch.equal(apart.fooled, together.fooled[rows])


def test_another_start_fools_those_of_the_first_and_more():
    model, x, y = trained_net(n=60)
    few = dict(norm="l2", eps=0.2, heats=((2, 1, 1e9),), fmn=(1, 1), apgd=(2, 3))
    once, twice, left_out = (race(model, x, y, starts=n, **few) for n in (1, 2, None))
    assert once.fooled.sum() < twice.fooled.sum()
    assert not (once.fooled & ~twice.fooled).any()
    assert torch.equal(twice.inputs, left_out.inputs)


def test_a_search_in_another_form_is_refused_and_whole_numbers_of_any_kind_are_taken():
    model, x, y = trained_net(n=10)
    few = dict(eps=0.02, heats=((2, 3, 1.5),), fmn=(1, 3), apgd=(1, 3))
    floats = dict(eps=0.02, heats=[[2.0, 3.0, 1.5]], fmn=[1.0, 3.0], apgd=(1.0, 3.0))
    assert torch.equal(race(model, x, y, **few).inputs, race(model, x, y, **floats).inputs)
    with pytest.raises(
        ValueError, match=r"^heats: expected \(classes, steps, reach\), got \(2, 3\)$"
    ):
        race(model, x, y, **few | {"heats": ((2, 3),)})
    with pytest.raises(ValueError, match=r"^fmn: expected \(classes, steps\), got 5$"):
        race(model, x, y, **few | {"fmn": 5})


def test_the_callback_names_samples_of_the_batch():
    model, x, y = trained_net(n=40)
    eps, seen = 0.02, {}

    def callback(rows, step, points, left):
        for row, point in zip(rows.tolist(), points, strict=True):
            assert float((point - x[row]).abs().max()) <= 1
            seen[row] = seen.get(row, 0) + 1

    result = race(model, x, y, eps=eps, callback=callback, heats=((3, 5, 9.0),), fmn=(1, 5))
    assert sum(seen.values()) == result.forwards - 40  # one pass each ranks the classes
