import pytest
import torch
from curvature_cases import PIXELS, loss_at, manifolds, one, projector, smooth_case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import input_hessian
from torch import nn

from flatreg.measures.input_curvature import chord, gradient_difference, second_difference
from flatreg.measures.input_gradient import grad_alignment, gradient_dual_norm, local_linearity
from flatreg.measures.input_hessian import directional_curvature, hvp, normal_trace, top_curvature

KINDS = ["identity", "pca", "local"]


@pytest.fixture(scope="module")
def fitted():
    return manifolds()


def dense(net, x, y, manifold):
    """P H P of every sample (3, pixels, pixels)."""
    matrices = []
    for i in range(3):
        normal = projector(manifold, x[i : i + 1])
        matrices.append(normal @ input_hessian(one(net, y, i), x[i : i + 1]) @ normal)
    return torch.stack(matrices)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_products_equal_the_dense_hessian(seed):
    net, x, y = smooth_case(seed)
    n = torch.randn(3, PIXELS, dtype=torch.float64)
    hessian = dense(net, x, y, manifolds()["identity"])
    product = hvp(loss_at(net, y), x, n)
    torch.testing.assert_close(product, (hessian @ n[:, :, None])[:, :, 0])
    curvature = directional_curvature(loss_at(net, y), x, n)
    torch.testing.assert_close(curvature, (n * product).sum(1))
    assert not product.requires_grad and not curvature.requires_grad


def test_second_difference_converges_to_directional_curvature():
    net, x, y = smooth_case()
    n = nn.functional.normalize(torch.randn(3, PIXELS, dtype=torch.float64))
    exact = directional_curvature(loss_at(net, y), x, n)
    values = [second_difference(loss_at(net, y), x, n, h).detach() for h in (0.1, 0.01)]
    errors = [float((value - exact).abs().max()) for value in values]
    assert errors[1] < errors[0] / 50  # of second order in h


@pytest.mark.parametrize("kind", KINDS)
def test_normal_trace_is_the_trace_within_its_error(fitted, kind):
    net, x, y = smooth_case()
    exact = torch.einsum("bii->b", dense(net, x, y, fitted[kind]))
    trace = normal_trace(loss_at(net, y), x, manifold=fitted[kind], num_probes=200)
    assert float(((trace.values - exact).abs() / trace.stderr).max()) < 4
    assert float((trace.stderr / exact.abs()).max()) < 0.5
    again = normal_trace(loss_at(net, y), x, manifold=fitted[kind], num_probes=200)
    assert torch.equal(trace.values, again.values)
    single = normal_trace(loss_at(net, y), x, manifold=fitted[kind], num_probes=1)
    assert bool(single.stderr.isnan().all())


def test_on_a_diagonal_hessian_every_probe_gives_the_trace():
    """Rademacher probes see no noise on a diagonal Hessian."""
    trace = normal_trace(lambda x: (x**2 * torch.arange(6)).sum(1), torch.rand(2, 6), num_probes=3)
    torch.testing.assert_close(trace.values, torch.full((2,), 30.0))
    torch.testing.assert_close(trace.stderr, torch.zeros(2))


@pytest.mark.parametrize("kind", KINDS)
def test_top_curvature_is_the_largest_eigenvalue(fitted, kind):
    net, x, y = smooth_case()
    matrices = dense(net, x, y, fitted[kind])
    top = top_curvature(loss_at(net, y), x, manifold=fitted[kind], steps=PIXELS)
    # The tangent space has eigenvalue 0: leave it out.
    exact = torch.stack([m[m.abs() > 1e-10].max() for m in torch.linalg.eigvalsh(matrices)])
    torch.testing.assert_close(top.values, exact, rtol=1e-8, atol=1e-10)
    v = top.directions[:, :, None]
    torch.testing.assert_close(matrices @ v, v * exact[:, None, None], rtol=0, atol=1e-8)
    torch.testing.assert_close(top.directions.norm(dim=1), torch.ones(3).double())
    few = top_curvature(loss_at(net, y), x, manifold=fitted[kind], steps=2)
    distance = (few.values[:, None] - torch.linalg.eigvalsh(matrices)).abs().amin(1)
    assert bool((distance <= few.residuals + 1e-12).all())


@pytest.mark.parametrize("kind", ["pca", "local"])
def test_top_curvature_stays_off_the_manifold_where_all_curvature_is_negative(fitted, kind):
    x = torch.rand(2, PIXELS, dtype=torch.float64)
    concave = lambda x: -(x**2 * torch.arange(1, 7)).sum(1)  # noqa: E731
    top = top_curvature(concave, x, manifold=fitted[kind], steps=PIXELS)
    normal = fitted[kind].split(x, top.directions)[1]
    torch.testing.assert_close(normal, top.directions)
    assert float(top.values.max()) < -1


def test_an_affine_loss_has_no_curvature():
    x = torch.rand(2, PIXELS)
    assert not hvp(lambda x: x.sum(1), x, torch.ones_like(x)).any()
    assert not top_curvature(lambda x: x.sum(1), x, steps=3).values.any()


def test_images_keep_their_shape_and_attention_is_no_obstacle():
    torch.manual_seed(0)
    layer, head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
    y = torch.tensor([0, 1])
    loss = loss_at(lambda x: head(layer(x, x, x, need_weights=False)[0].mean(1)), y)
    x = torch.rand(2, 4, 8)
    top = top_curvature(loss, x, steps=8)
    assert top.directions.shape == x.shape
    torch.testing.assert_close(
        directional_curvature(loss, x, top.directions), top.values, rtol=1e-3, atol=1e-5
    )


def test_operators_without_a_second_derivative_are_refused():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    loss = loss_at(net, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"hvp needs a second derivative.*use second_difference"):
        hvp(loss, torch.rand(2, 6), torch.rand(2, 6))


def dual_norm(loss_at, x, method):
    points = x.requires_grad_()
    return gradient_dual_norm(loss_at(points), loss_at, points, step=0.1, method=method)


@pytest.mark.parametrize(
    "measure",
    [
        hvp,
        directional_curvature,
        grad_alignment,
        local_linearity,
        lambda f, x, n: top_curvature(f, x, steps=2),
        lambda f, x, n: gradient_difference(f, x, 0.1),
        lambda f, x, n: second_difference(f, x, n, 0.1),
        lambda f, x, n: chord(f, x, x + n, 0.5),
        lambda f, x, n: local_linearity(f, x, x + n, method="double_backward"),
        lambda f, x, n: dual_norm(f, x, "finite_difference"),
        lambda f, x, n: dual_norm(f, x, "double_backward"),
    ],
)
def test_a_mean_loss_is_refused_as_it_would_count_for_every_sample(measure):
    net, x, y = smooth_case()
    n, losses = torch.randn(3, PIXELS, dtype=torch.float64), loss_at(net, y)
    measure(losses, x, n)
    for wrong in (lambda points: losses(points).mean(), lambda points: losses(points)[:, None]):
        with pytest.raises(ValueError, match=r"with a value per sample \(3,\), got shape") as error:
            measure(wrong, x.detach(), n)
        assert "\n" not in str(error.value)
