"""MomentumSAM and StaleSAM: one gradient a step, at weights moved by what the last step left."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from by_hand import unit
from cases import images, small_net
from oracles import flat_gradient, flat_weights
from timm.optim import create_optimizer_v2
from torch.distributed.optim import ZeroRedundancyOptimizer

from flatreg import SAM, MomentumSAM, Objective, RandomSAM, SharpnessAware, StaleSAM, backward
from flatreg.optimizers import Momentum, SurrogateGap

X, Y = images()
RHO = 0.3
METHODS = {"MomentumSAM": MomentumSAM, "StaleSAM": StaleSAM}
both = pytest.mark.parametrize("method", METHODS)
# The entry of the state that each of these keeps; those of timm by its name.
KEPT = {
    "sgd": "momentum_buffer",
    "nesterov": "momentum_buffer",
    "adam": "exp_avg",
    "adamw": "exp_avg",
    "nadamw": "exp_avg",
    "lion": "exp_avg",
    "lamb": "exp_avg",
    "adopt": "exp_avg",
    "lars": "momentum_buffer",
    "rmsproptf": "momentum_buffer",
    "sgdp": "momentum",
}
WITHOUT = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=0.1),
}


def net_and(wrap, base=None, **options):
    net = small_net(batch_norm=False, dtype=torch.float64)
    base = base or partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return net, wrap(base(net.parameters()), **({"rho": RHO} | options))


def loss_at(net, seen=None):
    def closure():
        if seen is not None:
            seen.append(flat_weights(net))
        return F.cross_entropy(net(X.double()), Y)

    return closure


def step(net, optimizer, seen=None):
    backward(optimizer, loss_at(net, seen), model=net)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", KEPT)
def test_the_gradient_is_taken_against_the_momentum_that_the_base_keeps(name):
    """w - rho v/||v||, once a step; between two steps, and for evaluation, the weights are w."""
    net = small_net(batch_norm=False, dtype=torch.float64)
    base = create_optimizer_v2(net, opt=name, lr=1e-2, momentum=0.9)
    optimizer, seen = MomentumSAM(base, rho=RHO), []
    for count in range(4):
        seen.clear()
        w = flat_weights(net)
        backward(optimizer, loss_at(net, seen), model=net)
        assert torch.equal(flat_weights(net), w) and len(seen) == 1
        e = 0 * w
        if count:
            v = torch.cat([base.state[p][KEPT[name]].flatten() for p in net.parameters()])
            e = -RHO * unit(v) if v.any() else 0 * w  # that of ADOPT starts a step later
        torch.testing.assert_close(seen[0], w + e, rtol=1e-12, atol=1e-12)
        expected = flat_gradient(net, lambda m: F.cross_entropy(m(X.double()), Y), e)
        got = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", WITHOUT)
def test_a_base_without_momentum_is_refused_in_a_line(name):
    """Where its settings say so at once, otherwise at its first step; also by its rule."""
    wraps = [MomentumSAM, lambda base, rho: SharpnessAware(base, rho=rho, ascent=Momentum())]
    for wrap in wraps:
        with pytest.raises(ValueError, match="a momentum of each weight in its state") as error:
            step(*net_and(wrap, WITHOUT[name]))
        assert "\n" not in str(error.value)
    net = small_net(batch_norm=False, dtype=torch.float64)
    groups = [{"params": net[:4].parameters(), "momentum": 0.0, "sam_rho": 0.0}]
    groups += [{"params": net[8].parameters(), "momentum": 0.9}]
    optimizer, seen = MomentumSAM(torch.optim.SGD(groups, lr=0.1), rho=RHO), []
    step(net, optimizer)
    w = flat_weights(net)
    step(net, optimizer, seen)
    head = sum(p.numel() for p in net[8].parameters())
    moved = (seen[0] - w).abs() > 0
    assert moved[-head:].all() and not moved[:-head].any()


def test_a_group_of_another_momentum_that_came_later_is_refused():
    _, optimizer = net_and(MomentumSAM)
    optimizer.gradients_are_ready = True
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "momentum": 0.0})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="a momentum of each weight in its state"):
        optimizer.step()


@both
def test_every_way_takes_one_pass_and_dropout_goes_on(method):
    """`backward`, `step(closure)` and `perturbed()` without a pass before it."""
    ends = {}
    for way in ("backward", "closure", "perturbed"):
        net = small_net(batch_norm=False, dropout=0.5, dtype=torch.float64).train()
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer, masks = METHODS[method](base, rho=RHO), []
        net[7].register_forward_hook(lambda _, args, out, m=masks: m.append((out != 0).clone()))
        torch.manual_seed(0)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X.double()), Y)
            loss.backward()
            return loss

        for _ in range(4):
            if way == "closure":
                optimizer.step(closure)
            else:
                if way == "backward":
                    backward(optimizer, loss_at(net), model=net)
                else:
                    with optimizer.perturbed():
                        F.cross_entropy(net(X.double()), Y).backward()
                optimizer.step()
            optimizer.zero_grad()
        assert len(masks) == 4 and not torch.equal(masks[1], masks[2])
        ends[way] = flat_weights(net)
    assert all(torch.equal(end, ends["backward"]) for end in ends.values())


@both
def test_a_rule_that_combines_takes_both_passes(method):
    rule = MomentumSAM if method == "MomentumSAM" else StaleSAM
    net, optimizer = net_and(rule)
    optimizer.gradient, seen = SurrogateGap(alpha=0.3), []
    step(net, optimizer)
    w = flat_weights(net)
    step(net, optimizer, seen)
    assert len(seen) == 2 and torch.equal(seen[0], w) and not torch.equal(seen[1], w)


@both
def test_an_overflow_is_no_direction(method):
    """fp16 under a GradScaler: its skipped steps leave the direction, and the scale is no part."""
    seen = {}
    for scaled in (False, True):
        net, optimizer = net_and(METHODS[method])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        objective, seen[scaled] = Objective(net).bind(X.double(), Y), []
        for count in range(5):
            if scaled and count == 2:
                broken = lambda o=objective: o().total * torch.inf  # noqa: E731
                backward(optimizer, broken, model=net, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            backward(optimizer, loss_at(net, seen[scaled]), model=net, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    torch.testing.assert_close(seen[True], seen[False], rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_not_finite_and_was_stepped_on_is_not_kept():
    """As where a fused optimizer skips by itself; the direction is that of the step before."""
    net, optimizer = net_and(StaleSAM)
    step(net, optimizer)
    kept = [s.memory["last_gradient"].clone() for s in optimizer.parameter_states()]
    for value in (torch.inf, torch.nan):
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.gradients_are_ready = True
        optimizer.step()
        now = [s.memory["last_gradient"] for s in optimizer.parameter_states()]
        assert all(map(torch.equal, now, kept))


@both
def test_a_weight_that_the_last_step_did_not_reach_stays(method):
    """The rest of an older gradient is no part of the last one, and an old momentum moved nothing.

    The same after a checkpoint; a weight that is reached again moves again.
    """
    net, optimizer = net_and(METHODS[method])
    step(net, optimizer)
    features = net[:8](X.double()).detach()
    backward(optimizer, lambda: F.cross_entropy(net[8](features), Y), model=net)
    head = [p.grad.clone().flatten() for p in net[8].parameters()]
    for p in net[:8].parameters():
        p.grad = None
    optimizer.step()
    optimizer.zero_grad()
    if method == "MomentumSAM":
        head = [-optimizer.state[p]["momentum_buffer"].flatten() for p in net[8].parameters()]
    other, resumed = net_and(METHODS[method])
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, stepping in ((net, optimizer), (other, resumed)):
        w, seen = flat_weights(module), []
        step(module, stepping, seen)
        v = torch.cat([torch.zeros(len(w) - sum(map(len, head)), dtype=w.dtype), *head])
        torch.testing.assert_close(seen[0], w + RHO * unit(v), rtol=1e-9, atol=1e-12)
        w = flat_weights(module)
        step(module, stepping, seen)
        assert bool(((seen[1] - w) != 0).all())


def test_a_base_whose_state_lies_elsewhere_is_refused():
    """Each process of a ZeroRedundancyOptimizer has the momentum of a share."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        net = small_net(batch_norm=False, dtype=torch.float64)
        base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match="a momentum of each weight in its state"):
            step(net, MomentumSAM(base, rho=RHO))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", [*METHODS.values(), RandomSAM, SAM])
@pytest.mark.parametrize("added_to", [False, True])
def test_a_second_perturbed_in_one_step_is_refused(method, added_to):
    """It would take what the first made for a direction, and the first half would be lost."""
    net, optimizer = net_and(method)
    for way in (True, False, None):  # how gradients are cleared, or that a step was taken
        for _ in range(2):
            loss_at(net)().backward()
            with optimizer.perturbed():
                loss_at(net)().backward()
            if way is None:
                optimizer.step()
            else:
                optimizer.zero_grad(set_to_none=way)
        optimizer.zero_grad()
    with optimizer.perturbed():
        loss_at(net)().backward()
    if added_to:
        loss_at(net)().backward()
    with pytest.raises(RuntimeError, match=r"accumulate with flatreg\.backward") as error:
        optimizer.perturbed().__enter__()
    assert "\n" not in str(error.value)
    optimizer.step()


@both
def test_gradients_of_zero_do_not_ask_for_a_replay(method):
    net = small_net(batch_norm=False, dropout=0.5, dtype=torch.float64).train()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = METHODS[method](base, rho=RHO)
    for _ in range(3):
        with optimizer.perturbed():
            loss_at(net)().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


class FirstBatchScale(torch.nn.Module):
    """ActNorm: the first batch sets its weight, and a buffer remembers that it did."""

    def __init__(self, features):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(features))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x):
        if not self.is_set:
            self.weight.data.copy_(1 / x.detach().std(0))
            self.is_set.fill_(True)
        return x * self.weight


@pytest.mark.parametrize("way", ["backward", "step", "perturbed"])
def test_a_weight_that_forward_sets_is_not_lost_in_silence(way):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 5), FirstBatchScale(5))
    net, before = net.double(), flat_weights(net.double())
    optimizer = RandomSAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=RHO)

    def step_closure():
        optimizer.zero_grad()
        loss = loss_at(net)()
        loss.backward()
        return loss

    def take():
        if way == "backward":
            backward(optimizer, loss_at(net), model=net)
        elif way == "step":
            optimizer.step(step_closure)
        else:
            with optimizer.perturbed():
                step_closure()

    with pytest.raises(
        RuntimeError, match=r"shape \(5,\) while it was perturbed.*before the first"
    ):
        take()
    assert torch.equal(flat_weights(net), before)
    net[-1].is_set.fill_(False)
    net(X.double())  # what the message says
    optimizer.zero_grad()
    take()
