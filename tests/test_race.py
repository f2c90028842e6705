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


@pytest.mark.parametrize(("norm", "halvings"), [("linf", 0), ("l2", 0), ("l1", 0), ("linf", 1)])
def test_no_sample_changes_the_verdict_of_another(norm, halvings):
    model, x, y = trained_net(n=60)
    model, x, eps = model.double(), x.double(), {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]
    short = dict(heats=((4, 6, 2.5), (2, 8, 1.5)), fmn=(1, 6), apgd=(2, 12), halvings=halvings)
    together = race(model, x, y, eps=eps, norm=norm, indices=range(60), **short)
    assert 0 < int(together.fooled.sum()) < 60
    for rows in torch.arange(60).flip(0).split(17):
        some = dict(norm=norm, indices=rows.tolist(), batch_size=5, **short)
        apart = race(model, x[rows], y[rows], eps=eps, **some)
        assert torch.equal(apart.fooled, together.fooled[rows])


def test_the_callback_names_samples_of_the_batch():
    model, x, y = trained_net(n=40)
    eps, seen = 0.02, {}

    def callback(rows, step, points, left):
        for row, point in zip(rows.tolist(), points, strict=True):
            assert float((point - x[row]).abs().max()) <= 1
            seen[row] = seen.get(row, 0) + 1

    result = race(model, x, y, eps=eps, callback=callback, heats=((3, 5, 9.0),), fmn=(1, 5))
    assert sum(seen.values()) == result.forwards - 40  # one pass each ranks the classes


@pytest.mark.parametrize(
    ("classes", "halvings", "passes"),
    [
        (10, 0, 4 * 17),
        (10, 1, 4 * 9 + 2 * 9),
        (10, 2, 4 * 5 + 2 * 5 + 9),
        (4, 2, 3 * 5 + 2 * 5 + 9),
        (10, 5, 4 * 5 + 2 * 5 + 9),  # no round has less than one class
        (2, 2, 17),
    ],
)
def test_halvings_leave_one_class_that_has_all_steps(classes, halvings, passes):
    model, x, y = affine(classes, 40, 20)
    whole = dict(eps=1e-6, heats=((9, 1, 1e9),), fmn=(1, 1), apgd=(4, 16))
    spent = race(model, x, y, halvings=halvings, **whole)
    assert not spent.fooled.any()
    assert spent.forwards == 20 * (1 + 2 * min(9, classes - 1) + 2 + passes)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_halvings_end_at_the_class_of_largest_loss(norm):
    """Of three classes DLR is the margin, whose maximum over a ball of an affine model is known."""
    model, x, y = affine(3, 40, 60)
    with torch.no_grad():  # the boundary of a steep class is near also where its loss is low
        model.weight *= torch.tensor([[1.0], [1.0], [4.0]])
        y = model(x).argmax(1)
    eps = {"linf": 1e-3, "l2": 1e-2}[norm]
    slope = model.weight[None] - model.weight[y][:, None]
    length = torch.linalg.vector_norm(slope, ord={"linf": 1, "l2": 2}[norm], dim=2)
    gap = model(x) - model(x).gather(1, y[:, None])
    others = torch.arange(3) != y[:, None]
    highest = (gap + eps * length)[others].view(60, 2).amax(1).detach()
    begun = {}

    def callback(rows, step, points, left):
        if not step.any():  # a search begins: the last one is the last round
            begun.update(rows=rows, points=points)

    whole = dict(heats=((2, 10, 1e9),), fmn=(1, 1), apgd=(2, 40), halvings=1, callback=callback)
    found = race(model, x, y, eps=eps, norm=norm, **whole)
    left = (~found.fooled).nonzero().flatten()
    assert len(left) > 30
    assert torch.equal(begun["rows"], left)
    for points in (begun["points"], found.inputs[left]):
        margin = (model(points) - model(points).gather(1, y[left, None])).detach()
        margin = margin[others[left]].view(-1, 2).amax(1)
        torch.testing.assert_close(margin, highest[left], rtol=1e-4, atol=1e-6)


def test_a_negative_number_of_halvings_is_refused_in_one_line():
    model, x, y = affine(3, 40, 4)
    with pytest.raises(ValueError, match=r"^halvings: expected 0 or more, got -1$"):
        race(model, x, y, eps=0.1, halvings=-1)
