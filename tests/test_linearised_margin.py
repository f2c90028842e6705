import pytest
import torch
import torch.nn.functional as F
from curvature_cases import PIXELS, flat_grad, smooth_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatreg.measures.linearised_margin import linearised_margin, margin, own_classes, runner_up

METHODS = ["finite_difference", "double_backward"]
NORMS = ["linf", "l2"]


@pytest.fixture
def smooth():
    return smooth_case()


def bound_of(net, x, y, **settings):
    points = x.clone().requires_grad_()
    return linearised_margin(net, points, y, net(points), **settings)


def dual_norm(net, x, y, norm):
    points = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(margin(net(points), y).sum(), points, create_graph=True)
    return g.abs().sum(1) if norm == "linf" else g.norm(dim=1)


def test_the_runner_up_is_never_the_label():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert runner_up(logits, torch.tensor([0, 1])).tolist() == [2, 0]
    assert margin(logits, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("norm", NORMS)
def test_the_slope_tends_to_the_dual_norm(smooth, norm):
    net, x, y = smooth
    exact = dual_norm(net, x, y, norm).detach()
    for curvature, order in ((False, 50), (True, 500)):  # one-sided, central
        slopes = [
            bound_of(net, x, y, eps=h, norm=norm, subtract_curvature=curvature).slope.detach() / h
            for h in (1e-2, 1e-4)
        ]
        errors = [float((slope - exact).abs().max()) for slope in slopes]
        assert errors[1] < 1e-3 * float(exact.max()) and errors[1] < errors[0] / order
    double = bound_of(net, x, y, eps=0.1, norm=norm, method="double_backward").slope
    torch.testing.assert_close(double.detach(), 0.1 * exact)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("curvature", [False, True])
def test_weights_are_pulled_the_same_way_by_both_methods(smooth, norm, curvature):
    net, x, y = smooth
    pulls = [
        flat_grad(
            bound_of(
                net, x, y, eps=0.1, norm=norm, step=0.1, subtract_curvature=curvature, method=method
            ).bound.sum(),
            net,
        )
        for method in METHODS
    ]
    assert float(F.cosine_similarity(*pulls, dim=0)) > 0.99


@pytest.mark.parametrize("norm", NORMS)
def test_the_slope_is_pulled_as_the_dual_norm_is(smooth, norm):
    net, x, y = smooth
    exact = flat_grad(dual_norm(net, x, y, norm).sum(), net)
    forward = flat_grad(bound_of(net, x, y, eps=0.1, norm=norm, step=0.1).slope.sum(), net)
    double = flat_grad(
        bound_of(net, x, y, eps=0.1, norm=norm, method="double_backward").slope.sum(), net
    )
    assert float(F.cosine_similarity(forward, exact, dim=0)) > 0.99
    torch.testing.assert_close(double, 0.1 * exact)


def quadratic(seed, classes=2):
    """Logits with quadratic margins m(x) = b + <g, x> - x^T M x / 2, M >= 0, in six pixels."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    g = torch.randn(PIXELS, generator=generator, dtype=torch.float64)

    def logits_at(x):
        m = 5 + x @ g - (x @ root).square().sum(1) / 2
        return torch.stack([m, torch.zeros_like(m)], 1)

    return logits_at


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), step=st.sampled_from([0.1, 0.5, 1.0]))
def test_on_a_quadratic_margin_it_is_the_margin_at_the_steepest_point(method, norm, seed, step):
    logits_at = quadratic(seed)
    x = torch.full((1, PIXELS), 0.5, dtype=torch.float64)
    y, eps = torch.tensor([0]), 0.25
    points = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(margin(logits_at(points), y).sum(), points)
    d = g.sign() if norm == "linf" else g / g.norm()
    result = bound_of(
        logits_at, x, y, eps=eps, norm=norm, step=step, subtract_curvature=True, method=method
    )
    exact = margin(logits_at(x - eps * d), y)
    torch.testing.assert_close(result.bound.detach(), exact)
    torch.testing.assert_close(result.bound, result.margin - result.slope - result.bend)
    torch.testing.assert_close(result.slope.detach(), eps * (g * d).sum(1))


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_the_lowest_margin_of_the_ball_to_second_order(norm):
    """Of a concave quadratic margin; the minimum by brute force, the error shrinks as eps^3."""
    logits_at = quadratic(3)
    x, y = torch.full((1, PIXELS), 0.5, dtype=torch.float64), torch.tensor([0])
    gaps = []
    for eps in (0.02, 0.01):
        result = bound_of(logits_at, x, y, eps=eps, norm=norm, subtract_curvature=True)
        gaps.append(float(result.bound.detach()) - lowest(logits_at, x, y, eps, norm))
        assert -1e-12 <= gaps[-1] < 0.1 * float(result.bend.detach())
    assert gaps[1] <= gaps[0] / 6 + 1e-12


def lowest(logits_at, x, y, eps, norm):
    """Lowest margin in the ball: every vertex for Linf, projected descent for L2."""
    if norm == "linf":
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * PIXELS).double()
        return float(margin(logits_at(x + eps * signs), y.expand(len(signs))).min())
    delta = torch.randn(64, PIXELS, dtype=torch.float64)
    for _ in range(200):
        delta = (eps * delta / delta.norm(dim=1, keepdim=True)).requires_grad_()
        values = margin(logits_at(x + delta), y.expand(64))
        (g,) = torch.autograd.grad(values.sum(), delta)
        delta = delta.detach() - 0.05 * eps * g
    return float(values.min().detach())


def test_convex_margins_are_not_credited_with_their_curvature():
    """m(x) = x + x^2: the bend is zero, the bound lies below the margin at x - eps."""

    def logits_at(x):
        m = x + x.square()
        return torch.cat([m, torch.zeros_like(m)], 1)

    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    for method in METHODS:
        result = bound_of(
            logits_at, x, y, eps=0.2, step=0.5, subtract_curvature=True, method=method
        )
        assert result.bend.item() == 0 and result.bound.item() == pytest.approx(0.75 - 0.4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_the_box_shortens_the_slope_and_leaks_nothing_into_the_bend(method, step):
    """An affine margin at black, white and grey pixels: the bound is its minimum in ball and box.

    Six logits; affine, so that any bend would be an artefact.
    """
    weight = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0], dtype=torch.float64)

    def logits_at(x):
        m = x @ weight
        return torch.stack([m, torch.zeros_like(m)], 1)

    x = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.05, 0.98]], dtype=torch.float64)
    y, eps = torch.tensor([0]), 0.1
    worst = torch.where(weight > 0, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    exact = margin(logits_at(worst), y)
    for curvature in (False, True):
        result = bound_of(
            logits_at, x, y, eps=eps, step=step, subtract_curvature=curvature, method=method
        )
        torch.testing.assert_close(result.bound.detach(), exact)
        assert float(result.bend.max().detach()) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_scaling_the_logits_scales_the_bound_and_changes_no_verdict(method, norm, seed):
    net, x, y = smooth_case(seed)
    given = dict(eps=0.1, step=0.5, norm=norm, subtract_curvature=True, method=method)
    one = bound_of(net, x, y, **given)
    scaled = bound_of(lambda x: 1024 * net(x), x, y, **given)
    for before, after in zip(one, scaled, strict=True):
        assert torch.equal(1024 * before, after)  # bit by bit: 1024 is a power of two
    other = bound_of(lambda x: 1000 * net(x), x, y, **given)
    torch.testing.assert_close(other.bound, 1000 * one.bound, rtol=1e-8, atol=1e-8)
    assert torch.equal(other.bound > 0, one.bound > 0)


def test_settings_are_checked(smooth):
    net, x, y = smooth
    for step in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"step: expected a number in \(0, 1\]"):
            bound_of(net, x, y, eps=0.1, step=step)
    with pytest.raises(ValueError, match="method must be"):
        bound_of(net, x, y, eps=0.1, method="exact")


def test_double_backward_is_refused_by_name_where_it_cannot_be():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    x, y = torch.rand(2, 6), torch.tensor([0, 1])
    bound_of(net, x, y, eps=0.1, subtract_curvature=True)
    with pytest.raises(ValueError, match='use method="finite_difference"'):
        bound_of(net, x, y, eps=0.1, method="double_backward")


def test_half_precision_logits_are_subtracted_in_float32(smooth):
    net, x, y = smooth
    half = lambda x: net(x.double()).bfloat16()  # noqa: E731
    result = bound_of(half, x.float(), y, eps=0.1)
    assert {part.dtype for part in result} == {torch.float32}


def test_the_slope_is_never_negative_however_long_the_step():
    """A margin that swings back within the step: its one-sided difference is below zero there."""

    def logits_at(points):
        m = torch.sin(40 * points)
        return torch.cat([m, -m], 1)

    points = torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    label = torch.zeros(1, dtype=torch.long)
    found = [
        linearised_margin(logits_at, points, label, logits_at(points), eps=0.02 * k)
        for k in range(1, 10)
    ]
    assert min(f.slope.item() for f in found) == 0 < max(f.slope.item() for f in found)
    assert all(f.bound.item() <= f.margin.item() for f in found)


# Labels that are mixtures.


def mixed(y, other, share, smoothing=0.0, classes=4):
    """Labels of mixup, smoothed as timm does it: each class number on its own, then mixed."""
    off = smoothing / classes
    hot = [torch.full((len(y), classes), off, dtype=torch.float64) for _ in range(2)]
    for labels, of in zip(hot, (y, other), strict=True):
        labels[torch.arange(len(y)), of] = 1 - smoothing + off
    return share * hot[0] + (1 - share) * hot[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_are_one_class_give_the_bound_of_the_class(
    smooth, method, curvature, smoothing
):
    net, x, y = smooth
    settings = {"eps": 0.1, "step": 0.5, "subtract_curvature": curvature, "method": method}
    hard = bound_of(net, x, y, **settings)
    soft = bound_of(net, x, mixed(y, y, 0.3, smoothing), **settings)
    for one, two in zip(hard, soft, strict=True):
        torch.testing.assert_close(one, two)
    pulls = [flat_grad(found.bound.sum(), net) for found in (hard, soft)]
    torch.testing.assert_close(*pulls)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_margin_of_a_mixture_is_over_the_classes_it_is_not_of(smoothing):
    torch.manual_seed(0)
    z = torch.randn(50, 4, dtype=torch.float64)
    y, other = torch.randint(0, 4, (2, 50))
    labels = mixed(y, other, 0.3, smoothing)
    for row in range(50):
        a, b, own = int(y[row]), int(other[row]), {int(y[row]), int(other[row])}
        rival = max(float(z[row, k]) for k in range(4) if k not in own)
        expected = 0.3 * float(z[row, a]) + 0.7 * float(z[row, b]) - rival
        assert float(margin(z, labels)[row]) == pytest.approx(expected)
        assert int(runner_up(z, labels)[row]) not in own
    weights = own_classes(labels)
    torch.testing.assert_close(weights, mixed(y, other, 0.3))


def test_even_labels_ask_for_nothing(smooth):
    net, x, _ = smooth
    found = bound_of(net, x, torch.full((3, 4), 0.25).double(), eps=0.1)
    assert float(found.bound.detach().abs().max()) == 0
    assert float(flat_grad(found.bound.sum(), net).abs().max()) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_bound_of_a_mixture_holds_in_the_ball(smooth, norm):
    """As that of a class: the lowest of many points lies below it by O(eps^3) at most."""
    net, x, y = smooth
    labels, gaps = mixed(y, (y + 1) % 4, 0.4), []
    generator = torch.Generator().manual_seed(0)
    for eps in (0.02, 0.01):
        found = bound_of(
            net, x, labels, eps=eps, norm=norm, subtract_curvature=True, method="double_backward"
        )
        rival = runner_up(net(x), labels)
        noise = torch.randn(4000, 1, PIXELS, generator=generator, dtype=torch.float64)
        unit = noise.sign() if norm == "linf" else noise / noise.norm(dim=2, keepdim=True)
        points = (x + eps * unit).flatten(0, 1)
        values = margin(net(points), labels.repeat(4000, 1), rival.repeat(4000)).view(4000, 3)
        gaps.append(float((found.bound - values.amin(0)).detach().max()))
    assert gaps[0] < 1e-4 and gaps[1] < max(gaps[0] / 4, 1e-7)


def test_a_margin_reads_every_form_of_class_indices_and_refuses_others():
    logits, y = torch.tensor([[1.0, 4.0, 2.0], [0.0, 1.0, 3.0]]), torch.tensor([1, 0])
    for labels in (y, y[:, None], y.to(torch.uint8), y.int(), y.float(), F.one_hot(y, 3).half()):
        assert margin(logits, labels).tolist() == [2.0, -3.0]
    for labels in (y[:1], F.one_hot(y, 3), torch.rand(2, 4), y.tolist(), y - 1, y + 2, y - 100):
        with pytest.raises(ValueError, match=r"^labels: expected"):
            margin(logits, labels)
