"""Derivatives that torch leaves a part out of are found and refused; right ones are not."""

import pytest
import torch
from cases import images, small_net
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from flatreg import InputGradient, LayerFlatness, MarginBound, Objective, measure
from flatreg.measures import gauss_newton_flatness, hessian_trace_estimate
from flatreg.models.derivative_check import check_derivatives


class Detached(torch.autograd.Function):
    """x^3 / 3 with a backward that computes outside of the graph: its second derivative is 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.detach().square()
        return x**3 / 3

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def net(between=None, wrap=lambda layer: layer, width=8):
    torch.manual_seed(0)
    middle = [nn.Tanh() if between is None else between]
    return nn.Sequential(
        nn.Flatten(), wrap(nn.Linear(256, width)), *middle, nn.Linear(width, width), nn.Tanh()
    )


def check(model, order, of="weights"):
    check_derivatives(model, images()[0], order, of, what="this", alternative="that")


@pytest.mark.parametrize(
    ("model", "order", "of"),
    [
        (net(nn.LayerNorm(8)), 3, "weights"),
        (net(nn.LayerNorm(8)), 3, "inputs"),
        (net(nn.LayerNorm(8, elementwise_affine=False)), 3, "weights"),
        (net(wrap=parametrizations.weight_norm), 3, "weights"),
        (net(wrap=parametrizations.weight_norm), 2, "weights"),
        (net(Apply(Detached.apply)), 2, "weights"),
        (net(Apply(Detached.apply)), 3, "weights"),
        (net(Apply(Detached.apply)), 2, "inputs"),
        (net(Apply(Detached.apply)), 3, "inputs"),
    ],
)
def test_a_part_left_out_is_found(model, order, of):
    for _ in range(2):  # a refusal is no proof
        with pytest.raises(ValueError, match=f"order {order}, and autograd has a wrong .*that$"):
            check(model, order, of)


@pytest.mark.parametrize("of", ["inputs", "weights"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "model",
    [
        net(),
        net(nn.ReLU()),
        net(nn.GELU()),
        net(nn.Dropout(0.5)).train(),
        net(nn.GroupNorm(2, 8)),
        net(nn.RMSNorm(8)),
        net(nn.Softmax(1)),
        net(Apply(lambda x: x.float().tanh().to(x.dtype))),  # float32 within
        net(Apply(lambda x: x.float().tanh())),  # cannot run in float64
        net(Apply(lambda x: x.detach())),
        net(Apply(lambda x: x + (x.tanh() - x).detach())),  # straight through
        nn.Sequential(nn.Flatten(), nn.Linear(256, 3)),
        small_net().eval(),
    ],
)
def test_a_right_derivative_is_not_refused(model, order, of):
    check(model, order, of)


@pytest.mark.parametrize("seed", [20, 27, 29, 38])
def test_spectral_norm_that_has_nearly_converged_is_not_refused(seed):
    """It takes no gradient through its vectors, which is then hardly seen in the first one."""
    torch.manual_seed(seed)
    x = torch.rand(12, 1, 8, 8).double()
    layer = parametrizations.spectral_norm(nn.Linear(64, 8))
    model = nn.Sequential(nn.Flatten(), layer, nn.Tanh(), nn.Linear(8, 4)).double()
    check_derivatives(model, x, 2, "inputs", what="this", alternative="that")


@pytest.mark.parametrize("model", [net(nn.LayerNorm(8)), net(wrap=parametrizations.weight_norm)])
def test_their_second_derivatives_in_the_inputs_are_right(model):
    check(model, 2, "inputs")
    exact = InputGradient(eps=0.1, method="double_backward")
    assert Objective(model, None, [exact])(*images()).total.isfinite()


@pytest.mark.parametrize("between", [nn.BatchNorm1d(8), nn.Hardsigmoid()])
def test_a_missing_derivative_is_named(between):
    # Of some releases BatchNorm has a wrong derivative in place of none, which is refused too.
    words = r"this needs .*( lacks \(.*\): | has a wrong one on .*; )use that$"
    with pytest.raises(ValueError, match=words):
        check(net(between).train(), 3)


@pytest.mark.parametrize(
    "penalty",
    [
        LayerFlatness(method="double_backward"),
        MarginBound(eps=0.1, method="double_backward", subtract_curvature=True),
    ],
)
def test_penalties_of_third_order_are_refused_with_the_alternative(penalty):
    model = nn.Sequential(net(nn.LayerNorm(8)), nn.Linear(8, 5))
    with pytest.raises(ValueError, match="method='finite_difference'"):
        Objective(model, None, [penalty])(*images())
    with pytest.raises(ValueError, match='method="finite_difference"'):
        gauss_newton_flatness(model, images()[0], model(images()[0]), method="double_backward")


def test_the_hessian_of_a_wrong_operator_is_refused():
    model, (x, y) = net(Apply(Detached.apply)), images()
    with pytest.raises(ValueError, match="hessian needs derivatives of order 2"):
        hessian_trace_estimate(model, x, y, num_probes=2)
    hessian_trace_estimate(model, x, y, num_probes=2, method="finite_difference")


def test_a_card_leaves_out_a_curvature_that_is_wrong():
    model, (x, y) = net(Apply(Detached.apply)), images()
    card = measure(
        model, TensorDataset(x, y % 8), eps=0.1, parts=["curvature"], num_probes=2, progress=False
    )
    assert "the curvature needs derivatives of order 2" in card.refused["curvature"]


def test_the_model_stays_as_it_is():
    model = small_net(dropout=0.5).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    streams = torch.get_rng_state()
    check(model, 2)
    assert torch.equal(torch.get_rng_state(), streams) and model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_trained_later_is_checked_again():
    model = net(nn.LayerNorm(8))
    for layer in model[:3]:
        layer.requires_grad_(False)
    check(model, 3)  # only what lies behind LayerNorm is trained
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="order 3, and autograd has a wrong one"):
        check(model, 3)


def test_a_module_that_takes_the_place_of_another_is_checked_again():
    model = net()
    check(model, 2)
    model[2] = Apply(Detached.apply)
    with pytest.raises(ValueError, match="order 2, and autograd has a wrong one"):
        check(model, 2)


class Storing(nn.Module):
    """Keeps what it returns, with its graph, where no copy reaches it."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        self.kept["last"] = [x]
        return x


@pytest.mark.parametrize("between", [Storing(), Apply(lambda x: x.to(torch.float32))])
def test_a_model_that_is_hard_to_copy_is_checked_all_the_same(between):
    model = net(nn.LayerNorm(8))
    model.insert(0, between)
    model(images()[0])
    with pytest.raises(ValueError, match="order 3, and autograd has a wrong one"):
        check(model, 3)


def test_a_model_that_cannot_be_proven_is_refused():
    model = net()
    model.append(Apply(lambda x: x.reshape(-1, 4, 8).reshape(-1, 8)))  # batches of four
    with pytest.raises(ValueError, match=r"makes no pass of two samples .*: use that$"):
        check(model, 2)
