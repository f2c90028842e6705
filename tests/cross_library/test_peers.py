"""Against pytorch_optimizer: the same steps where definitions agree, its defects where it has some.

Assertions under `# Peer:` state what pytorch_optimizer 4.1 does. One that fails says that the peer
has changed, not that flatreg is wrong.
"""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import images, small_net
from oracles import two_pass_sam_step
from torch import nn

import flatreg
from flatreg import optimizers
from flatreg.optimizers.parameter_state import OURS

peers = pytest.importorskip("pytorch_optimizer", reason="needs the bench extra")

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
}
RHO = 0.1


def net():
    return small_net(batch_norm=False, dtype=torch.float64)


def batch(seed=0):
    x, y = images(seed=seed)
    return x.double(), y


def loss_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a, b):
    return float((flat(a) - flat(b)).abs().max())


def plain(model, base="sgd"):
    kind, settings = BASES[base]
    return kind(model.parameters(), **settings)


def wrapped(model, method, base="sgd", **options):
    return getattr(optimizers, method)(plain(model, base), **options)


def take_steps(model, optimizer, steps):
    """`steps` is a range, whose numbers are the seeds of the batches."""
    for step in steps:
        flatreg.backward(optimizer, loss_of(model, *batch(step)), model=model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def ours(model, method, base="sgd", steps=5, **options):
    return take_steps(model, wrapped(model, method, base, **options), range(steps))


def torch_closure(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def their(model, method, base="sgd", **options):
    kind, settings = BASES[base]
    of_model = (model,) if method == "WSAM" else ()
    return getattr(peers, method)(*of_model, model.parameters(), kind, **options, **settings)


def theirs(model, method, base="sgd", steps=5, **options):
    """Train with the peer as its docstrings say: a backward pass, then step(closure)."""
    peer = their(model, method, base, **options)
    for step in range(steps):
        closure = torch_closure(peer, model, *batch(step))
        if method != "WSAM":  # which makes the first pass itself
            closure()
        peer.step(closure)
    return model


def their_gsam(model, base="sgd", steps=5, *, rho, alpha):
    """The peer's radius follows a learning rate; both its ends are `rho` here."""
    optimizer = plain(model, base)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    radius = peers.ProportionScheduler(constant, max_lr=1.0, max_value=rho, min_value=rho)
    peer = peers.GSAM(model.parameters(), optimizer, model, radius, alpha=alpha)
    for step in range(steps):
        peer.set_closure(F.cross_entropy, *batch(step))
        peer.step()
    return model, peer


# Our method and its options, the peer's and its options.
PAIRS = {
    "SAM": ("SAM", {"rho": RHO}, "SAM", {"rho": RHO}),
    # The peer's adaptive norm runs over |w| g, which is T g without eta.
    "ASAM": ("ASAM", {"rho": RHO, "eta": 0.0}, "SAM", {"rho": RHO, "adaptive": True}),
    "WSAM": (
        "WSAM",
        {"rho": RHO, "gamma": 0.8},
        "WSAM",
        {"rho": RHO, "gamma": 0.8, "decouple": False},
    ),
    # Both are a straight mixture; the peer has no penalty of its own: alpha = gamma/(1 - gamma).
    "GNP": (
        "GNP",
        {"rho": RHO, "alpha": 0.25},
        "WSAM",
        {"rho": RHO, "gamma": 0.2, "decouple": False},
    ),
    "FriendlySAM": (
        "FriendlySAM",
        {"rho": RHO, "sigma": 0.9, "decay": 0.7},
        "FriendlySAM",
        {"rho": RHO, "sigma": 0.9, "lmbda": 0.7},
    ),
    "GSAM": ("GSAM", {"rho": RHO, "alpha": 0.4}, "GSAM", {"rho": RHO, "alpha": 0.4}),
}


def norm_in_float64(param_groups, device=None, *, weight_adaptive=False):
    """The peer's `get_global_gradient_norm`, which is squared, less its cast to float32."""
    return (
        torch.stack(
            [
                (p.grad * p.abs() if weight_adaptive and group.get("adaptive") else p.grad)
                .square()
                .sum()
                for group in param_groups
                for p in group["params"]
                if p.grad is not None
            ]
        )
        .sum()
        .reshape(1)
    )


def pair(name, base):
    method, options, peer, peer_options = PAIRS[name]
    if peer == "GSAM":
        return ours(net(), method, base, **options), their_gsam(net(), base, **peer_options)[0]
    return ours(net(), method, base, **options), theirs(net(), peer, base, **peer_options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PAIRS)
def test_five_steps_equal_the_peers(name, base, monkeypatch):
    """To the float32 of the peer's norm; without that cast to its 1e-12 beside the norm."""
    one, two = pair(name, base)
    assert distance(one, two) < 1e-8
    monkeypatch.setattr("pytorch_optimizer.optimizer.sam.get_global_gradient_norm", norm_in_float64)
    assert distance(*pair(name, base)) < 1e-12


@pytest.mark.parametrize("base", BASES)
def test_the_methods_compared_differ_from_one_another(base):
    """So that equality with a peer says which method it is."""
    models = [take_steps(model := net(), plain(model, base), range(5))]
    models += [ours(net(), method, base, **options) for method, options, _, _ in PAIRS.values()]
    assert min(distance(a, b) for a, b in itertools.combinations(models, 2)) > 1e-4


@pytest.mark.parametrize("base", BASES)
def test_looksam_equals_the_peers_on_one_tensor(base):
    """Up to 1e-8 that the peer adds to the length of the direction it reuses."""

    def one_tensor():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 5, bias=False)).double()

    one = ours(one_tensor(), "LookSAM", base, steps=7, rho=0.5, alpha=0.7, every=3)
    two = theirs(one_tensor(), "LookSAM", base, steps=7, rho=0.5, alpha=0.7, k=3)
    assert distance(one, two) < 2e-8
    without_reuse = ours(one_tensor(), "SAM", base, steps=7, rho=0.5, every=3)
    assert distance(one, without_reuse) > 1e-2


def test_looksam_differs_from_the_peers_on_several_tensors():
    """The peer projects and normalises tensor by tensor; the paper, and flatreg, the whole vector.

    The step that perturbs is the same, those that reuse its direction are not.
    """
    steps = {
        n: (
            ours(net(), "LookSAM", steps=n, rho=0.5, alpha=0.7, every=3),
            theirs(net(), "LookSAM", steps=n, rho=0.5, alpha=0.7, k=3),
        )
        for n in (1, 2)
    }
    assert distance(*steps[1]) < 1e-8
    assert distance(*steps[2]) > 1e-3


def test_step_with_a_closure_perturbs_without_a_backward_pass_before_it():
    """The convention of torch.optim: zero_grad, then step(closure), which evaluates."""
    one, two, three, four = net(), net(), net(), net()
    sam, peer, base = wrapped(one, "SAM", rho=RHO), their(two, "SAM", rho=RHO), plain(three)
    reference = plain(four)
    for step in range(3):
        x, y = batch(step)
        for model, optimizer in ((one, sam), (two, peer), (three, base)):
            optimizer.zero_grad()
            optimizer.step(torch_closure(optimizer, model, x, y))
        two_pass_sam_step(four, reference, RHO, loss_of(four, x, y))
    assert distance(one, four) < 1e-12
    assert distance(one, three) > 1e-3
    # Peer: there is no gradient to perturb along, so this is plain SGD, and nothing says so.
    assert torch.equal(flat(two), flat(three))


def test_a_group_added_to_the_wrapper_is_trained():
    added = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(3)]
    one, two, three = net(), net(), net()
    sam, peer, reference = wrapped(one, "SAM", rho=RHO), their(two, "SAM", rho=RHO), plain(three)
    for optimizer, parameter in zip((sam, peer, reference), added, strict=True):
        optimizer.add_param_group({"params": [parameter], "lr": 0.01})

    x, y = batch()
    flatreg.backward(sam, lambda: F.cross_entropy(one(x) * added[0], y), model=one)
    sam.step()
    three.added = added[2]  # where the oracle finds it
    two_pass_sam_step(three, reference, RHO, lambda: F.cross_entropy(three[:](x) * added[2], y))
    assert torch.allclose(added[0], added[2], rtol=0, atol=1e-12)
    assert not torch.equal(added[0], torch.ones_like(added[0]))

    def closure():
        peer.zero_grad()
        F.cross_entropy(two(x) * added[1], y).backward()

    closure()
    # Peer: the group lacks what the base optimizer's own defaults would have filled in.
    with pytest.raises(KeyError):
        peer.step(closure)


class Skipping(nn.Module):
    """Two branches, the second of which only every other forward takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(256, 5).double(), nn.Linear(256, 5).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x.flatten(1)
        return self.always(x) + self.sometimes(x) if self.calls % 2 else self.always(x)


def test_a_parameter_that_the_second_pass_does_not_reach():
    """It comes back; its gradient there is zero, so a mixture steps on (1 - c) g."""
    x, y = batch()
    seen, model = [], Skipping()
    start = model.sometimes.weight.detach().clone()
    model.register_forward_hook(lambda m, *_: seen.append(m.sometimes.weight.detach().clone()))
    sam = wrapped(model, "SAM", rho=RHO)
    flatreg.backward(sam, loss_of(model, x, y), model=model)
    sam.step()
    assert not torch.equal(seen[1], start)
    assert torch.equal(model.sometimes.weight, start) and model.sometimes.weight.grad is None

    one, two, three = Skipping(), Skipping(), Skipping()
    flatreg.backward(wrapped(one, "WSAM", rho=RHO, gamma=0.2), loss_of(one, x, y), model=one)
    loss_of(two, x, y)().backward()
    expected = 0.75 * two.sometimes.weight.grad  # c = 0.2 / 0.8
    assert torch.allclose(one.sometimes.weight.grad, expected, rtol=0, atol=1e-12)
    peer = their(three, "WSAM", rho=RHO, gamma=0.2, decouple=False)
    peer.step(torch_closure(peer, three, x, y))
    # Peer: the gradient of the first pass is dropped; what is left is the rounding of w + e - e.
    assert torch.allclose(three.sometimes.weight, start, rtol=0, atol=1e-12)


def test_a_closure_handed_to_a_grad_scaler_is_refused():
    x, y = batch()
    one, two, three = net(), net(), net()
    sam, peer = wrapped(one, "SAM", rho=RHO), their(two, "SAM", rho=RHO)

    def take_step(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def closure():
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()

        closure()
        scaler.step(optimizer, closure)

    start = flat(one)
    with pytest.raises(RuntimeError, match=r"flatreg\.backward"):
        take_step(one, sam)
    assert torch.equal(flat(one), start)
    take_step(two, peer)
    moved = float((flat(two) - start).norm())
    proper = float((flat(ours(three, "SAM", steps=1, rho=RHO)) - start).norm())
    # Peer: the step is taken on the gradient of the second pass, which nobody unscaled.
    assert moved > 500 * proper


@pytest.mark.parametrize("by_step", [True, False], ids=["step(closure)", "backward"])
def test_a_second_pass_that_raises_leaves_the_weights_alone(by_step):
    x, y = batch()
    one, two = net(), net()
    sam, peer = wrapped(one, "SAM", rho=RHO), their(two, "SAM", rho=RHO)
    start, calls = flat(one), []

    def failing(model, backward):
        loss = F.cross_entropy(model(x), y)
        calls.append(model)
        if calls.count(model) == 2:
            raise KeyError("boom")
        if backward:
            loss.backward()
        return loss

    with pytest.raises(KeyError, match="boom"):
        if by_step:
            sam.step(lambda: failing(one, backward=True))
        else:
            flatreg.backward(sam, lambda: failing(one, backward=False), model=one)
    assert torch.equal(flat(one), start) and len(calls) == 2
    failing(two, backward=True)
    with pytest.raises(KeyError, match="boom"):
        peer.step(lambda: failing(two, backward=True))
    # Peer: the weights stay at w + e.
    assert float((flat(two) - start).norm()) == pytest.approx(RHO, rel=1e-5)


@pytest.mark.parametrize("method", ["SAM", "GSAM", "WSAM"])
def test_checkpoints_hold_nothing_beside_the_base_optimizers_state_and_four_numbers(method):
    one, two = net(), net()
    sam, base = wrapped(one, method, "adamw", rho=RHO), plain(two, "adamw")
    for model, optimizer in ((one, sam), (two, base)):
        take_steps(model, optimizer, range(2))
    ours, plains = sam.state_dict(), base.state_dict()
    assert ours.keys() == plains.keys()
    assert [set(s) for s in ours["state"].values()] == [set(s) for s in plains["state"].values()]
    assert [g.keys() - set(OURS) for g in ours["param_groups"]] == [
        g.keys() for g in plains["param_groups"]
    ]
    if method == "GSAM":
        _, peer = their_gsam(net(), steps=2, rho=RHO, alpha=0.4)
        # Peer: the first pass's gradient stays, a copy of the model in every checkpoint.
        assert all("old_g" in state for state in peer.state_dict()["state"].values())


@pytest.mark.parametrize("method", ["SAM", "GSAM", "LookSAM", "FriendlySAM"])
def test_resuming_adamw_is_bit_exact(method):
    options = {"rho": RHO} | ({"every": 3} if method == "LookSAM" else {})
    straight = ours(net(), method, "adamw", steps=7, **options)
    first, file = net(), io.BytesIO()
    sam = wrapped(first, method, "adamw", **options)
    take_steps(first, sam, range(4))
    torch.save({"model": first.state_dict(), "optimizer": sam.state_dict()}, file)
    file.seek(0)
    saved, second = torch.load(file, weights_only=True), small_net(seed=1, batch_norm=False)
    second.double().load_state_dict(saved["model"])
    resumed = wrapped(second, method, "adamw", **options)
    resumed.load_state_dict(saved["optimizer"])
    take_steps(second, resumed, range(4, 7))
    assert torch.equal(flat(second), flat(straight))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", "WSAM"])
def test_accumulation_at_rho_zero_is_plain_accumulation(method, base):
    one, two, three, four = net(), net(), net(), net()
    sam, reference = wrapped(one, method, base, rho=0.0), plain(two, base)
    for step in range(0, 6, 2):
        for part in (step, step + 1):
            flatreg.backward(sam, loss_of(one, *batch(part)), model=one)
            loss_of(two, *batch(part))().backward()
        for optimizer in (sam, reference):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(flat(one), flat(two))
    if method == "SAM":
        peer, last = their(three, "SAM", base, rho=0.0), plain(four, base)
        for part in (0, 1):
            loss_of(three, *batch(part))().backward()
        peer.step(torch_closure(peer, three, *batch(1)))
        take_steps(four, last, [1])
        # Peer: what was accumulated is thrown away, the step is the last micro-batch's.
        assert torch.equal(flat(three), flat(four))
