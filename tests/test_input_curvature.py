import pytest
import torch
import torch.nn.functional as F
from oracles import input_hessian
from torch import nn

from flatreg import (
    IdentityManifold,
    chord,
    gradient_difference,
    linearised_margin,
    margin,
    normal_direction,
    second_difference,
)


@pytest.fixture
def smooth():
    """A smooth loss of inputs (batch, 6) in float64, and three inputs inside the box."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = 0.25 + 0.5 * torch.rand(3, 6, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    return net, x, y


def loss_at(net, y):
    return lambda x: F.cross_entropy(net(x), y, reduction="none")


def one(net, y, i):
    return lambda x: F.cross_entropy(net(x), y[i : i + 1], reduction="none")


def test_second_difference_tends_to_the_quadratic_form(smooth):
    net, x, y = smooth
    n = normal_direction(torch.randn(3, 6, dtype=torch.float64), x)
    value = second_difference(loss_at(net, y), x, n, 1e-3).detach()
    for i in range(3):
        oracle = n[i] @ input_hessian(one(net, y, i), x[i : i + 1]) @ n[i]
        assert value[i] == pytest.approx(float(oracle), rel=1e-4, abs=1e-8)
    known = second_difference(loss_at(net, y), x, n, 1e-3, loss=loss_at(net, y)(x))
    torch.testing.assert_close(known.detach(), value)


def test_chord_is_the_squared_gap_to_second_order(smooth):
    net, x, y = smooth
    delta = 1e-3 * torch.randn(3, 6, dtype=torch.float64)
    value = chord(loss_at(net, y), x, x + delta, 0.3).detach()
    for i in range(3):
        curvature = delta[i] @ input_hessian(one(net, y, i), x[i : i + 1]) @ delta[i]
        assert value[i] == pytest.approx(float((0.3 * 0.7 / 2 * curvature) ** 2), rel=2e-2)


def test_chord_is_zero_on_an_affine_loss():
    x = torch.rand(4, 3, dtype=torch.float64)
    assert chord(lambda x: x.sum(1), x, torch.rand_like(x), torch.rand(4).double()).max() < 1e-28


def test_gradient_difference_tends_to_the_norm_of_the_hessian_product(smooth):
    net, x, y = smooth
    value = gradient_difference(loss_at(net, y), x, 1e-4)
    for i in range(3):
        point = x[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(one(net, y, i)(point).sum(), point)
        n = g[0].sign() / 6**0.5
        product = input_hessian(one(net, y, i), x[i : i + 1]) @ n
        assert value[i].item() == pytest.approx(float(product.square().sum()), rel=1e-3)
    value.sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_gradient_difference_names_the_forward_only_twins():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="use second_difference or chord"):
        gradient_difference(loss_at(net, y), torch.rand(2, 6), 0.1).sum().backward()


def test_gradient_difference_runs_through_attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    head = nn.Linear(8, 3)

    def attended(x):
        out, _ = layer(x, x, x, need_weights=False)
        return F.cross_entropy(head(out.mean(1)), torch.tensor([0, 1]), reduction="none")

    gradient_difference(attended, torch.rand(2, 4, 8), 0.1).sum().backward()
    assert bool(layer.in_proj_weight.grad.isfinite().all())


def test_identity_manifold_splits_into_nothing_and_all():
    v = torch.randn(2, 3)
    tangent, normal = IdentityManifold().split(torch.rand(2, 3), v)
    assert torch.equal(tangent + normal, v) and not tangent.any()
    assert not normal_direction(torch.zeros(2, 3), v).any()


def slope(net, x, y, norm, rho, eps):
    points = x.clone().requires_grad_()
    logits = net(points)
    bound = linearised_margin(net, points, y, logits, eps=eps, norm=norm, rho=rho)
    return (margin(logits, y) - bound) / eps


def dual_norm(net, x, y, norm):
    points = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(margin(net(points), y).sum(), points, create_graph=True)
    return g.abs().sum(1) if norm == "linf" else g.norm(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finite_difference_of_the_margin_tends_to_the_dual_norm(smooth, norm):
    net, x, y = smooth
    exact = dual_norm(net, x, y, norm).detach()
    errors = [
        float((slope(net, x, y, norm, 1.0, h).detach() - exact).abs().max()) for h in (1e-2, 1e-4)
    ]
    assert errors[1] < 1e-3 * float(exact.max()) and errors[1] < errors[0] / 50


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_its_gradient_agrees_with_double_backward(smooth, norm):
    net, x, y = smooth
    grads = []
    for value in (slope(net, x, y, norm, 0.1, 0.1), dual_norm(net, x, y, norm)):
        gradients = torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
        grads.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    width = min(len(g) for g in grads)  # the last bias drops out of the double-backward one
    assert float(F.cosine_similarity(grads[0][:width], grads[1][:width], dim=0)) > 0.99


def test_with_curvature_the_bound_is_exact_on_a_quadratic_margin():
    """m(x) = 1 + x - x^2 / 2 in one pixel: slope and curvature give the margin at x - eps."""

    def logits_at(x):
        m = 1 + x - x.square() / 2
        return torch.cat([m, torch.zeros_like(m)], 1)

    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    points = x.requires_grad_()
    settings = dict(eps=0.4, rho=0.25, curvature=True)
    bound = linearised_margin(logits_at, points, y, logits_at(points), **settings)
    assert bound.item() == pytest.approx(1 + 0.1 - 0.1**2 / 2)


def test_scaling_the_logits_scales_the_bound(smooth):
    net, x, y = smooth
    points = x.clone().requires_grad_()
    one_bound = linearised_margin(net, points, y, net(points), eps=0.1)
    scaled = lambda x: 1024 * net(x)  # noqa: E731
    torch.testing.assert_close(
        linearised_margin(scaled, points, y, scaled(points), eps=0.1), 1024 * one_bound
    )
