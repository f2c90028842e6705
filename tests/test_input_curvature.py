from itertools import product

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import (
    CLASSES,
    PIXELS,
    dense_fisher_trace,
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

from flatreg.measures.input_curvature import (
    chord,
    fisher,
    gradient_difference,
    normal_direction,
    second_difference,
)
from flatreg.measures.manifold import IdentityManifold
from flatreg.models.double_backward import twice_differentiable

KINDS = ["identity", "pca", "local"]
ALL_SIGNS = torch.tensor(list(product([-1, 1], repeat=CLASSES)))


@pytest.fixture
def smooth():
    return smooth_case()


@pytest.fixture(scope="module")
def fitted():
    return manifolds()


@pytest.mark.parametrize("kind", KINDS)
def test_second_difference_tends_to_the_quadratic_form(smooth, fitted, kind):
    net, x, y = smooth
    noise = torch.randn(3, PIXELS, dtype=torch.float64)
    n = normal_direction(noise, x, fitted[kind])
    value = second_difference(loss_at(net, y), x, n, 1e-3).detach()
    for i in range(3):
        v = projector(fitted[kind], x[i : i + 1]) @ noise[i]
        hessian = input_hessian(one(net, y, i), x[i : i + 1])
        assert value[i] == pytest.approx(float(v @ hessian @ v / (v @ v)), rel=1e-4, abs=1e-8)
    known = second_difference(loss_at(net, y), x, n, 1e-3, loss=loss_at(net, y)(x))
    torch.testing.assert_close(known.detach(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_chord_is_the_squared_gap_to_second_order(smooth, fitted, kind):
    net, x, y = smooth
    noise = torch.randn(3, PIXELS, dtype=torch.float64)
    delta = 1e-4 * fitted[kind].split(x, noise)[1]
    value = chord(loss_at(net, y), x, x + delta, 0.3).detach()
    for i in range(3):
        curvature = delta[i] @ input_hessian(one(net, y, i), x[i : i + 1]) @ delta[i]
        assert value[i] == pytest.approx(float((0.3 * 0.7 / 2 * curvature) ** 2), rel=1e-2)


def test_chord_is_zero_on_an_affine_loss():
    x = torch.rand(4, 3, dtype=torch.float64)
    assert chord(lambda x: x.sum(1), x, torch.rand_like(x), torch.rand(4).double()).max() < 1e-28


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_steps_that_give_no_difference_are_refused(wrong):
    x = torch.rand(4, 3, dtype=torch.float64)
    for measured in (second_difference, chord):
        with pytest.raises(ValueError, match=r"expected a number in \(0, "):
            measured(lambda x: x.sum(1), x, x, wrong)
    with pytest.raises(ValueError, match=r"expected a number in \(0, "):
        gradient_difference(lambda x: x.sum(1), x, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_difference_tends_to_the_norm_of_the_hessian_product(smooth, fitted, kind):
    net, x, y = smooth
    value = gradient_difference(loss_at(net, y), x, 1e-5, manifold=fitted[kind])
    for i in range(3):
        point = x[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(one(net, y, i)(point).sum(), point)
        normal = projector(fitted[kind], x[i : i + 1])
        n = normal @ g[0].sign()
        curved = normal @ input_hessian(one(net, y, i), x[i : i + 1]) @ (n / n.norm())
        assert value[i].item() == pytest.approx(float(curved.square().sum()), rel=1e-3)
    value.sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_gradient_difference_names_the_forward_only_twins():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="use second_difference or chord"):
        gradient_difference(loss_at(net, y), torch.rand(2, 6), 0.1).sum().backward()


def attention_net():
    torch.manual_seed(0)
    layer, head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    return layer, lambda x: head(layer(x, x, x, need_weights=False)[0].mean(1))


def test_gradient_difference_runs_through_attention():
    layer, logits_at = attention_net()
    y = torch.tensor([0, 1])
    gradient_difference(loss_at(logits_at, y), torch.rand(2, 4, 8), 0.1).sum().backward()
    assert bool(layer.in_proj_weight.grad.isfinite().all())


def test_identity_manifold_splits_into_nothing_and_all():
    v = torch.randn(2, 3)
    tangent, normal = IdentityManifold().split(torch.rand(2, 3), v)
    assert torch.equal(tangent + normal, v) and not tangent.any()
    assert not normal_direction(torch.zeros(2, 3), v).any()


def fisher_over_all_signs(net, x, manifold):
    """The expectation itself: the mean over all 2^K sign vectors."""
    points = x.clone().requires_grad_()
    signs = ALL_SIGNS[:, None].expand(-1, len(x), -1)
    return fisher(net(points), points, manifold=manifold, signs=signs)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.1, 1.0, 8.0]))
def test_fisher_is_unbiased_in_value_and_in_gradient(fitted, kind, seed, scale):
    net, x, _ = smooth_case(seed)
    with torch.no_grad():
        net[2].weight *= scale
    values = fisher_over_all_signs(net, x, fitted[kind])
    dense = torch.stack([dense_fisher_trace(net, x[i : i + 1], fitted[kind]) for i in range(3)])
    torch.testing.assert_close(values, dense, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        flat_grad(values.sum(), net), flat_grad(dense.sum(), net), rtol=1e-8, atol=1e-12
    )


def test_random_signs_of_fisher_average_to_the_trace(smooth, fitted):
    net, x, _ = smooth
    points = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    logits = net(points)
    draws = torch.stack(
        [fisher(logits, points, manifold=fitted["pca"], generator=generator) for _ in range(300)]
    ).detach()
    exact = fisher_over_all_signs(net, x, fitted["pca"]).detach()
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 300**0.5)
    assert float(error.max()) < 4
    mean = fisher(
        logits,
        points,
        manifold=fitted["pca"],
        num_probes=300,
        generator=torch.Generator().manual_seed(0),
    ).detach()
    assert float(((mean - exact).abs() / draws.std(0)).max()) < 4 / 300**0.5


def test_fisher_is_that_of_the_softmax_and_finite_where_it_saturates(smooth):
    net, x, _ = smooth
    points = x.clone().requires_grad_()
    signs = torch.ones(1, 3, CLASSES)
    shifted = fisher(net(points) + 7, points, signs=signs)  # softmax does not move
    torch.testing.assert_close(shifted, fisher(net(points), points, signs=signs))
    confident = 1e3 * net(points)
    value = fisher(confident, points, num_probes=4)
    assert bool(value.isfinite().all()) and float(value.detach().min()) >= 0
    assert bool(flat_grad(value.sum(), net).isfinite().all())


def test_fisher_refuses_what_cannot_be_differentiated_twice():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    points = torch.rand(2, 6, requires_grad=True)
    with pytest.raises(ValueError, match="use second_difference or chord"):
        fisher(net(points), points)


def test_fisher_reuses_a_pass_of_a_model_with_attention():
    layer, logits_at = attention_net()
    points = torch.rand(2, 4, 8, requires_grad=True)
    with twice_differentiable():
        logits = logits_at(points)
    fisher(logits, points).sum().backward()
    assert float(layer.in_proj_weight.grad.abs().sum()) > 0


def test_fisher_is_taken_in_float32_under_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 4))
    signs, values = torch.ones(1, 8, 4), []
    for enabled in (True, False):
        points = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = net(points)
        values.append(fisher(logits, points, signs=signs).detach())
    assert values[0].dtype == torch.float32
    assert float(F.cosine_similarity(values[0], values[1], dim=0)) > 0.99
    torch.testing.assert_close(values[0], values[1], rtol=0.1, atol=0)


def test_a_known_gradient_saves_a_pass_and_changes_nothing(smooth):
    net, x, y = smooth
    passes = []

    def counted(points):
        passes.append(len(points))
        return loss_at(net, y)(points)

    whole = gradient_difference(counted, x, 0.1)
    points = x.clone().requires_grad_()
    loss = loss_at(net, y)(points)
    (known,) = torch.autograd.grad(loss.sum(), points, create_graph=True)
    torch.testing.assert_close(gradient_difference(counted, x, 0.1, gradient=known), whole)
    assert len(passes) == 3
