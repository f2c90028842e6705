import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flatreg.measures.feature_bound import (
    bound_curve,
    feature_radius,
    global_bound,
    local_bound,
    worst_loss,
)
from flatreg.measures.relative_flatness import relative_flatness

SHAPES = list(itertools.product((2, 3, 10, 50), (1, 2, 8, 64)))
SCALES = (1e-3, 1e-1, 1.0, 10.0, 1e3)


def draw(batch, classes, width, seed, scale=1.0, spread=None):
    """Features, head and random labels; `spread` fixes the standard deviation of the logits."""
    g = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(classes, width, generator=g, dtype=torch.float64)
    features = torch.randn(batch, width, generator=g, dtype=torch.float64)
    if spread is not None:
        features = features * (spread / (scale * width**0.5))
    bias = torch.randn(classes, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch,), generator=g)
    logits = features @ weight.T + bias
    labels[::2] = logits[::2].argmax(1)  # half are right
    radius = 10 ** (5 * torch.rand(batch, generator=g, dtype=torch.float64) - 3)
    return features, logits, labels, weight, bias, radius


def curvature_oracle(logits, weight):
    """C of one sample, from autograd."""

    def loss(h):
        return F.cross_entropy((logits + weight @ h)[None], torch.tensor([0]))

    return torch.autograd.functional.hessian(loss, torch.zeros_like(weight[0]))


def ascend(features, weight, bias, labels, radius, seed, steps=100):
    """Plain projected gradient ascent on cross-entropy, from a random point of the sphere."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(features.shape, generator=g, dtype=torch.float64)
    h = radius[:, None] * F.normalize(h, dim=1)
    for _ in range(steps):
        h.requires_grad_()
        loss = F.cross_entropy(F.linear(features + h, weight, bias), labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), h)
        h = h.detach() + 0.5 * radius[:, None] * F.normalize(gradient, dim=1)
        h = (
            h
            * (radius / torch.linalg.vector_norm(h, dim=1).clamp_min(1e-300)).clamp_max(1)[:, None]
        )
    return F.cross_entropy(F.linear(features + h, weight, bias), labels, reduction="none")


def rounding(logits, weight, radius):
    """What 1e-12 is relative to: the numbers that were added, logits and R times the diameter."""
    return 1e-12 * (1 + logits.abs().amax(1) + radius * torch.cdist(weight, weight).amax())


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_no_bound_is_violated_over_twelve_thousand_maximised_cases(spread):
    cases = 0
    for seed, ((classes, width), scale) in enumerate(itertools.product(SHAPES, SCALES)):
        features, logits, labels, weight, bias, radius = draw(
            50, classes, width, seed, scale, spread
        )
        # Half the radii where the bounds part: R times the weights of order one.
        radius[::2] = 10 * torch.rand(25, dtype=torch.float64) / scale / width**0.5
        slack = rounding(logits, weight, radius)
        worst = worst_loss(logits, labels, weight, radius, steps=10, restarts=6)
        g = torch.Generator().manual_seed(seed)
        h = radius[:, None] * F.normalize(torch.randn(features.shape, generator=g).double(), dim=1)
        moved = F.cross_entropy(F.linear(features + h, weight, bias), labels, reduction="none")
        local = local_bound(logits, labels, weight, radius)
        relative = local_bound(logits, labels, weight, radius, second_order="relative_flatness")
        for bound in (local, relative, global_bound(logits, labels, weight, radius)):
            assert bool((torch.maximum(worst, moved) <= bound + slack).all())
        assert bool((local <= relative * (1 + 1e-12)).all())
        cases += len(features)
    assert 3 * cases >= 10_000


@pytest.mark.parametrize(("classes", "width"), [(2, 3), (3, 1), (5, 2), (10, 8)])
def test_projected_gradient_ascent_finds_nothing_above_worst_loss_or_the_bounds(classes, width):
    for seed, scale in itertools.product(range(2), (0.3, 1.0, 3.0)):
        features, logits, labels, weight, bias, _ = draw(40, classes, width, seed, scale)
        radius = torch.linspace(0.01, 4, 40, dtype=torch.float64) / scale
        found = ascend(features, weight, bias, labels, radius, seed)
        assert bool((found <= worst_loss(logits, labels, weight, radius) + 1e-9).all())
        assert bool((found <= local_bound(logits, labels, weight, radius) + 1e-12).all())
        assert bool((found <= global_bound(logits, labels, weight, radius) + 1e-12).all())


def test_worst_loss_is_the_maximum_over_a_dense_circle():
    _, logits, labels, weight, _, _ = draw(30, 4, 2, seed=0)
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for radius in (0.1, 1.0, 5.0):
        moved = logits[:, :, None] + radius * (weight @ circle)
        dense = F.cross_entropy(moved, labels[:, None].expand(-1, 20_001), reduction="none").amax(1)
        found = worst_loss(logits, labels, weight, radius)
        torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-9)


def test_every_bound_is_the_loss_itself_at_radius_zero():
    _, logits, labels, weight, _, _ = draw(20, 6, 4, seed=1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    for bound in (local_bound, global_bound, worst_loss):
        torch.testing.assert_close(bound(logits, labels, weight, 0.0), loss)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0.1, 20))
def test_the_local_bound_has_the_gradient_and_curvature_of_autograd(classes, width, seed, spread):
    """Its value at two radii gives its coefficients; each equals the slow object it stands for."""
    _, logits, labels, weight, _, _ = draw(2, classes, width, seed, spread=spread)
    diameter = max(float((a - b).norm()) for a in weight for b in weight)
    cubic = diameter**3 / (36 * math.sqrt(3))
    for curvature in ("eigenvalue", "relative_flatness"):
        radii = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        bound = local_bound(logits, labels, weight, radii, second_order=curvature)
        one, two = bound[1] - bound[0] - cubic, bound[2] - bound[0] - 8 * cubic
        for i in range(2):
            h = torch.zeros(width, dtype=torch.float64, requires_grad=True)
            loss = F.cross_entropy((logits[i] + weight @ h)[None], labels[i : i + 1])
            slope = torch.autograd.grad(loss, h)[0].norm()
            dense = torch.linalg.eigvalsh(curvature_oracle(logits[i], weight))
            c = dense[-1] if curvature == "eigenvalue" else dense.sum()
            atol = 1e-12 * (1 + 8 * cubic + diameter**2)
            torch.testing.assert_close(one[i], slope + c / 2, rtol=1e-10, atol=atol)
            torch.testing.assert_close(two[i], 2 * slope + 2 * c, rtol=1e-10, atol=atol)


def test_the_relative_form_is_half_the_relative_radius_squared_times_kappa():
    features, logits, labels, weight, _, radius = draw(20, 6, 4, seed=2)
    kappa = relative_flatness(features, logits, weight)
    share = radius / torch.linalg.vector_norm(features, dim=1)
    eigenvalue, relative = (
        local_bound(logits, labels, weight, radius, second_order=c)
        for c in ("eigenvalue", "relative_flatness")
    )
    dense = torch.stack([torch.linalg.eigvalsh(curvature_oracle(z, weight))[-1] for z in logits])
    expected = share**2 * kappa / 2 - radius**2 * dense / 2
    torch.testing.assert_close(relative - eigenvalue, expected, rtol=1e-6, atol=1e-9)


def test_the_global_bound_is_exact_for_two_classes():
    _, logits, labels, weight, _, radius = draw(200, 2, 5, seed=3)
    torch.testing.assert_close(
        global_bound(logits, labels, weight, radius), worst_loss(logits, labels, weight, radius)
    )


def test_the_local_bound_is_tangent_to_fifth_order_at_its_worst_case():
    """Two classes, rival at p = (3 - sqrt 3)/6: there the third derivative attains its bound, so
    that the fourth is zero.
    """
    p = (3 - math.sqrt(3)) / 6
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(p / (1 - p))]], dtype=torch.float64)
    labels = torch.tensor([0])
    radii = torch.tensor([[0.05], [0.1]], dtype=torch.float64)
    curve = bound_curve(logits, labels, weight, radii[:, 0])
    gap = (curve.local_bound - curve.worst_loss)[:, 0]
    assert bool((gap > 0).all())
    assert 31 < float(gap[1] / gap[0]) < 34  # 2^5
    # Elsewhere the cubic term is larger than the third derivative: third order.
    logits = torch.zeros(1, 2, dtype=torch.float64)
    curve = bound_curve(logits, labels, weight, radii[:, 0])
    gap = (curve.local_bound - curve.worst_loss)[:, 0]
    assert 7 < float(gap[1] / gap[0]) < 9  # 2^3


def test_near_zero_the_local_bound_wins_and_far_out_the_global_one():
    _, logits, labels, weight, _, _ = draw(100, 10, 16, seed=4)
    curve = bound_curve(logits, labels, weight, [1e-3, 10.0])
    assert float((curve.local_bound < curve.global_bound)[0].double().mean()) > 0.95
    assert bool((curve.local_bound > curve.global_bound)[1].all())


def test_the_feature_radius_is_exact():
    features, logits, _, weight, bias, _ = draw(200, 7, 9, seed=5)
    labels = logits.argmax(1)
    r = feature_radius(logits, labels, weight)
    # Inside: not toward any rival, the direction that is best for that rival, nor at random.
    toward = weight[None] - weight[labels][:, None]
    g = torch.Generator().manual_seed(0)
    toward = torch.cat([toward, torch.randn(200, 500, 9, generator=g).double()], 1)
    h = (1 - 1e-9) * r[:, None, None] * F.normalize(toward, dim=2)
    moved = F.linear(features[:, None] + h, weight, bias).argmax(2)
    assert bool((moved == labels[:, None]).all())
    # Outside, along the nearest rival, it changes.
    apart = torch.cdist(weight, weight)[labels]
    ratio = (logits.gather(1, labels[:, None]) - logits) / apart
    nearest = ratio.nan_to_num(torch.inf).argmin(1)
    away = F.normalize(weight[nearest] - weight[labels], dim=1)
    for factor, same in ((1 - 1e-9, True), (1 + 1e-9, False)):
        moved = F.linear(features + factor * r[:, None] * away, weight, bias).argmax(1)
        assert bool(((moved == labels) == same).all())


def test_the_feature_radius_is_signed_and_knows_rows_that_are_the_same():
    labels = torch.tensor([0, 1])
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert feature_radius(logits, labels, weight).tolist() == [1.0, -1.0]
    same = torch.ones(2, 2)
    assert feature_radius(logits, labels, same).tolist() == [math.inf, -math.inf]
    assert feature_radius(torch.zeros(2, 2), labels, same).tolist() == [0.0, 0.0]


def test_a_wrong_sample_has_to_move_by_its_radius_at_least():
    _, logits, _, weight, _, _ = draw(200, 6, 8, seed=6)
    labels = logits.argmin(1)
    need = -feature_radius(logits, labels, weight)
    assert bool((need > 0).all())
    toward = F.normalize(weight[labels] - weight[logits.argmax(1)], dim=1)
    moved = logits + 0.999 * need[:, None] * (toward @ weight.T)
    assert not bool((moved.argmax(1) == labels).any())


def test_float32_keeps_its_digits_where_softmax_saturates():
    _, logits, labels, weight, _, _ = draw(256, 10, 32, seed=7, spread=60)
    labels = logits.argmax(1)
    low = logits.float(), labels, (weight + 100).float()
    radius = 0.3 * feature_radius(*low)
    for bound in (local_bound, global_bound, worst_loss):
        exact = bound(low[0].double(), labels, low[2].double(), radius.double())
        torch.testing.assert_close(bound(*low, radius).double(), exact, rtol=2e-4, atol=1e-36)


def test_half_precision_is_cast_up_also_under_autocast():
    _, logits, labels, weight, _, _ = draw(32, 5, 8, seed=8)
    low = logits.bfloat16(), labels, weight.bfloat16()
    for bound in (local_bound, global_bound, worst_loss):
        with torch.autocast("cpu", torch.bfloat16):
            value = bound(*low, 0.5)
        assert value.dtype == torch.float32
        exact = bound(low[0].double(), labels, low[2].double(), 0.5)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_class_indices_of_every_form_are_read_and_others_refused():
    _, logits, y, weight, _, _ = draw(32, 5, 8, seed=8)
    for of in (feature_radius, *(partial(f, radius=0.5) for f in (local_bound, worst_loss))):
        expected = of(logits, y, weight)
        for labels in (y.int(), y.to(torch.uint8), y.float(), y[:, None]):
            assert torch.equal(of(logits, labels, weight), expected)
        for labels in (y - 1, y + 5, y + 0.5):
            with pytest.raises(ValueError, match=r"^labels: expected"):
                of(logits, labels, weight)


def test_gradcheck_of_both_bounds():
    _, logits, labels, weight, _, radius = draw(3, 4, 3, seed=9)
    leaves = logits.requires_grad_(), weight.requires_grad_()
    for curvature in ("eigenvalue", "relative_flatness"):
        assert torch.autograd.gradcheck(
            lambda z, w, c=curvature: local_bound(z, labels, w, 0.5, second_order=c), leaves
        )
    assert torch.autograd.gradcheck(lambda z, w: global_bound(z, labels, w, radius), leaves)
    assert torch.autograd.gradcheck(lambda z, w: feature_radius(z, labels, w), leaves)


def test_a_saturated_sample_has_a_finite_gradient():
    logits = torch.tensor([[2000.0, 0.0, -2000.0]], requires_grad=True)
    weight = torch.eye(3, requires_grad=True)
    labels = torch.tensor([0])
    total = local_bound(logits, labels, weight, 0.1) + global_bound(logits, labels, weight, 0.1)
    for gradient in torch.autograd.grad(total.sum(), (logits, weight)):
        assert bool(gradient.isfinite().all())


def test_the_trace_stands_in_for_the_eigenvalue_above_the_limit(monkeypatch):
    _, logits, labels, weight, _, _ = draw(5, 6, 4, seed=10)
    exact = local_bound(logits, labels, weight, 0.7)
    monkeypatch.setattr("flatreg.measures.feature_bound._MAX_ELEMENTS", 40)  # a sample at a time
    torch.testing.assert_close(local_bound(logits, labels, weight, 0.7), exact)
    monkeypatch.setattr("flatreg.measures.feature_bound._MAX_CLASSES", 5)
    relative = local_bound(logits, labels, weight, 0.7, second_order="relative_flatness")
    torch.testing.assert_close(local_bound(logits, labels, weight, 0.7), relative)
    assert bool((relative > exact).all())


def test_a_curve_holds_what_the_functions_say():
    _, logits, labels, weight, _, radius = draw(4, 5, 3, seed=11)
    radii = torch.stack([radius, 2 * radius])
    curve = bound_curve(logits, labels, weight, radii)
    assert torch.equal(curve.radii, radii)
    for row in range(2):
        arguments = logits, labels, weight, radii[row]
        torch.testing.assert_close(curve.local_bound[row], local_bound(*arguments))
        torch.testing.assert_close(curve.global_bound[row], global_bound(*arguments))
        torch.testing.assert_close(curve.worst_loss[row], worst_loss(*arguments))
        relative = local_bound(*arguments, second_order="relative_flatness")
        torch.testing.assert_close(curve.relative_bound[row], relative)
    shared = bound_curve(logits, labels, weight, [0.5, 1.0, 2.0])
    assert shared.worst_loss.shape == shared.local_bound.shape == (3, 4)
    assert torch.equal(shared.radii[:, 0], torch.tensor([0.5, 1.0, 2.0]).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "expected logits"),
        ({"weight": torch.ones(2, 4)}, "expected logits"),
        ({"logits": torch.ones(3, 1), "weight": torch.ones(1, 4)}, "classes >= 2"),
        ({"radius": -1.0}, "radius must be >= 0, got -1.0"),
        ({"radius": torch.tensor([0.5, -1.0, 0.5])}, "radius must be >= 0, got -1.0"),
        ({"radius": torch.ones(2)}, "radius must be a scalar"),
        ({"second_order": "trace"}, "second_order must be"),
    ],
)
def test_errors_say_what_came(change, message):
    arguments = {
        "logits": torch.ones(3, 5),
        "labels": torch.zeros(3, dtype=torch.int64),
        "weight": torch.ones(5, 4),
        "radius": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        local_bound(**{**arguments, **change})


def test_a_radius_given_as_a_number_is_not_rounded():
    logits, weight = torch.randn(3, 5).double(), torch.randn(5, 4).double()
    given, exact = (
        local_bound(logits, torch.tensor([0, 1, 2]), weight, radius)
        for radius in (0.1, torch.tensor(0.1, dtype=torch.float64))
    )
    assert torch.equal(given, exact)
