import math

import pytest
import torch
from cases import images, small_net, timm_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatreg.measures.feature_bound import local_bound
from flatreg.measures.lipschitz import (
    Lipschitz,
    feature_displacement,
    lipschitz_certificate,
    lipschitz_estimate,
)
from flatreg.models.normalize import with_normalization


def dense_jacobian(function, x):
    """Jacobian of one sample `(1, ...)`, as a matrix."""
    return torch.autograd.functional.jacobian(
        lambda flat: function(flat.reshape(x.shape)).flatten(), x.flatten().clone()
    )


def operator_norm(module, shape):
    """Spectral norm of an affine map, from its matrix."""
    return torch.linalg.matrix_norm(dense_jacobian(module, torch.zeros(1, *shape).double()), 2)


def blocks(seed):
    """A net of every kind of block, in eval mode, its running statistics away from 0 and 1."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.SiLU(), nn.Identity()),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.ELU(1.5),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(6, 4, 2, dilation=2, padding=1),
        nn.GELU(approximate="tanh"),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
        nn.LeakyReLU(1.2),
    ).double()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.2, 2)
    nn.init.normal_(net[1].weight)
    return with_normalization(net, [0.4, 0.5], [0.25, 0.3]).double().eval()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_the_certificate_is_above_the_estimate_and_above_every_slope_seen(seed):
    net = blocks(seed)
    certificate = lipschitz_certificate(net).value
    x = torch.rand(6, 2, 11, 11, dtype=torch.float64)
    estimate = lipschitz_estimate(net, x, steps=10).value
    assert bool((estimate <= certificate * (1 + 1e-12)).all())
    other = torch.rand_like(x)
    slope = (net(x) - net(other)).norm(dim=1) / (x - other).flatten(1).norm(dim=1)
    assert bool((slope <= certificate * (1 + 1e-12)).all())


def test_the_estimate_is_the_norm_of_the_jacobian_and_grows_towards_it():
    net = small_net(batch_norm=False, dtype=torch.float64).eval()
    x = images(4)[0].double()
    dense = torch.stack([torch.linalg.matrix_norm(dense_jacobian(net, one[None]), 2) for one in x])
    estimates = [lipschitz_estimate(net, x, steps=steps).value for steps in (1, 3, 300)]
    torch.testing.assert_close(estimates[-1], dense, rtol=1e-6, atol=0)
    assert bool((estimates[0] < estimates[1]).all()) and bool((estimates[1] < dense).all())


def test_the_estimate_leaves_no_gradient_behind_and_runs_through_attention():
    net = timm_net("test_vit").eval()
    x, before = torch.rand(2, 1, 160, 160), torch.random.get_rng_state()
    with torch.no_grad():
        estimate = lipschitz_estimate(net, x, steps=2)
    assert estimate.value.shape == (2,) and bool((estimate.value > 0).all())
    assert not estimate.value.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_estimate_refuses_what_has_no_second_derivative():
    with pytest.raises(ValueError, match="lipschitz_estimate needs a second derivative"):
        lipschitz_estimate(nn.Hardsigmoid(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="steps: expected a whole number from 1, got 0"):
        lipschitz_estimate(nn.ReLU(), torch.zeros(1, 3), steps=0)


def test_the_certificate_is_exact_for_a_linear_layer_and_a_chain_that_lines_up():
    torch.manual_seed(0)
    linear = nn.Linear(7, 4).double()
    assert lipschitz_certificate(linear).value == pytest.approx(float(operator_norm(linear, (7,))))
    scaled = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for layer, diagonal in zip(scaled[1:], ([3.0, 1.0, 1.0], [5.0, 2.0, 1.0]), strict=True):
        layer.weight.data = torch.diag(torch.tensor(diagonal))
    assert lipschitz_certificate(scaled).value == pytest.approx(15)
    estimate = lipschitz_estimate(scaled, torch.zeros(2, 3), steps=50).value
    torch.testing.assert_close(estimate, torch.full((2,), 15.0))


def test_normalisation_and_batch_norm_are_exact():
    identity = with_normalization(nn.Identity(), [0.1, 0.2], [0.5, 0.2]).double()
    exact = operator_norm(identity, (2, 3, 3))
    assert lipschitz_certificate(identity).value == pytest.approx(float(exact))
    norm = nn.BatchNorm2d(3).double().eval()
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    norm.weight.data = torch.tensor([1.0, -0.5, 3.0]).double()
    exact = operator_norm(norm, (3, 2, 2))
    assert lipschitz_certificate(norm).value == pytest.approx(float(exact))


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 3),
    groups=st.sampled_from([1, 2]),
    constant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_bound_of_a_convolution_is_above_its_matrix(
    kernel, stride, dilation, padding, groups, constant, seed
):
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias=False).double()
    if constant:  # all of one sign: the worst case of the bounds
        conv.weight.data.fill_(1.0)
    exact = float(operator_norm(conv, (2, 10, 9)))
    bound = lipschitz_certificate(conv).value
    assert exact <= bound * (1 + 1e-12)
    if constant and dilation == stride == 1:
        assert bound < 2.5 * exact  # the bound is one: 10 x 9 pixels hide little of it


def test_the_bound_of_a_convolution_is_exact_for_patches_and_for_pixels():
    torch.manual_seed(0)
    patches = nn.Conv2d(2, 5, 4, stride=4).double()
    exact = float(operator_norm(patches, (2, 8, 8)))
    assert lipschitz_certificate(patches).value == pytest.approx(exact)
    pixels = nn.Conv2d(3, 5, 1).double()
    exact = float(operator_norm(pixels, (3, 4, 4)))
    assert lipschitz_certificate(pixels).value == pytest.approx(exact)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1),
        nn.AvgPool2d((2, 3), stride=(2, 1), padding=1),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d(2, stride=1, divisor_override=3),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((1, 1)),
    ],
)
def test_average_pooling_is_bounded(pool):
    exact = float(operator_norm(pool, (1, 7, 7)))
    bound = lipschitz_certificate(pool).value
    assert exact <= bound * (1 + 1e-12)
    assert bound < 7.01 * exact


def test_maximum_pooling_of_overlapping_windows_counts_a_pixel_as_often_as_it_wins():
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    peak = x.clone()
    peak[0, 0, 2, 2] = 1.0
    for pool, slope in ((nn.MaxPool2d(2), 1), (nn.MaxPool2d(3, stride=1), 3)):
        assert float((pool(peak) - pool(x)).norm()) == slope
        assert lipschitz_certificate(pool).value == slope
    assert lipschitz_certificate(nn.MaxPool2d(3, stride=2, padding=1)).value == 2
    assert lipschitz_certificate(nn.MaxPool2d(2, stride=2, dilation=3)).value == 1


def test_activations_are_bounded_by_their_steepest_slope():
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    for activation in (
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(-3.0),
        nn.ELU(2.0),
        nn.Tanh(),
        nn.Hardtanh(),
        nn.Sigmoid(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
    ):
        (slopes,) = torch.autograd.grad(activation(x).sum(), x)
        steepest = float(slopes.abs().max())
        bound = lipschitz_certificate(activation).value
        assert steepest <= bound <= steepest * 1.001, activation


def test_a_block_that_runs_twice_counts_twice():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = 3 * torch.eye(2)
    assert lipschitz_certificate(nn.Sequential(layer, nn.ReLU(), layer)).value == pytest.approx(9)


def test_it_stops_before_the_head():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 2)))
    head = net[2][1]
    expected = lipschitz_certificate(net[1]).value
    assert lipschitz_certificate(net, before=head).value == expected
    with pytest.raises(ValueError, match="no block of Sequential is the Linear given"):
        lipschitz_certificate(net, before=nn.Linear(3, 2))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def hooked():
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, args, output: 10 * output)
    return layer


def replaced():
    layer = nn.ReLU()
    layer.forward = lambda x: 10 * x
    return layer


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (nn.MultiheadAttention(4, 2), r"\(MultiheadAttention\) has no Lipschitz constant"),
        (Residual(nn.Linear(4, 4)), r"\(Residual\) is not covered: its forward may branch, add"),
        (Doubled(2, 2), r"\(Doubled\) is not covered"),
        (nn.LayerNorm(4), r"\(LayerNorm\) is not covered"),
        (nn.BatchNorm2d(3), "couple samples: call eval"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "couple samples"),
        (nn.Dropout(0.1), "random in training mode"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "pads by 'circular'"),
        (nn.AdaptiveAvgPool2d(2), "depend on the size"),
        (hooked(), "hook"),
        (replaced(), "forward of its own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_not_covered_is_named_with_its_reason(block, reason):
    net = nn.Sequential(nn.Identity(), nn.Sequential(block))
    with pytest.raises(ValueError, match=rf"^no certificate: Sequential\.1\.0 .*{reason}"):
        lipschitz_certificate(net)


def test_a_timm_network_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no certificate: NormalizedModel\.model \(ConvNeXt\)"):
        lipschitz_certificate(timm_net().eval())


def test_its_kind_is_printed_everywhere():
    for number in (Lipschitz(3.0, "estimate"), Lipschitz(torch.tensor([1.0, 3.0]), "estimate")):
        for text in (str(number), repr(number), f"{number}", f"{[number]}"):
            assert "estimate" in text and "certificate" not in text
    assert str(Lipschitz(torch.tensor([1.0, 3.0]), "estimate")).startswith("at least 1 to 3 over 2")
    assert str(Lipschitz(torch.zeros(0), "estimate")) == "unknown, of 0 inputs (estimate)"
    assert "certificate" in f"{lipschitz_certificate(nn.ReLU())}"


def test_the_displacement_covers_the_ball():
    shape = (1, 4, 4)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)).double()
    layer[1].weight.data = torch.ones(3, 16).double()  # attained at a corner of the Linf ball
    certificate = lipschitz_certificate(layer)
    corner = torch.full((1, *shape), 0.1, dtype=torch.float64)
    radius = feature_displacement(certificate, 0.1, "linf", shape)
    assert radius == pytest.approx(float(layer(corner).detach().norm()))
    assert feature_displacement(certificate, 0.1, "l2", shape) == pytest.approx(radius / 4)
    assert feature_displacement(2.0, 0.1, "l1", shape) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="norm must be"):
        feature_displacement(certificate, 0.1, "l0", shape)


def test_certificate_displacement_and_bound_hold_together_in_input_space():
    """The loss at attacked inputs stays below the feature bound at R = L eps sqrt(n)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, labels = torch.rand(50, 1, 4, 4).double(), torch.randint(0, 4, (50,))
    certificate = lipschitz_certificate(net, before=net[3])
    for eps in (0.01, 0.3):
        points = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(net(points), labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), points)
        attacked = net(x + eps * gradient.sign())
        radius = feature_displacement(certificate, eps, "linf", x.shape[1:])
        bound = local_bound(net(x), labels, net[3].weight, radius)
        assert bool((nn.functional.cross_entropy(attacked, labels, reduction="none") < bound).all())
    per_input = lipschitz_estimate(net[:3], x)
    radii = feature_displacement(per_input, 0.1, "linf", x.shape[1:])
    torch.testing.assert_close(radii, per_input.value * 0.1 * math.sqrt(16))
