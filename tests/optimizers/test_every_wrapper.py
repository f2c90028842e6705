"""Every method through what every optimizer of torch is tested for: right, or refused by a line."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from by_hand import METHODS
from cases import images, small_net
from oracles import flat_weights
from torch import nn

from flatreg import RandomSAM, backward
from flatreg.optimizers import vector

EVERY = METHODS | {"RandomSAM": lambda base, net: RandomSAM(base, rho=0.1)}
SGD = partial(torch.optim.SGD, momentum=0.9)
FROM_THE_LAST_STEP = ("MomentumSAM", "StaleSAM")  # they have their direction from it
X, Y = images()
every = pytest.mark.parametrize("method", EVERY)


def make(method, base=SGD, dtype=torch.float64, **options):
    net = small_net(batch_norm=False, dtype=dtype)
    return net, EVERY[method](base(net.parameters(), **({"lr": 0.1} | options)), net)


def steps(net, optimizer, count=4, x=X):
    torch.manual_seed(0)
    x = x.to(list(net.parameters())[-1].dtype)
    for _ in range(count):
        backward(optimizer, lambda: F.cross_entropy(net(x), Y), model=net)
        optimizer.step()
        optimizer.zero_grad()
    return flat_weights(net)


@every
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW, torch.optim.Adadelta])
def test_foreach_and_not(method, base, monkeypatch):
    """Of the base, and of the perturbation, whose few large kernels run on accelerators."""
    if (method, base) == ("MomentumSAM", torch.optim.Adadelta):
        pytest.skip("has no momentum, which is refused")
    slow = steps(*make(method, base, foreach=False))
    fast = steps(*make(method, base, foreach=True))
    displace = vector.displace
    for module in ("flatreg.optimizers.ascent.displace", "flatreg.optimizers.vector.displace"):
        monkeypatch.setattr(
            module, lambda *args, foreach=None: displace(*args, foreach=True), raising=True
        )
    large = steps(*make(method, base, foreach=True))
    start = flat_weights(small_net(batch_norm=False, dtype=torch.float64))
    assert float((slow - start).norm()) > 1e-3
    for other in (fast, large):
        torch.testing.assert_close(other, slow, rtol=1e-9, atol=1e-12)


@every
def test_groups_are_one_vector(method):
    """However the parameters are cut into groups of equal settings, and in which order."""
    whole = steps(*make(method))
    net = small_net(batch_norm=False, dtype=torch.float64)
    parameters = list(net.parameters())
    groups = [{"params": [parameters[i] for i in part]} for part in ([3, 2], [5], [], [4, 0, 1])]
    optimizer = EVERY[method](SGD(groups, lr=0.1), net)
    if method != "RandomSAM":  # which draws in another order
        torch.testing.assert_close(steps(net, optimizer), whole, rtol=1e-9, atol=1e-12)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(parameters)


@every
def test_a_group_of_radius_zero_stays_and_is_scheduled(method):
    net, _ = make(method)
    x = X.double()
    groups = [
        {"params": list(net[:4].parameters()), "sam_rho": 0.0},
        {"params": list(net[8].parameters())},
    ]
    optimizer, seen = EVERY[method](SGD(groups, lr=0.1), net), []

    def closure():
        seen.append([p.detach().clone() for p in net.parameters()])
        return F.cross_entropy(net(x), Y)

    if method in FROM_THE_LAST_STEP:
        steps(net, optimizer, 1)
    start = [p.detach().clone() for p in net.parameters()]
    for step, radii in enumerate(((0.0, 0.2), (0.2, 0.0))):
        for group, rho in zip(optimizer.param_groups, radii, strict=True):
            group["sam_rho"] = rho
            group["sam_steps"], group["sam_peak_lr"] = {"spaced": 1}.get(method, 0), 1.0
        seen.clear()
        x = X.double() + step  # or nothing were left of it beside FriendlySAM's mean
        backward(optimizer, closure, model=net)
        moved = [not torch.equal(a, b) for a, b in zip(seen[-1], start, strict=True)]
        stays, goes = (moved[:4], moved[4:]) if radii[0] == 0 else (moved[4:], moved[:4])
        assert not any(stays) and (any(goes) or (method, step) == ("head", 1))
        assert torch.equal(flat_weights(net), torch.cat([p.flatten() for p in start]))


@every
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_copied_or_pickled_halfway_it_goes_on_the_same(method, base):
    net, optimizer = make(method, base)
    steps(net, optimizer, 3)
    both = {
        "deepcopy": copy.deepcopy((net, optimizer)),
        "pickle": pickle.loads(pickle.dumps((net, optimizer))),
    }
    expected = steps(net, optimizer)
    for how, (model, copied) in both.items():
        assert copied.param_groups is copied.base.param_groups, how
        assert copied.param_groups[0]["params"][0] is next(model.parameters()), how
        assert torch.equal(steps(model, copied), expected), how


@every
def test_hooks_of_every_kind_run_once(method):
    net, optimizer = make(method)
    ran = []

    def note(name):
        return lambda *_: ran.append(name)

    for owner, name in ((optimizer, "wrapper"), (optimizer.base, "base")):
        owner.register_step_pre_hook(note(f"{name} pre"))
        owner.register_step_post_hook(note(f"{name} post"))
    steps(net, optimizer, 1)
    assert ran == ["wrapper pre", "base pre", "base post", "wrapper post"]
    ran.clear()
    optimizer.register_state_dict_pre_hook(note("saves"))
    optimizer.register_state_dict_post_hook(note("saved"))
    optimizer.register_load_state_dict_pre_hook(note("loads"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert ran == ["saves", "saved", "loads", "loaded"]


@every
def test_what_a_hook_adds_to_a_checkpoint_is_in_it(method):
    net, optimizer = make(method)
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"note": 7})
    steps(net, optimizer, 1)
    saved = optimizer.state_dict()
    assert saved["note"] == 7
    optimizer.load_state_dict(saved)


@every
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_is_the_bases(method, to_none):
    net, optimizer = make(method)
    backward(optimizer, lambda: F.cross_entropy(net(X.double()), Y), model=net)
    optimizer.zero_grad(set_to_none=to_none)
    for p in net.parameters():
        assert p.grad is None if to_none else not p.grad.any()
    if not to_none:  # zeros that are kept are zeros that are added to
        copied = copy.deepcopy((net, optimizer))
        copied[1].zero_grad()
        assert torch.equal(steps(net, optimizer), steps(*copied))


@every
def test_repr_and_settings_are_readable(method):
    _, optimizer = make(method)
    text = repr(optimizer)
    assert text.startswith("SharpnessAware(rho=") and "base=SGD" in text and "sam_rho" in text


@every
def test_a_radius_or_learning_rate_may_be_a_tensor(method):
    net, optimizer = make(method)
    other, tensors = make(method, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)
    for group in tensors.param_groups:
        group["sam_rho"] = torch.tensor(group["sam_rho"], dtype=torch.float64)
    torch.testing.assert_close(steps(net, optimizer), steps(other, tensors), rtol=1e-9, atol=1e-12)


@every
def test_sparse_gradients_are_refused_and_nothing_moves(method):
    if method in ("head", "last blocks"):
        pytest.skip("these scopes lie elsewhere: the table of a sparse embedding is not perturbed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 5))
    optimizer = EVERY[method](SGD(net.parameters(), lr=0.1), net)
    if method == "spaced":
        optimizer.param_groups[0]["sam_steps"] = 1
    optimizer.param_groups[0]["sam_peak_lr"] = 1.0
    before, tokens = flat_weights(net), torch.randint(7, (8, 2))
    if method == "RandomSAM":  # reads no gradient
        backward(optimizer, lambda: F.cross_entropy(net(tokens), Y), model=net)
        return
    with pytest.raises(ValueError, match="need dense gradients, got sparse ones"):
        backward(optimizer, lambda: F.cross_entropy(net(tokens), Y), model=net)
        assert method in FROM_THE_LAST_STEP
        optimizer.step()
    assert torch.equal(flat_weights(net), before)


@every
def test_sparse_gradients_outside_the_scope_are_right_or_refused(method):
    """Rules that combine both gradients by element refuse them; others equal the dense ones."""
    if method in ("head", "last blocks"):
        pytest.skip("these have a scope of their own")
    tokens, found = torch.randint(7, (8, 2), generator=torch.Generator().manual_seed(0)), []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 5))
        optimizer = EVERY[method](SGD(net.parameters(), lr=0.1), net)
        for state in optimizer.parameter_states():
            state.in_scope = state.weight is not net[0].weight
        torch.manual_seed(1)
        try:
            for _ in range(3):
                backward(optimizer, lambda: F.cross_entropy(net(tokens), Y), model=net)  # noqa: B023
                optimizer.step()
                optimizer.zero_grad()
        except ValueError as error:
            assert sparse and "need dense gradients, got sparse ones: write" in str(error)
            return
        found.append(flat_weights(net))
    torch.testing.assert_close(*found)


class Complex(nn.Module):
    """A complex linear map, its modulus, a real one."""

    def __init__(self, as_real):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(6, 9, dtype=torch.complex128, generator=generator)
        self.as_real = as_real
        self.w = nn.Parameter(torch.view_as_real(w).clone() if as_real else w)
        self.b = nn.Parameter(torch.randn(5, 6, dtype=torch.float64, generator=generator))

    def forward(self, x):
        w = torch.view_as_complex(self.w) if self.as_real else self.w
        z = x.flatten(1)[:, :9].double().to(torch.complex128) @ w.T
        return z.abs().square() @ self.b.T


LINEAR_IN_C = ("ASAM", "RelativeSAM", "head", "last blocks")


@every
def test_a_complex_weight_is_its_real_and_imaginary_part(method):
    """The methods whose sets are balls of all numbers: as torch's own optimizers are tested."""
    if method in LINEAR_IN_C or method == "RandomSAM":
        pytest.skip("has a formula of its own for complex weights, or a scope elsewhere")
    ends = []
    for as_real in (False, True):
        net = Complex(as_real)
        optimizer = EVERY[method](SGD(net.parameters(), lr=0.01), net)
        steps(net, optimizer)
        w = net.w if as_real else torch.view_as_real(net.w)
        ends.append(torch.cat([w.detach().flatten(), net.b.detach().flatten()]))
    # A layer is a matrix for AWP: the same numbers, of three axes.
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["ASAM", "RelativeSAM"])
def test_rules_that_read_complex_weights_follow_their_formula(method):
    """T = |w| + eta of the modulus; W W^H G for W W^T G."""
    net = Complex(False)
    optimizer, seen = EVERY[method](SGD(net.parameters(), lr=0.1), net), []
    x = X.double()

    def closure():
        seen.append([net.w.detach().clone(), net.b.detach().clone()])
        return F.cross_entropy(net(x), Y)

    g = torch.autograd.grad(F.cross_entropy(net(x), Y), [net.w, net.b])
    backward(optimizer, closure, model=net)
    start, there = seen
    if method == "ASAM":
        t = [w.abs() + 0.01 for w in start]
        length = torch.cat([(a * v).abs().flatten() for a, v in zip(t, g, strict=True)]).norm()
        e = [0.3 * a**2 * v / length for a, v in zip(t, g, strict=True)]
    else:
        inside = [w.conj().T @ v for w, v in zip(start, g, strict=True)]
        length = torch.cat([m.abs().flatten() for m in inside]).norm()
        e = [0.1 * w @ m / length for w, m in zip(start, inside, strict=True)]
    for w, moved, expected in zip(start, there, e, strict=True):
        torch.testing.assert_close(moved - w, expected.to(w.dtype), rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_every_type_come_back_bit_for_bit(method, dtype):
    net, optimizer = make(method, dtype=dtype, lr=0.0)
    before = flat_weights(net)
    assert torch.equal(steps(net, optimizer), before)


@every
def test_one_parameter_no_gradient_and_an_empty_scope_of_gradients(method):
    """A step on which no pass reached any parameter leaves all as it is."""
    net, optimizer = make(method)
    leaf = torch.ones((), requires_grad=True)
    before = flat_weights(net)
    for _ in range(2):
        backward(optimizer, lambda: leaf.square(), model=net)
        if method == "RandomSAM":
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
    assert torch.equal(flat_weights(net), before) and leaf.grad == 4
