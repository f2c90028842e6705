"""Sharpness of the whole network: known answers, invariances, and nothing left behind."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import images, small_net, trained_net
from oracles import block_hessian, full_hessian
from torch import nn

from flatreg.measures.layer_flatness import layer_flatness
from flatreg.measures.sharpness import average_case_sharpness, worst_case_sharpness
from flatreg.measures.weight_hessian import hessian_top_eigenvalue, hessian_trace_estimate

CURVES = torch.tensor([4.0, 1.0, 0.5, 0.0], dtype=torch.float64)


class Point(nn.Module):
    """Weights alone: the loss below is a function of them."""

    def __init__(self, start=(0.0, 0.0, 0.0, 0.0)):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x):
        return self.at.expand(len(x), -1)


def quadratic(logits, labels):
    """w^T diag(curves) w / 2 per sample, times the label."""
    return (logits.square() * CURVES).sum(1) / 2 * labels


def linear(logits, labels):
    return logits @ torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)


ONE = [(torch.zeros(3, 1), torch.ones(3))]


def relu_net(factor=1.0):
    """The same function for every positive `factor`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 6), nn.ReLU(), nn.Linear(6, 5)).double()
    with torch.no_grad():
        model[1].weight *= factor
        model[1].bias *= factor
        model[3].weight /= factor
    return model


def test_worst_case_of_a_quadratic_is_its_top_eigenvalue():
    found = worst_case_sharpness(Point(), ONE, rho=0.1, loss=quadratic, steps=40)
    assert found.value == pytest.approx(4 * 0.1**2 / 2, rel=1e-6)
    assert found.n == 1 and math.isnan(found.stderr)


@pytest.mark.parametrize(("norm", "rise"), [("l2", 5 * 0.2), ("linf", 7 * 0.2)])
def test_worst_case_of_a_linear_loss_is_its_dual_norm(norm, rise):
    found = worst_case_sharpness(Point(), ONE, rho=0.2, norm=norm, loss=linear, steps=1, restarts=0)
    assert found.value == pytest.approx(rise)


@pytest.mark.parametrize(("norm", "rise"), [("l2", math.hypot(3, 8) * 0.2), ("linf", 11 * 0.2)])
def test_adaptive_ball_is_relative(norm, rise):
    """Weight i moves by |w_i| e_i: the slope in e is w_i g_i."""
    model = Point((1.0, 2.0, 5.0, 0.0))
    found = worst_case_sharpness(
        model, ONE, rho=0.2, norm=norm, adaptive=True, loss=linear, steps=1, restarts=0
    )
    assert found.value == pytest.approx(rise)


def test_worst_case_from_inside_a_slope_is_the_true_maximum():
    """A quadratic with a slope, against a fine grid of the circle."""
    model = Point((0.3, -1.0, 0.0, 0.0))
    rho, angle = 0.5, torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    circle = torch.stack([0.3 + rho * angle.cos(), -1.0 + rho * angle.sin()], 1)
    values = (circle.square() * CURVES[:2]).sum(1) / 2
    base = (0.3**2 * 4 + 1) / 2
    found = worst_case_sharpness(model, ONE, rho=rho, loss=quadratic, steps=60, restarts=2)
    assert found.value == pytest.approx(float(values.max()) - base, rel=1e-5)


def test_worst_case_is_averaged_over_batches():
    batches = [(torch.zeros(2, 1), torch.full((2,), c)) for c in (1.0, 2.0, 6.0)]
    found = worst_case_sharpness(Point(), batches, rho=0.1, loss=quadratic, steps=40)
    assert found.value == pytest.approx(3 * 0.02, rel=1e-6)
    assert found.stderr == pytest.approx(0.02 * math.sqrt(7 / 3), rel=1e-6) and found.n == 3


def test_average_case_of_a_quadratic_is_half_its_trace():
    batches = [(torch.zeros(2, 1), torch.ones(2)), (torch.zeros(6, 1), torch.full((6,), 3.0))]
    found = average_case_sharpness(Point(), batches, std=0.1, num_draws=2000, loss=quadratic)
    exact = 0.1**2 * float(CURVES.sum()) / 2 * (2 * 1 + 6 * 3) / 8
    assert abs(found.value - exact) < 4 * found.stderr < 0.2 * exact


def test_average_case_adaptive_scales_each_weight():
    model = Point((2.0, 0.0, 0.0, 7.0))
    found = average_case_sharpness(
        model, ONE, std=0.1, num_draws=2000, adaptive=True, loss=quadratic
    )
    exact = (0.1 * 2) ** 2 * 4 / 2
    assert abs(found.value - exact) < 4 * found.stderr < 2 * exact


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adaptive_is_invariant_under_rescaling_and_plain_is_not(norm):
    """By 4, a power of two, so that every rounding is the same."""
    x, y = images()
    one, four = relu_net(1.0), relu_net(4.0)
    torch.testing.assert_close(one(x.double()), four(x.double()))

    def worst(model, adaptive):
        return worst_case_sharpness(
            model, [(x.double(), y)], rho=0.01, norm=norm, adaptive=adaptive, steps=5
        ).value

    def average(model, adaptive):
        return average_case_sharpness(
            model, [(x.double(), y)], std=0.05, adaptive=adaptive, num_draws=5
        ).value

    for measure in (worst, average):
        assert measure(one, True) == pytest.approx(measure(four, True), rel=1e-9)
        assert measure(one, False) != pytest.approx(measure(four, False), rel=0.05)


def test_worst_case_exceeds_one_sam_step():
    model, x, y = trained_net(32)
    model = model.double()
    x = x.double()
    loss = nn.functional.cross_entropy
    named = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss(model(x), y), list(named.values()))
    length = torch.stack([g.norm() for g in gradient]).norm()
    moved = {k: p + 0.1 * g / length for (k, p), g in zip(named.items(), gradient, strict=True)}
    sam = loss(torch.func.functional_call(model, moved, (x,)), y) - loss(model(x), y)
    found = worst_case_sharpness(model, [(x, y)], rho=0.1)
    assert found.value >= float(sam.detach()) > 0
    assert worst_case_sharpness(model, [(x, y)], rho=0.0).value == 0


@pytest.mark.parametrize(
    "measure",
    [partial(worst_case_sharpness, rho=0.1), partial(average_case_sharpness, std=0.1)],
    ids=["worst_case", "average_case"],
)
def test_model_is_left_untouched_even_by_an_error(measure):
    """Weights, buffers, gradients, modes and random streams, when a loss raises midway."""
    model, (x, y) = small_net(dropout=0.5).train(), images()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    places = [p.data_ptr() for p in model.parameters()]
    calls = []

    def breaks(logits, labels):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("midway")
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    with pytest.raises(RuntimeError, match="midway"):
        measure(model, [(x, y)], loss=breaks)
    measure(model, [(x, y)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert places == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None and model.training
    assert torch.equal(torch.get_rng_state(), rng)


def test_batch_norm_is_evaluated_by_its_statistics():
    """So the sharpness of a batch is a mean over its samples."""
    model, (x, y) = small_net().train(), images()
    model(x)
    whole = average_case_sharpness(model, [(x, y)], std=0.05, num_draws=3)
    parts = average_case_sharpness(model, [(x[:3], y[:3]), (x[3:], y[3:])], std=0.05, num_draws=3)
    assert parts.value == pytest.approx(whole.value, rel=1e-4)


def small_case():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    ).double()
    x, y = images(6, size=10)
    return model, x.double(), y % 3


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_top_eigenvalue_is_the_dense_one(method):
    model, x, y = small_case()
    exact = float(torch.linalg.eigvalsh(full_hessian(model, x, y))[-1])
    found = hessian_top_eigenvalue(model, x, y, steps=30, method=method)
    assert abs(found.value - exact) <= (found.high - found.low) / 2 + 1e-3 * exact * (
        method != "double_backward"
    )
    assert found.high - found.value < 1e-3 * exact
    coarse = hessian_top_eigenvalue(model, x, y, steps=3)
    assert coarse.high - coarse.low > found.high - found.low and coarse.value < found.value
    assert str(coarse) == f"{coarse.value:.3g} (within {coarse.high - coarse.value:.1g})"


def test_top_eigenvalue_of_one_layer():
    model, x, y = small_case()
    exact = float(torch.linalg.eigvalsh(block_hessian(model, x, y, "0.weight"))[-1])
    found = hessian_top_eigenvalue(model, x, y, layers=["0"], steps=18)
    assert found.value == pytest.approx(exact, rel=1e-9)


def test_trace_is_the_dense_one():
    model, x, y = small_case()
    exact = float(full_hessian(model, x, y).trace())
    found = hessian_trace_estimate(model, x, y, num_probes=200)
    assert abs(found.value - exact) < 4 * found.stderr < 0.6 * exact and found.n == 200
    block = float(block_hessian(model, x, y, "3.weight").trace())
    head = hessian_trace_estimate(model, x, y, layers=["3"], num_probes=200)
    assert abs(head.value - block) < 4 * head.stderr < 0.6 * block


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: worst_case_sharpness(m, ONE, rho=-1.0),
            r"rho: expected a number in \[0, inf\), got -1.0",
        ),
        (lambda m: worst_case_sharpness(m, ONE, rho=1.0, norm="l1"), 'must be "l2" or "linf"'),
        (
            lambda m: worst_case_sharpness(m, ONE, rho=1.0, steps=0),
            "steps: expected a whole number",
        ),
        (
            lambda m: average_case_sharpness(m, ONE, std=-1.0),
            r"std: expected a number in \[0, inf\), got -1.0",
        ),
        (lambda m: average_case_sharpness(m, ONE, std=float("inf")), "std: .*, got inf"),
        (lambda m: average_case_sharpness(m, [], std=1.0), "expected at least one, got none"),
        (lambda m: average_case_sharpness(m, ONE, std=1.0, num_draws=0), "num_draws: expected"),
        (lambda m: hessian_trace_estimate(m, *ONE[0], num_probes=0), "num_probes: expected"),
        (
            lambda m: worst_case_sharpness(m, ONE, rho=1.0, adaptive="no"),
            "adaptive: expected True or False, got 'no'",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(Point())


@pytest.mark.parametrize(
    "measure",
    [
        partial(hessian_trace_estimate, num_probes=1),
        partial(hessian_top_eigenvalue, steps=2),
        partial(layer_flatness, num_probes=1),
        lambda model, x, y: worst_case_sharpness(model, [(x, y)], rho=0.1),
    ],
)
def test_no_sample_and_weights_that_are_no_numbers_are_refused(measure):
    model, (x, y) = small_net(), images()
    with pytest.raises(ValueError, match=r"^expected a batch of one sample or more"):
        measure(model, x[:0], y[:0])
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite weights, '3.weight' of Sequential"):
        measure(model, x, y)
