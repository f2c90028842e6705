"""Relative flatness of every layer against dense blocks, and its penalty against the exact one."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import images, small_net, trained_net
from oracles import block_gauss_newton, block_hessian, kappa_of_block, loss_in
from torch import nn

from flatreg.measures.estimate import Estimate
from flatreg.measures.layer_flatness import (
    combine_flatness,
    flatness_draws,
    gauss_newton_flatness,
    layer_flatness,
    relative_probe,
)
from flatreg.measures.parameters import LossInWeights, linear_layers
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.measures.weight_hessian import curvature_product
from flatreg.models.state import kept_buffers

LAYERS = {  # of `varied_net`: name -> (groups, transposed)
    "0": (1, False),
    "2": (2, False),
    "4": (4, False),
    "6": (2, True),
    "9": (1, False),
    "11": (1, False),
}


def varied_net(seed=0):
    """A plain, a grouped, a depthwise and a transposed grouped convolution, two linear layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.SiLU(),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=4),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.SiLU(),
        nn.Linear(5, 3),
    ).double()
    with torch.no_grad():  # as if trained: at its initial scale little curves below the head
        for p in model.parameters():
            p *= 2
    return model


def batch(n=6, size=10):
    x, y = images(n, size=size)
    return x.double(), y % 3


def within(estimate, exact, errors=4.0):
    return abs(estimate.value - float(exact)) <= errors * estimate.stderr


def all_probes(weight):
    """Every V = sqrt(n) W P D of a matrix, for the exact expectation."""
    n = weight.shape[1]
    for order in itertools.permutations(range(n)):
        for signs in itertools.product([1.0, -1.0], repeat=n):
            yield n**0.5 * weight[:, list(order)] * weight.new_tensor(signs)


def test_probe_has_the_second_moments_of_relative_flatness():
    """By enumeration: E[V_si V_tj] = <w_s, w_t> [i = j]."""
    weight = torch.randn(2, 3, dtype=torch.float64)
    probes = torch.stack(list(all_probes(weight)))
    moments = torch.einsum("dsi,dtj->sitj", probes, probes) / len(probes)
    expected = torch.einsum("st,ij->sitj", weight @ weight.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(moments, expected)


def test_probe_is_one_of_the_enumerated_ones():
    layer = nn.Linear(3, 2).double()
    (wanted,) = linear_layers(layer)
    drawn = relative_probe(wanted, torch.Generator().manual_seed(3))
    distance = [(drawn - v).abs().max() for v in all_probes(layer.weight.detach())]
    assert min(distance) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_probe_moments_of_groups(name):
    """Signs of different groups are independent; those within a group are shared."""
    layer = {la.name: la for la in linear_layers(varied_net())}[name]
    generator = torch.Generator().manual_seed(0)
    maps = layer.as_maps(layer.weight.detach())
    with torch.no_grad():
        draws = torch.stack([layer.as_maps(relative_probe(layer, generator)) for _ in range(800)])
    moments = torch.einsum("dgsi,dhtj->gsihtj", draws, draws) / len(draws)
    groups, _, n = maps.shape
    same = torch.eye(groups, dtype=maps.dtype)
    gram = torch.einsum("gsk,gtk->gst", maps, maps)
    expected = torch.einsum("gst,gh,ij->gsihtj", gram, same, torch.eye(n, dtype=maps.dtype))
    error = (moments - expected).abs().max()
    assert error < 6 * draws.square().amax() / len(draws) ** 0.5


def test_maps_and_weights_are_inverse():
    for layer in linear_layers(varied_net()):
        assert (layer.groups, layer.transposed) == LAYERS[layer.name]
        maps = layer.as_maps(layer.weight)
        assert maps.shape[0] == layer.groups
        torch.testing.assert_close(layer.as_weight(maps), layer.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_a_draw_is_the_dense_quadratic_form(name):
    """V^T H V and V^T G V of the layer's own block, with the probe that the seed makes."""
    model, (x, y) = varied_net(), batch()
    (layer,) = linear_layers(model, [name])
    v = relative_probe(layer, torch.Generator().manual_seed(5)).detach().flatten()
    blocks = {
        "hessian": block_hessian(model, x, y, layer.parameter),
        "gauss_newton": block_gauss_newton(model, x, layer.parameter).mean(0),
    }
    for curvature, block in blocks.items():
        draws = flatness_draws(model, x, y, layers=[name], num_probes=1, seed=5, matrix=curvature)
        torch.testing.assert_close(draws.kappa[0, 0], v @ block @ v, rtol=1e-9, atol=1e-14)
        assert draws.squared_norms[0] == pytest.approx(float(layer.weight.detach().square().sum()))


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_every_layer_equals_its_dense_block(curvature):
    """Shared kernels, groups, depthwise and transposed included; the sum with its own error."""
    model, (x, y) = varied_net(), batch()
    found = layer_flatness(model, x, y, num_probes=200, matrix=curvature)
    assert list(found.layers) == list(LAYERS)
    kappas, traces = [], []
    for name, layer in found.layers.items():
        if curvature == "hessian":
            block = block_hessian(model, x, y, f"{name}.weight")
        else:
            block = block_gauss_newton(model, x, f"{name}.weight").mean(0)
        weight = model.get_submodule(name).weight.detach()
        kappas.append(kappa_of_block(block, weight, *LAYERS[name]))
        traces.append(block.trace())
        assert within(layer.kappa, kappas[-1]) and within(layer.trace, traces[-1])
        assert within(layer.layerwise, traces[-1] * weight.square().sum())
        assert layer.kappa.n == 200 and layer.name == name
    assert within(found.kappa, sum(kappas)) and within(found.trace, sum(traces))
    assert found.kappa.stderr < 0.3 * abs(sum(kappas))


def test_head_equals_its_closed_form():
    model, x, y = trained_net(64)
    found = layer_flatness(model, x, y, layers=["8"], num_probes=200)
    with torch.no_grad():
        exact = relative_flatness(model[:8](x), model(x), model[8].weight).mean()
    assert within(found.layers["8"].kappa, exact)
    assert found.layers["8"].kappa.stderr < 0.2 * exact


def test_hessian_is_gauss_newton_on_the_head():
    model, x, y = trained_net(16)
    model = model.double()
    hessian, gauss_newton = (
        flatness_draws(model, x.double(), y, layers=["8"], num_probes=5, matrix=c)
        for c in ("hessian", "gauss_newton")
    )
    torch.testing.assert_close(hessian.kappa, gauss_newton.kappa)
    torch.testing.assert_close(hessian.trace, gauss_newton.trace)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "linear"])
def test_curvature_products_are_exact(loss):
    """H v of one layer against the dense block, and G v where the logits are affine in it."""
    model, (x, y) = varied_net(), batch()
    losses = {
        "cross_entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
        "squared": lambda z, y: (z - F.one_hot(y, 3)).square().sum(1),
        "linear": lambda z, y: z[:, 0],
    }
    at = LossInWeights.of(model, x, y, losses[loss], ["11"])
    v = torch.randn(3, 5, dtype=torch.float64)

    def mean(flat):
        return losses[loss](
            torch.func.functional_call(model, {"11.weight": flat.reshape(3, 5)}, (x,)), y
        ).mean()

    dense = torch.autograd.functional.hessian(mean, model[11].weight.detach().flatten())
    expected = (dense @ v.flatten()).reshape(3, 5)
    for curvature in ("hessian", "gauss_newton"):
        for method, tolerance in (("double_backward", 1e-12), ("finite_difference", 1e-3)):
            (product,) = curvature_product(at, curvature, method)([v])
            torch.testing.assert_close(product, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_finite_difference_agrees_with_double_backward(curvature):
    model, (x, y) = varied_net(), batch()
    exact, close = (
        flatness_draws(model, x, y, num_probes=4, matrix=curvature, method=method)
        for method in ("double_backward", "finite_difference")
    )
    scale = exact.kappa.abs().max()
    assert 0 < (exact.kappa - close.kappa).abs().max() < 5e-3 * scale


def test_finite_difference_does_without_second_derivatives():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Hardsigmoid(), nn.Linear(4, 5))
    x, y = images()
    with pytest.raises(ValueError, match=r"hessian needs derivatives of order 2.*hardsigmoid"):
        layer_flatness(model, x, y, num_probes=1)
    draws = flatness_draws(
        model, x, y, layers=["3"], num_probes=6, method="finite_difference"
    ).kappa
    exact = relative_flatness(model[:3](x), model(x), model[3].weight).mean()
    assert abs(draws.mean() - exact) < 4 * draws.std() / 6**0.5


def test_gauss_newton_sum_is_never_negative_where_the_hessian_is():
    model, (x, y) = varied_net(1), batch()
    gauss_newton = flatness_draws(model, x, y, num_probes=30, matrix="gauss_newton")
    assert (gauss_newton.kappa.sum(1) >= 0).all()
    hessian = flatness_draws(model, x, (y + 1) % 3, num_probes=30, layers=["0", "2"])
    assert (hessian.kappa.sum(1) < 0).any()


def test_batches_combine_to_the_whole():
    model, (x, y) = varied_net(), batch(9)
    parts = [
        flatness_draws(model, *part, num_probes=8) for part in ((x[:2], y[:2]), (x[2:], y[2:]))
    ]
    whole, combined = layer_flatness(model, x, y, num_probes=8), combine_flatness(parts)
    assert combined.kappa.value == pytest.approx(whole.kappa.value)
    assert combined.kappa.stderr == pytest.approx(whole.kappa.stderr)
    for name in LAYERS:
        assert combined.layers[name].trace.value == pytest.approx(whole.layers[name].trace.value)


def test_unequal_draws_do_not_combine():
    model, (x, y) = varied_net(), batch()
    few, many = (flatness_draws(model, x, y, num_probes=n) for n in (2, 3))
    with pytest.raises(ValueError, match="expected the same layers and number of probes"):
        combine_flatness([few, many])
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        combine_flatness([])


def test_seed_decides():
    model, (x, y) = varied_net(), batch()
    first, again, other = (layer_flatness(model, x, y, num_probes=2, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert isinstance(first.kappa, Estimate)


def test_model_is_left_untouched():
    """Modes, buffers, gradients, trainability and random streams; frozen layers count too."""
    model, (x, y) = small_net(dropout=0.5).train(), images()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = layer_flatness(model, x, y, num_probes=2)
    assert list(found.layers) == ["0", "3", "8"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[8].weight.grad is None


def test_tied_weights_are_one_layer():
    first = nn.Linear(4, 4).double()
    second = nn.Linear(4, 4).double()
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    assert [layer.name for layer in linear_layers(model)] == ["0"]
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 4
    found = layer_flatness(model, x, y, num_probes=300).layers["0"]

    def loss(flat):
        w = flat.reshape(4, 4)
        return F.cross_entropy(F.linear(torch.tanh(F.linear(x, w, first.bias)), w, second.bias), y)

    block = torch.autograd.functional.hessian(loss, first.weight.detach().flatten())
    assert within(found.kappa, kappa_of_block(block, first.weight))


def test_wrong_layers_are_named():
    model, (x, y) = varied_net(), batch()
    with pytest.raises(ValueError, match=r"layers: expected .* of Sequential, got \['1', 'head'\]"):
        layer_flatness(model, x, y, layers=["0", "1", "head"])
    with pytest.raises(ValueError, match="of ReLU, got none"):
        linear_layers(nn.ReLU())
    with pytest.raises(ValueError, match="num_probes: expected a whole number from 1, got 0"):
        layer_flatness(model, x, y, num_probes=0)
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'gauss_newton', got 'kfac'"):
        layer_flatness(model, x, y, matrix="kfac")
    for measured in (layer_flatness, partial(gauss_newton_flatness, logits=model(x))):
        given = (model, x, y) if measured is layer_flatness else (model, x)
        with pytest.raises(ValueError, match="method must be 'finite_difference' or"):
            measured(*given, method="forward")


# The penalty.


def penalty(model, x, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return gauss_newton_flatness(model, x, model(x), generator=generator, **options)


def flat_gradient(value, model):
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, params, materialize_grads=True)]
    )


def test_penalty_is_unbiased_per_sample():
    model, (x, _) = varied_net(), batch()
    draws = torch.stack(
        [penalty(model, x, seed, method="double_backward").detach() for seed in range(150)]
    )
    exact = sum(
        kappa_of_block(
            block_gauss_newton(model, x, f"{name}.weight"),
            model.get_submodule(name).weight,
            *LAYERS[name],
        )
        for name in LAYERS
    )
    assert draws.shape == (150, len(x)) and (draws >= 0).all()
    assert ((draws.mean(0) - exact).abs() <= 4 * draws.std(0) / 150**0.5).all()


def test_penalty_is_the_draw_of_the_measure():
    """The same probe: the mean over samples is the sum over layers of the measure's draw."""
    model, (x, y) = varied_net(), batch()
    draws = flatness_draws(model, x, y, num_probes=1, matrix="gauss_newton", seed=7)
    value = penalty(model, x, seed=7, method="double_backward").mean()
    torch.testing.assert_close(draws.kappa.sum(), value.detach())


def test_penalty_per_fan_in_divides_each_layer_by_its_inputs():
    model, (x, _) = varied_net(), batch()
    for method in ("double_backward", "finite_difference"):
        for name, n in (("2", 8), ("6", 8), ("9", 6), ("11", 5)):
            options = {"layers": linear_layers(model, [name]), "method": method}
            whole = penalty(model, x, **options)
            divided = penalty(model, x, per_fan_in=True, **options)
            torch.testing.assert_close(divided, whole / n)


def test_penalty_on_the_head_is_its_closed_form():
    """Where the logits are affine the finite difference is exact at any step."""
    model, x, _ = trained_net(32)
    layers = linear_layers(model, ["8"])
    draws = torch.stack(
        [penalty(model, x, s, layers=layers, step=0.5).detach() for s in range(225)]
    )
    exact = relative_flatness(model[:8](x), model(x), model[8].weight).detach()
    deviation = (draws.mean(0) - exact).abs() / (draws.std(0) / 15)
    assert deviation.mean() < 1.5 and deviation.max() < 5


@pytest.mark.parametrize("central", [False, True])
def test_penalty_by_differences_converges(central):
    """With its gradient, at first order in the step, or second if central."""
    model, (x, _) = varied_net(), batch()
    exact = penalty(model, x, method="double_backward")
    gradient = flat_gradient(exact.mean(), model)
    errors, turns = [], []
    for step in (1e-2, 1e-3):
        close = penalty(model, x, step=step, central=central)
        errors.append(float((close - exact).detach().norm() / exact.detach().norm()))
        turns.append(
            float((flat_gradient(close.mean(), model) - gradient).norm() / gradient.norm())
        )
    rate = 100 if central else 10
    for error in (errors, turns):
        assert error[0] < 0.1 and error[1] == pytest.approx(error[0] / rate, rel=0.3)


def test_penalty_gradient_is_that_of_its_value():
    """By finite differences in float64, V(W), J and p included."""
    model, (x, _) = varied_net(), batch()
    value = penalty(model, x, method="double_backward").mean()
    gradient = flat_gradient(value, model)
    direction = [torch.randn_like(p) for p in model.parameters()]

    def moved(h):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += h * d
        found = float(penalty(model, x, method="double_backward").mean().detach())
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= h * d
        return found

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    along = float(gradient @ torch.cat([d.flatten() for d in direction]))
    assert slope == pytest.approx(along, rel=1e-5)


def test_a_step_down_lowers_it_as_its_gradient_says():
    model, x, _ = trained_net(32)
    before = torch.stack([penalty(model, x, s).mean() for s in range(8)]).mean()
    gradient = torch.autograd.grad(before, list(model.parameters()))
    size = torch.stack([g.norm() for g in gradient]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradient, strict=True):
            p -= 1e-3 * g / size
        after = torch.stack([penalty(model, x, s).mean() for s in range(8)]).mean()
    assert float((before - after).detach()) == pytest.approx(1e-3 * float(size), rel=0.2)


def test_penalty_moves_no_statistics_and_sees_batch_statistics():
    model, (x, _) = small_net().train(), images()
    with kept_buffers(model):
        logits = model(x)
    buffers = [b.clone() for b in model.buffers()]
    generator = torch.Generator().manual_seed(0)
    value = gauss_newton_flatness(model, x, logits, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.isfinite(flat_gradient(value.mean(), model)).all()
    with pytest.raises(ValueError, match="derivatives of order 3"):
        gauss_newton_flatness(model, x, logits, method="double_backward")


def test_dropout_needs_both_passes_under_one_mask():
    model, (x, _) = small_net(batch_norm=False, dropout=0.5).train().double(), images()
    with pytest.raises(ValueError, match="draws random numbers in each"):
        penalty(model, x.double())
    torch.manual_seed(0)
    logits = model(x.double())
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    close = gauss_newton_flatness(model, x.double(), logits, generator=generator, central=True)
    generator = torch.Generator().manual_seed(0)
    exact = gauss_newton_flatness(
        model, x.double(), logits, generator=generator, method="double_backward"
    )
    torch.testing.assert_close(close, exact, rtol=1e-2, atol=1e-3)


def test_autocast_at_a_larger_step():
    model, x, _ = trained_net(64)
    exact = torch.stack([penalty(model, x, s, method="double_backward").mean() for s in range(6)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        found = [penalty(model, x, s, central=True) for s in range(6)]
    assert found[0].dtype == torch.float32
    ratio = torch.stack([f.mean() for f in found]) / exact
    assert (ratio - 1).abs().max() < 0.1


def test_compiled_model_takes_the_finite_difference_only():
    model, x, _ = trained_net(16)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(penalty(compiled, x), penalty(model, x), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="compile has no second derivative"):
        penalty(compiled, x, method="double_backward")


def test_frozen_layers_are_no_part_of_the_penalty():
    model, (x, _) = varied_net(), batch()
    for layer in linear_layers(model, ["0", "2", "4", "6", "9"]):
        layer.weight.requires_grad_(False)
    trained = penalty(model, x)
    torch.testing.assert_close(trained, penalty(model, x, layers=linear_layers(model, ["11"])))
    model[11].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="expected one that is trained, got 6 frozen ones"):
        penalty(model, x)


def test_gauss_newton_oracle_is_the_hessian_on_the_head():
    """The oracles agree with each other where they must."""
    model, (x, y) = varied_net(), batch()
    dense = block_hessian(model, x, y, "11.weight")
    torch.testing.assert_close(dense, block_gauss_newton(model, x, "11.weight").mean(0))
    flat = model[11].weight.detach().flatten()
    torch.testing.assert_close(
        loss_in(model, x, y, "11.weight")(flat), F.cross_entropy(model(x), y)
    )
