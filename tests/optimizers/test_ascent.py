"""Every ascent rule against its definition, and as the maximiser over its set."""

import pytest
import torch
from torch import nn

from flatreg.optimizers import Adaptive, Friendly, Global, Layerwise, Random, Relative
from flatreg.optimizers.ascent import ParameterState

RULES = [Global(), Adaptive(eta=0.1), Layerwise(), Relative()]


def problem(seed=0, dtype=torch.float64):
    """A linear weight, a bias, a grouped convolution's weight; gradients; states."""
    torch.manual_seed(seed)
    shapes = [(4, 7), (4,), (6, 2, 3, 3)]
    weights = [torch.randn(s, dtype=dtype) for s in shapes]
    gradients = [torch.randn(s, dtype=dtype) for s in shapes]
    return weights, gradients, states_of(weights, [1, 1, 3])


def states_of(weights, groups):
    return [ParameterState(w, groups=g) for w, g in zip(weights, groups, strict=True)]


def perturbation(rule, gradients, states, rho=0.3, loss_scale=1.0):
    directions = [g.clone() for g in gradients]
    scales = rule(states, directions, loss_scale)
    return [rho * s * d for s, d in zip(scales, directions, strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def maps(weight, groups):
    return [w.reshape(w.shape[0], -1) for w in weight.chunk(groups)]


def relative(weights, inside, states, rho):
    """W M of each layer, all M together of length rho; zero where there is no M."""
    length = flat([m for layer in inside for m in layer]).norm()
    return [
        torch.cat([w @ m for w, m in zip(maps(w, s.groups), layer, strict=True)]).reshape(w.shape)
        * rho
        / length
        if layer
        else torch.zeros_like(w)
        for w, layer, s in zip(weights, inside, states, strict=True)
    ]


def by_definition(rule, weights, gradients, states, rho=0.3):
    if isinstance(rule, Global):
        return [rho * g / flat(gradients).norm() for g in gradients]
    if isinstance(rule, Adaptive):
        t = [w.abs() + rule.eta for w in weights]
        length = flat([a * g for a, g in zip(t, gradients, strict=True)]).norm()
        return [rho * a**2 * g / length for a, g in zip(t, gradients, strict=True)]
    if isinstance(rule, Layerwise):
        return [
            rho * w.norm() * g / g.norm() if w.ndim > 1 else torch.zeros_like(w)
            for w, g in zip(weights, gradients, strict=True)
        ]
    inside = [
        [w.T @ g for w, g in zip(maps(w, s.groups), maps(g, s.groups), strict=True)]
        if w.ndim > 1
        else []
        for w, g, s in zip(weights, gradients, states, strict=True)
    ]
    return relative(weights, inside, states, rho)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_equals_the_definition(rule):
    for seed in range(5):
        weights, gradients, states = problem(seed)
        expected = by_definition(rule, weights, gradients, states)
        for e, wanted in zip(perturbation(rule, gradients, states), expected, strict=True):
            torch.testing.assert_close(e, wanted, rtol=1e-12, atol=1e-14)


def feasible(rule, weights, states, rho=0.3):
    """A random perturbation on the boundary of the rule's set."""
    noise = [torch.randn_like(w) for w in weights]
    if isinstance(rule, Global):
        return [rho * z / flat(noise).norm() for z in noise]
    if isinstance(rule, Adaptive):
        return [
            rho * z / flat(noise).norm() * (w.abs() + rule.eta)
            for z, w in zip(noise, weights, strict=True)
        ]
    if isinstance(rule, Layerwise):
        return [
            rho * w.norm() * z / z.norm() * float(w.ndim > 1)
            for z, w in zip(noise, weights, strict=True)
        ]
    inside = [
        [torch.randn(m.shape[1], m.shape[1], dtype=m.dtype) for m in maps(w, s.groups)]
        if w.ndim > 1
        else []
        for w, s in zip(weights, states, strict=True)
    ]
    return relative(weights, inside, states, rho)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_no_perturbation_of_the_set_climbs_higher(rule):
    weights, gradients, states = problem()
    best = flat(perturbation(rule, gradients, states)) @ flat(gradients)
    assert best > 0
    for _ in range(200):
        assert flat(feasible(rule, weights, states)) @ flat(gradients) <= best


def test_a_grouped_convolution_is_its_groups_side_by_side():
    """Each group as a layer of its own gives the same perturbation."""
    torch.manual_seed(0)
    w, g = torch.randn(2, 6, 2, 3, 3, dtype=torch.float64)
    (together,) = perturbation(Relative(), [g], states_of([w], [3]))
    apart = perturbation(Relative(), list(g.chunk(3)), states_of(w.chunk(3), [1, 1, 1]))
    torch.testing.assert_close(together, torch.cat(apart))
    (wrong,) = perturbation(Relative(), [g], states_of([w], [1]))
    assert not torch.allclose(together, wrong)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_the_convolution_it_equals(groups):
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False).double()
    conv = nn.Conv2d(4, 6, 3, padding=2, groups=groups, bias=False).double()

    def as_conv(weight):  # (in, out/groups, k, k) to (out, in/groups, k, k)
        parts = [w.transpose(0, 1).flip(2, 3) for w in weight.chunk(groups)]
        return torch.cat(parts)

    conv.weight.data = as_conv(up.weight.data)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(up(x), conv(x))
    up(x).square().sum().backward()
    conv(x).square().sum().backward()
    transposed = ParameterState(up.weight.data, groups=groups, transposed=True)
    (a,) = perturbation(Relative(), [up.weight.grad], [transposed])
    (b,) = perturbation(Relative(), [conv.weight.grad], states_of([conv.weight.data], [groups]))
    torch.testing.assert_close(as_conv(a), b)


@pytest.mark.parametrize("rule", [Adaptive(eta=0.0), Layerwise(), Relative()], ids=str)
def test_scales_with_the_weights(rule):
    """w -> w/c with the layer's input scaled by c (so g -> c g): e -> e/c, for c per layer."""
    weights, gradients, states = problem()
    factors = [2.0, 3.0, 0.25]
    e = perturbation(rule, gradients, states)
    scaled = perturbation(
        rule,
        [g * c for g, c in zip(gradients, factors, strict=True)],
        states_of([w / c for w, c in zip(weights, factors, strict=True)], [1, 1, 3]),
    )
    for a, b, c in zip(e, scaled, factors, strict=True):
        torch.testing.assert_close(a, b * c)


@pytest.mark.parametrize("rule", [*RULES, Friendly()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_no_gradient_and_an_overflow_have_scale_zero(rule, bad):
    _, gradients, states = problem(dtype=torch.float32)
    gradients[2].fill_(bad)
    gradients[0].zero_()
    gradients[1].zero_()
    scales = rule(states, gradients, 1.0)
    assert all(float(s) == 0 for s in scales)


@pytest.mark.parametrize("rule", [*RULES, Friendly(), Random()], ids=lambda r: type(r).__name__)
def test_a_loss_scale_changes_nothing(rule):
    """Also where it moves from step to step, as a GradScaler's does."""
    plain, scaled = problem(), problem()
    for step, factor in enumerate((1024.0, 512.0, 2048.0)):
        _, gradients, _ = problem(step)
        a = perturbation(rule, gradients, plain[2])
        b = perturbation(
            rule,
            [g * factor for g in gradients],
            scaled[2],
            loss_scale=torch.tensor(factor, dtype=torch.float64),
        )
        torch.testing.assert_close(a, b)


def test_friendly_subtracts_the_running_mean_of_before():
    *_, states = problem()
    rule, mean = Friendly(sigma=0.7, decay=0.8), None
    for step in range(4):
        _, gradients, _ = problem(step)
        d = [
            g if mean is None else g - 0.7 * m
            for g, m in zip(gradients, mean or gradients, strict=True)
        ]
        expected = [0.3 * v / flat(d).norm() for v in d]
        got = perturbation(rule, gradients, states)
        torch.testing.assert_close(got, expected)
        mean = [
            g if mean is None else 0.8 * m + 0.2 * g
            for g, m in zip(gradients, mean or gradients, strict=True)
        ]


def test_friendly_forgets_a_batch_that_overflowed():
    _, gradients, states = problem()
    rule = Friendly()
    rule(states, [g.clone() for g in gradients], 1.0)
    before = [s.memory["friendly_mean"].clone() for s in states]
    rule(states, [g * float("inf") for g in gradients], 1.0)
    torch.testing.assert_close([s.memory["friendly_mean"] for s in states], before)
