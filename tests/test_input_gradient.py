import pytest
import torch
import torch.nn.functional as F
from curvature_cases import (
    CLASSES,
    PIXELS,
    flat_grad,
    loss_at,
    manifolds,
    one,
    projector,
    smooth_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import input_hessian
from torch import nn

from flatreg.measures.input_gradient import (
    grad_alignment,
    gradient_dual_norm,
    jacobian_norm,
    jacobian_norm_forward,
    local_linearity,
)

KINDS = ["identity", "pca", "local"]


@pytest.fixture(scope="module")
def fitted():
    return manifolds()


def dual_norm(net, x, y, **settings):
    points = x.clone().requires_grad_()
    loss = loss_at(net, y)
    return gradient_dual_norm(loss(points), loss, points, **settings)


def gradients(net, x, y):
    points = x.clone().requires_grad_()
    return torch.autograd.grad(loss_at(net, y)(points).sum(), points)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**20))
def test_both_methods_give_the_dual_norm_off_the_manifold(fitted, kind, norm, seed):
    net, x, y = smooth_case(seed)
    g = gradients(net, x, y)
    normal = torch.stack([projector(fitted[kind], x[i : i + 1]) @ g[i] for i in range(3)])
    exact = normal.abs().sum(1) if norm == "linf" else normal.norm(dim=1)
    given = dict(norm=norm, manifold=fitted[kind])
    double = dual_norm(net, x, y, step=1.0, method="double_backward", **given).detach()
    torch.testing.assert_close(double, exact)
    errors = [
        float((dual_norm(net, x, y, step=h, **given).detach() - exact).abs().max())
        for h in (1e-2, 1e-5)
    ]
    assert errors[1] < 1e-4 * float(exact.max()) + 1e-9
    assert errors[1] < errors[0] / 50 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_weights_are_pulled_the_same_way_by_both_methods(fitted, kind, norm):
    net, x, y = smooth_case()
    given = dict(norm=norm, manifold=fitted[kind])
    pulls = [
        flat_grad(dual_norm(net, x, y, step=0.01, method=method, **given).sum(), net)
        for method in ("finite_difference", "double_backward")
    ]
    assert float(F.cosine_similarity(*pulls, dim=0)) > 0.99


def test_double_backward_gradient_is_that_of_the_norm():
    """Against a central difference in one weight."""
    net, x, y = smooth_case()
    value = lambda: dual_norm(net, x, y, step=1.0, method="double_backward").sum()  # noqa: E731
    (g,) = torch.autograd.grad(value(), net[0].weight)
    ends = []
    for h in (1e-6, -2e-6):
        with torch.no_grad():
            net[0].weight[2, 3] += h
        ends.append(value().item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(g[2, 3]), rel=1e-5)


def test_a_zero_gradient_has_norm_zero_and_pulls_nowhere():
    weight = torch.zeros(PIXELS, requires_grad=True)
    for method in ("finite_difference", "double_backward"):
        points = torch.rand(2, PIXELS, requires_grad=True)
        at = lambda x: x @ weight  # noqa: E731
        value = gradient_dual_norm(at(points), at, points, norm="l2", step=0.1, method=method)
        assert not value.any()
        assert bool(torch.autograd.grad(value.sum(), weight)[0].isfinite().all())


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_a_gradient_whose_squares_leave_the_range_of_float32_has_a_direction(scale):
    weight = scale * torch.linspace(1, 2, PIXELS)
    lengths = []

    def at(x):
        lengths.append((x - points.detach()).norm(dim=1))
        return x @ weight

    points = torch.rand(2, PIXELS, requires_grad=True)
    gradient_dual_norm(at(points), at, points, norm="l2", step=0.1)
    torch.testing.assert_close(lengths[-1], torch.full((2,), 0.1))


def test_an_unknown_method_is_refused():
    net, x, y = smooth_case()
    with pytest.raises(ValueError, match=r"method must be 'finite_difference' or .*, got 'exact'"):
        dual_norm(net, x, y, step=0.1, method="exact")
    with pytest.raises(ValueError, match="got 'exact'"):
        local_linearity(loss_at(net, y), x, x + 0.1, method="exact")
    with pytest.raises(ValueError, match=r"step: expected a number in \(0, 1\), got 1"):
        local_linearity(loss_at(net, y), x, x + 0.1, step=1.0)
    with pytest.raises(ValueError, match="norm must be linf or l2, got 'l1'"):
        dual_norm(net, x, y, step=0.1, norm="l1")  # was that of L2
    with pytest.raises(ValueError, match=r"step: expected a number in \(0, inf\)"):
        dual_norm(net, x, y, step=0.0)
    with pytest.raises(ValueError, match="num_probes: expected a whole number from 1, got 0"):
        jacobian_norm(net(x), x, num_probes=0)


def hardsigmoid_net():
    return nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))


def test_double_backward_names_its_twin():
    net, y = hardsigmoid_net(), torch.tensor([0, 1])
    points = torch.rand(2, 6, requires_grad=True)
    with pytest.raises(ValueError, match='use method="finite_difference"'):
        dual_norm(net, points.detach(), y, step=0.1, method="double_backward")
    with pytest.raises(ValueError, match='use method="finite_difference"'):
        local_linearity(loss_at(net, y), points, points + 0.1, method="double_backward")
    with pytest.raises(ValueError, match="use chord"):
        grad_alignment(loss_at(net, y), points, points + 0.1)
    with pytest.raises(ValueError, match="use jacobian_norm_forward"):
        jacobian_norm(net(points), points)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_grad_alignment_is_one_minus_the_cosine(seed):
    net, x, y = smooth_case(seed)
    other = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    cosine = F.cosine_similarity(gradients(net, x, y), gradients(net, other, y))
    value = grad_alignment(loss_at(net, y), x, other)
    torch.testing.assert_close(value.detach(), 1 - cosine)
    assert bool(flat_grad(value.sum(), net).isfinite().all())
    tiny = lambda x: 1e-200 * loss_at(net, y)(x)  # noqa: E731, squares of its gradient underflow
    torch.testing.assert_close(grad_alignment(tiny, x, other), value)


def test_grad_alignment_moves_the_weights_as_its_formula_does():
    net, x, y = smooth_case()
    other = x + 0.2

    def by_formula():
        ends = [p.clone().requires_grad_() for p in (x, other)]
        grads = [
            torch.autograd.grad(loss_at(net, y)(p).sum(), p, create_graph=True)[0] for p in ends
        ]
        return (1 - F.cosine_similarity(*grads)).sum()

    value = grad_alignment(loss_at(net, y), x, other).sum()
    torch.testing.assert_close(flat_grad(value, net), flat_grad(by_formula(), net))


def test_grad_alignment_is_zero_where_there_is_nothing_to_align():
    x, weight = torch.rand(2, 6), torch.zeros(6, requires_grad=True)
    value = grad_alignment(lambda x: x @ weight, x, x + 0.1)
    assert not value.any()
    assert bool(torch.autograd.grad(value.sum(), weight)[0].isfinite().all())
    affine = grad_alignment(lambda x: x @ (weight + 1), x, x + 0.1)
    torch.testing.assert_close(affine, torch.zeros(2), rtol=0, atol=1e-6)


def test_local_linearity_is_half_the_quadratic_form():
    net, x, y = smooth_case()
    delta = 1e-3 * torch.randn_like(x)
    exact = torch.stack(
        [delta[i] @ input_hessian(one(net, y, i), x[i : i + 1]) @ delta[i] / 2 for i in range(3)]
    ).abs()
    double = local_linearity(loss_at(net, y), x, x + delta, method="double_backward").detach()
    torch.testing.assert_close(double, exact, rtol=2e-2, atol=0)
    forward = local_linearity(loss_at(net, y), x, x + delta, step=0.25).detach()
    torch.testing.assert_close(forward, 0.75 * exact, rtol=2e-2, atol=0)
    known = local_linearity(
        loss_at(net, y), x, x + delta, step=0.25, loss=loss_at(net, y)(x)
    ).detach()
    torch.testing.assert_close(known, forward)


def test_local_linearity_equals_its_formula_far_from_x_and_moves_the_weights_as_it_does():
    net, x, y = smooth_case()
    delta = 0.5 * torch.randn_like(x)
    loss = loss_at(net, y)
    points = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(points).sum(), points, create_graph=True)
    formula = (loss(x + delta) - loss(x) - (delta * g).sum(1)).abs()
    value = local_linearity(loss, x, x + delta, method="double_backward")
    torch.testing.assert_close(value, formula)
    pulled = flat_grad(value.sum(), net)
    torch.testing.assert_close(pulled, flat_grad(formula.sum(), net))
    twin = local_linearity(loss, x, x + delta, step=0.01)
    assert float(F.cosine_similarity(flat_grad(twin.sum(), net), pulled, dim=0)) > 0.99


@pytest.mark.parametrize("method", ["finite_difference", "double_backward"])
def test_an_affine_loss_is_linear(method):
    x, weight = torch.rand(2, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    value = local_linearity(lambda x: x @ weight, x, torch.rand_like(x), method=method)
    assert float(value.detach().max()) < 1e-14


def jacobian_norms(net, x):
    rows = [torch.autograd.functional.jacobian(lambda x: net(x)[0], row[None]) for row in x]
    return torch.stack([row.square().sum() for row in rows])


def within_error(draws, exact):
    return float(((draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)).max()) < 4


def test_jacobian_norm_is_unbiased():
    net, x, _ = smooth_case()
    exact, points = jacobian_norms(net, x), x.clone().requires_grad_()
    logits, generator = net(points), torch.Generator().manual_seed(0)
    draws = [jacobian_norm(logits, points, generator=generator).detach() for _ in range(300)]
    assert within_error(torch.stack(draws), exact)
    many = jacobian_norm(logits, points, num_probes=300, generator=generator)
    spread = torch.stack(draws).std(0) / 300**0.5
    assert float(((many.detach() - exact).abs() / spread).max()) < 4
    many.sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_on_orthogonal_rows_every_projection_gives_the_jacobian_norm():
    q = torch.linalg.qr(torch.randn(PIXELS, CLASSES, dtype=torch.float64))[0]
    points = torch.rand(3, PIXELS, dtype=torch.float64, requires_grad=True)
    value = jacobian_norm(2 * points @ q, points)
    torch.testing.assert_close(value.detach(), torch.full((3,), 4.0 * CLASSES).double())


def test_forward_jacobian_norm_is_unbiased():
    net, x, _ = smooth_case()
    exact, generator = jacobian_norms(net, x), torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            jacobian_norm_forward(net, x, net(x), 1e-4, generator=generator).detach()
            for _ in range(400)
        ]
    )
    assert within_error(draws, exact)


def test_forward_jacobian_norm_is_exact_on_an_isometry():
    q = torch.linalg.qr(torch.randn(PIXELS, PIXELS, dtype=torch.float64))[0]
    x = torch.rand(3, PIXELS, dtype=torch.float64)
    value = jacobian_norm_forward(lambda x: 3 * x @ q, x, 3 * x @ q, torch.rand(3).double() + 0.1)
    torch.testing.assert_close(value, torch.full((3,), 9.0 * PIXELS).double())


def test_double_backward_measures_run_through_attention():
    torch.manual_seed(0)
    layer, head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    y = torch.tensor([0, 1])
    loss = loss_at(lambda x: head(layer(x, x, x, need_weights=False)[0].mean(1)), y)
    x = torch.rand(2, 4, 8)
    value = grad_alignment(loss, x, x + 0.1) + local_linearity(
        loss, x, x + 0.1, method="double_backward"
    )
    value.sum().backward()
    assert float(layer.in_proj_weight.grad.abs().sum()) > 0
