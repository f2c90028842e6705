"""Passes that are compared start at one place: streams, buffers, computed weights, compiled traces.

The right values are plain torch: loops that put the random streams and the buffers back by hand.
"""

import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import images, small_net
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import flatreg
from flatreg import (
    NFGSM,
    PGDAT,
    SAM,
    TRADES,
    InputGradient,
    MarginBound,
    Objective,
    OffManifoldConfidence,
    OffManifoldCurvature,
    RelativeFlatness,
    relative_flatness,
)
from flatreg.measures.weight_hessian import hessian_trace_estimate
from flatreg.models.pass_start import PassStart

SPECTRAL = {"parametrized": parametrizations.spectral_norm, "by a hook": nn.utils.spectral_norm}


class Counting(nn.Module):
    """Counts its passes, in place and by a new tensor, and lets the count into its output."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()).double())
        self.register_buffer("renewed", torch.zeros(()).double())

    def forward(self, x):
        self.passes += 1
        self.renewed = self.renewed + 1
        return x * (1 + 0.1 * self.passes + 0.01 * self.renewed)


class Stateful(nn.Module):
    """What a forward may move besides BatchNorm: spectral norm's vectors, counters, masks."""

    def __init__(self, spectral=parametrizations.spectral_norm, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, stride=2)
        self.inner = nn.Sequential(
            spectral(nn.Conv2d(4, 4, 3, stride=2)),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            Counting(),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(36, 5)
        self.checkpointed = checkpointed
        self.double().train()

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.head(x.flatten(1))


def batch():
    x, y = images()
    return x.double(), y


def from_start(model):
    """A function that passes from one state of the streams and of the buffers, by hand."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def logits_at(points):
        torch.manual_seed(5)
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].clone()
        return model(points)

    return logits_at


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def climb(loss, weights, rho):
    """Move weights by rho along the gradient of the loss, which is returned."""
    plain = torch.autograd.grad(loss, weights)
    length = torch.stack([g.norm() for g in plain]).norm()
    with torch.no_grad():
        for w, g in zip(weights, plain, strict=True):
            w.add_(rho * g / length)
    return plain


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("spectral", SPECTRAL)
def test_second_difference_of_a_model_with_state_is_that_by_hand(spectral, checkpointed):
    x, y = batch()
    model, once = (Stateful(SPECTRAL[spectral]) for _ in range(2))
    model.checkpointed = checkpointed
    by_hand = from_start(Stateful(SPECTRAL[spectral]))
    points = x.clone().requires_grad_()
    middle = F.cross_entropy(by_hand(points), y, reduction="none")
    step = 0.1 * torch.autograd.grad(middle.sum(), points)[0].sign()
    ahead, behind = (F.cross_entropy(by_hand(x + s), y, reduction="none") for s in (step, -step))
    expected = (ahead - 2 * middle + behind).abs().mean()

    torch.manual_seed(5)
    once(x)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    loss = Objective(model, None, [OffManifoldCurvature(eps=0.1)])(x, y)
    assert torch.equal(torch.get_rng_state(), drawn)
    loss.total.backward()
    torch.testing.assert_close(loss.parts["OffManifoldCurvature"], expected.detach())
    for name, buffer in once.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, Counting))


def test_checkpointing_changes_no_gradient_of_a_model_with_state():
    found = []
    for checkpointed in (False, True):
        model = Stateful(checkpointed=checkpointed)
        torch.manual_seed(5)
        penalties = [OffManifoldCurvature(eps=0.1), InputGradient(eps=0.1)]
        Objective(model, None, penalties)(*batch()).total.backward()
        found.append(gradients(model))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain)


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    model = Stateful(checkpointed=True)
    loss = Objective(model, None, [InputGradient(eps=0.1)])(*batch())
    buffers = [id(b) for b in model.buffers()]

    def fail(_):
        raise RuntimeError("out of memory")

    hook = model.stem.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.total.backward()
    hook.remove()
    assert [id(b) for b in model.buffers()] == buffers
    model(batch()[0])  # the hooks of that backward pass go with the next pass
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, Counting))
    assert int(model.inner[3].passes) == 2


@pytest.mark.parametrize("method", [flatreg.SAM, flatreg.GSAM, flatreg.FriendlySAM])
def test_the_second_pass_of_a_step_starts_where_the_first_did(method):
    x, y = batch()
    model, once = Stateful(), Stateful()
    by_hand = from_start(once)
    weights = list(once.parameters())
    plain = climb(F.cross_entropy(by_hand(x), y), weights, rho=0.05)
    wanted = torch.autograd.grad(F.cross_entropy(by_hand(x), y), weights)

    optimizer = method(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    torch.manual_seed(5)
    flatreg.backward(optimizer, lambda: F.cross_entropy(model(x), y), model=model)
    if method is flatreg.GSAM:
        along = sum((a * b).sum() for a, b in zip(plain, wanted, strict=True))
        along = along / sum(b.square().sum() for b in wanted)
        alpha = optimizer.gradient.alpha
        wanted = [b - alpha * (a - along * b) for a, b in zip(plain, wanted, strict=True)]
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert int(model.inner[3].passes) == 1


@pytest.mark.parametrize("attack", [NFGSM(eps=0.1), PGDAT(eps=0.1, steps=2, inner_mode="eval")])
def test_an_attack_moves_no_buffer(attack):
    model = Stateful()
    before = {name: b.clone() for name, b in model.named_buffers()}
    attack.attack(model, *batch())
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())


def test_both_passes_of_trades_draw_the_same_masks():
    x, y = batch()
    model = small_net(batch_norm=False, dropout=0.5, dtype=torch.float64).train()
    bound = Objective(model, TRADES(eps=0.01, steps=1, beta=3)).bind(x, y)
    bound.prepare()

    def at(points):
        torch.manual_seed(5)
        return model(points).log_softmax(1)

    clean, moved = at(x), at(bound.attacked)
    kl = (clean.exp() * (clean - moved)).sum(1)
    expected = (F.nll_loss(clean, y, reduction="none") + 3 * kl).mean()
    torch.manual_seed(5)
    torch.testing.assert_close(bound().total, expected)


def test_the_weight_of_a_head_is_that_of_its_pass():
    """A parametrization computes it at every reading, and spectral norm moves on each time."""
    x, y = batch()
    model = small_net(dtype=torch.float64)
    head = parametrizations.spectral_norm(model[-1])
    model.train()
    model(x)
    twin = copy.deepcopy(model)
    phi = twin[:-1](x)
    with nn.utils.parametrize.cached():
        logits, weight = twin[-1](phi), twin[-1].weight
    expected = relative_flatness(phi, logits, weight).mean() / weight.shape[1]
    objective = Objective(model, None, [RelativeFlatness(), OffManifoldConfidence(eps=0.1)])
    found = objective(x, y).parts
    torch.testing.assert_close(found["RelativeFlatness"], expected.detach())
    ours, theirs = dict(head.named_buffers()), dict(twin[-1].named_buffers())
    for name, buffer in theirs.items():
        assert torch.equal(ours[name], buffer), name


COMPUTED = {
    "weight_norm, by a hook": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, by a hook": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_head_whose_weight_is_computed_is_perturbed_as_by_hand(kind):
    x, y = batch()
    models = []
    for _ in range(2):
        model = small_net(dtype=torch.float64, batch_norm=False)
        COMPUTED[kind](model[-1])
        models.append(model.train())
    model, twin = models
    by_hand = from_start(twin)
    scope, weights = list(twin[-1].parameters()), list(twin.parameters())
    climb(F.cross_entropy(by_hand(x), y), scope, rho=0.5)
    wanted = torch.autograd.grad(F.cross_entropy(by_hand(x), y), weights)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, scope=model[-1])
    torch.manual_seed(5)
    flatreg.backward(optimizer, Objective(model).bind(x, y))
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("penalty", [RelativeFlatness(), MarginBound(eps=0.1)])
def test_a_model_that_was_compiled_and_run_before_is_the_same(penalty, in_place):
    """Traces made before see no hooks, and give away what a kept graph needs."""
    torch._dynamo.reset()
    model, (x, y) = small_net().train(), images()
    plain = copy.deepcopy(model)
    Objective(plain, NFGSM(eps=0.1, noise=0), [penalty])(x, y).total.backward()
    if in_place:
        model.compile(backend="aot_eager")
    run = model if in_place else torch.compile(model, backend="aot_eager")
    buffers = [b.clone() for b in model.buffers()]
    run(x), run(x.clone().requires_grad_()).sum().backward()
    model.zero_grad()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    Objective(run, NFGSM(eps=0.1, noise=0), [penalty])(x, y).total.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_measures_by_moved_weights_see_through_checkpointing():
    x, y = batch()
    plain, other = Stateful(), Stateful(checkpointed=True)
    plain.inner[3] = other.inner[3] = nn.Identity()  # counts in eval mode too
    found = [
        hessian_trace_estimate(model, x, y, method="finite_difference", num_probes=2).value
        for model in (plain, other)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_again_leaves_streams_and_buffers_as_they_were():
    model, (x, _) = Stateful(), batch()
    torch.manual_seed(5)
    start = PassStart(model)
    first = model(x)
    start.ends()
    assert start.drew
    torch.rand(3)
    streams, buffers = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    with start.again():
        assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), streams)
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


class MomentumEncoder(nn.Module):
    """As in mean teachers and MoCo: `forward` moves weights that take no gradient."""

    def __init__(self, assigns):
        super().__init__()
        self.student, self.assigns = nn.Linear(8, 3).double(), assigns
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.moves = True

    @torch.no_grad()
    def move(self):
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.assigns:
                own.data = 0.9 * own.data + 0.1 * other.data
            else:
                own.mul_(0.9).add_(other, alpha=0.1)

    def forward(self, x):
        if self.moves:
            self.move()
        return self.student(x) - self.teacher(x)


@pytest.mark.parametrize("assigns", [False, True])
def test_frozen_weights_that_a_pass_moves_are_not_moved_twice(assigns):
    """They are refused by name; moved after the step, they are the loop's own affair."""
    model, x, y = MomentumEncoder(assigns), torch.rand(4, 8).double(), torch.arange(4) % 3
    optimizer = SAM(torch.optim.SGD(model.student.parameters(), lr=0.1), rho=0.1)
    before = copy.deepcopy(model.student.state_dict())
    words = r"teacher.weight takes no gradient, and forward moved it: [^\n]* after optimizer.step"
    with pytest.raises(ValueError, match=words):
        flatreg.backward(optimizer, lambda: model(x).square().mean(), model=model)
    with pytest.raises(ValueError, match=words):
        Objective(model, None, [OffManifoldCurvature(strength=1.0, eps=0.1)])(x, y)
    after = model.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.moves = False
    flatreg.backward(optimizer, lambda: model(x).square().mean(), model=model)
    optimizer.step()
    model.move()


@pytest.mark.parametrize("given", [True, False], ids=["the model", "beside the model"])
@pytest.mark.parametrize("write", ["mul", "copy"])
def test_so_are_those_that_are_written_to_behind_the_back_of_torch(write, given):
    """By `.data`, as official code of MoCo and BYOL does: torch counts no such write."""

    class ByData(MomentumEncoder):
        def move(self):
            for own, other in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                if write == "mul":
                    own.data.mul_(0.9).add_(other.data)
                else:
                    own.data.copy_(0.9 * own.data + other.data)

    model, x = ByData(False), torch.rand(4, 8).double()
    optimizer = SAM(torch.optim.SGD(model.student.parameters(), lr=0.1), rho=0.1)
    told = model if given else model.student
    with pytest.raises(ValueError, match=r"takes no gradient, and forward moved it"):
        flatreg.backward(optimizer, lambda: model(x).square().mean(), model=told)
    model.moves = False
    flatreg.backward(optimizer, lambda: model(x).square().mean(), model=told)


class Plain(nn.Module):
    """Keeps a count, a running mean and a cache as plain attributes."""

    count = 0

    def __init__(self, in_place):
        super().__init__()
        self.net, self.in_place = nn.Linear(8, 3).double(), in_place
        self.mean = torch.zeros(3).double()

    def forward(self, x):
        self.count += 1
        z = self.net(x)
        self.last = z.detach()
        if self.in_place:
            self.mean.mul_(0.9).add_(self.last.mean(0))
        else:
            self.mean = 0.9 * self.mean + self.last.mean(0)
        return (z - self.mean) / self.count


@pytest.mark.parametrize("in_place", [False, True])
def test_plain_attributes_count_a_batch_once_too(in_place):
    """Second pass and passes of penalties start from what they were, as from buffers."""
    x, y = torch.rand(6, 8).double(), torch.arange(6) % 3
    torch.manual_seed(0)
    model = Plain(in_place)
    once = copy.deepcopy(model)
    once(x)
    moved = copy.deepcopy(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    flatreg.backward(optimizer, lambda: F.cross_entropy(model(x), y), model=model)
    assert model.count == once.count == 1
    assert torch.equal(model.mean, once.mean) and torch.equal(model.last, once.last)
    own = list(moved.parameters())
    first = torch.autograd.grad(F.cross_entropy(moved(x), y), own)
    length = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(own, first, strict=True):
            p.add_(g, alpha=0.1 / float(length))
    moved.count, moved.mean = 0, torch.zeros(3).double()
    second = torch.autograd.grad(F.cross_entropy(moved(x), y), own)
    for p, g in zip(model.parameters(), second, strict=True):
        torch.testing.assert_close(p.grad, g)
    other = Plain(in_place)
    objective = Objective(other, None, [MarginBound(eps=0.1)])
    flatreg.backward(optimizer_of(other), objective.bind(x, y))
    assert other.count == 1


def test_a_plain_tensor_that_two_modules_share_stays_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Plain(True), Plain(True)])
            self.parts[1].mean = self.parts[0].mean

        def forward(self, x):
            return self.parts[0](x) + self.parts[1](x)

    model, x, y = Two(), torch.rand(6, 8).double(), torch.arange(6) % 3
    PGDAT(eps=0.1, steps=2).attack(model, x, y)
    assert model.parts[0].mean is model.parts[1].mean
    assert not model.parts[0].mean.any()


@pytest.mark.parametrize("in_place", [False, True])
def test_an_attack_leaves_plain_tensors_and_counts_its_passes(in_place):
    x, y = torch.rand(6, 8).double(), torch.arange(6) % 3
    model = Plain(in_place)
    PGDAT(eps=0.1, steps=2).attack(model, x, y)
    assert not model.mean.any()
    assert model.count == 2


def optimizer_of(model):
    return SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)


@pytest.mark.parametrize("objective", [False, True])
def test_the_first_batch_of_a_lazy_model_counts_once(objective):
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    lazy = [nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.SiLU(), nn.LazyLinear(3)]
    model = nn.Sequential(nn.Flatten(), *lazy).train()
    if objective:
        loss = Objective(model, None, [MarginBound(eps=0.1)]).bind(x, y)
    else:
        loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    flatreg.backward(optimizer_of(model), loss, model=model)
    again = copy.deepcopy(model)
    again[2].reset_running_stats()
    again(x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, again.get_buffer(name), rtol=0, atol=0)


class OwnStream(nn.Module):
    """A generator of its own, which nobody else can put back."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator, dtype=x.dtype) > 0.3)


class OwnList(nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = [0]

    def forward(self, x):
        self.counts[0] += 1
        return x * self.counts[0]


@pytest.mark.parametrize("between", [OwnStream, OwnList])
def test_a_pass_that_cannot_be_repeated_is_refused(between):
    x, y = batch()
    model = small_net(dtype=torch.float64)
    model.insert(7, between())
    for criterion, penalties in ((None, [MarginBound(eps=0.1)]), (TRADES(eps=0.1, steps=1), [])):
        with pytest.raises(ValueError, match="need a model that repeats a pass") as error:
            Objective(model, criterion, penalties)(x, y)
        assert "\n" not in str(error.value)
    assert Objective(model, None, [RelativeFlatness()])(x, y).total.isfinite()


class Learned(nn.Module):
    """A buffer that is trained, beside the parameter that it could be."""

    def __init__(self, as_buffer):
        super().__init__()
        value = torch.linspace(0.5, 1.5, 32).double().requires_grad_()
        if as_buffer:
            self.register_buffer("scale", value)
        else:
            self.scale = nn.Parameter(value)

    def forward(self, x):
        return x * self.scale


def test_a_buffer_that_is_trained_gets_its_gradient_in_every_pass():
    x, y = batch()
    found = []
    for as_buffer in (True, False):
        model = small_net(dtype=torch.float64)
        model.insert(8, Learned(as_buffer))
        penalties = [MarginBound(eps=0.1), OffManifoldCurvature(eps=0.1)]
        Objective(model, None, penalties)(x, y).total.backward()
        found.append(model[8].scale.grad)
    torch.testing.assert_close(*found)


class Late(nn.Module):
    """Registers its buffer in its first pass."""

    def forward(self, x):
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(()).double())
        self.count += 1
        return x


def test_a_buffer_that_a_pass_registers_counts_it_once():
    model = small_net(dtype=torch.float64)
    model.insert(7, Late())
    Objective(model, None, [MarginBound(eps=0.1)])(*batch()).total.backward()
    assert int(model[7].count) == 1


@pytest.mark.parametrize("case", ["two losses", "TRADES", "nested", "head"])
def test_checkpointing_changes_no_gradient_and_moves_no_buffer_twice(case):
    x, y = batch()
    found = []
    for checkpointed in (False, True):
        model = Stateful(checkpointed=checkpointed)
        if case == "nested" and checkpointed:
            inner = model.inner
            model.inner = nn.Sequential(*inner[:1], Reentrant(inner[1:]))
        scope = model.head if case == "head" else None
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, scope=scope)
        torch.manual_seed(5)
        if case == "two losses":
            objective = Objective(model, None, [MarginBound(eps=0.1)])
            (objective(x, y).total + objective(1 - x, y).total).backward()
        elif case == "TRADES":
            Objective(model, TRADES(eps=0.1, steps=1), [])(x, y).total.backward()
        elif case == "nested":
            chord = OffManifoldCurvature(eps=0.1, estimator="chord")
            Objective(model, None, [chord])(x, y).total.backward()
        else:
            flatreg.backward(optimizer, Objective(model, TRADES(eps=0.1, steps=1)).bind(x, y))
        counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
        found.append((gradients(model), counts))
    for plain, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(other, plain)
    assert found[0][1] == found[1][1]


class Reentrant(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


def test_an_interrupt_while_a_layer_runs_anew_leaves_its_buffers():
    model = Stateful(checkpointed=True)
    loss = Objective(model, None, [OffManifoldCurvature(eps=0.1, estimator="chord")])(*batch())
    buffers = {n: id(b) for n, b in model.named_buffers() if "renewed" not in n}

    def interrupt(*_):
        if torch._C._current_graph_task_id() != -1:
            raise KeyboardInterrupt

    hook = model.inner[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.total.backward()
    hook.remove()
    model(batch()[0])
    assert {n: id(b) for n, b in model.named_buffers() if "renewed" not in n} == buffers
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, Counting))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_part_is_as_the_part_itself():
    x, y = batch()
    found = []
    for scripted in (False, True):
        model = small_net(dtype=torch.float64, batch_norm=True).train()
        if scripted:
            model[1] = torch.jit.script(model[1])
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
        flatreg.backward(optimizer, Objective(model, None, [MarginBound(eps=0.1)]).bind(x, y))
        found.append((gradients(model), int(model[1].num_batches_tracked)))
    assert found[0][1] == found[1][1] == 1
    for plain, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(other, plain)


def test_without_gradients_the_values_are_the_same():
    x, y = batch()
    objective = Objective(small_net(dtype=torch.float64).eval(), None, [MarginBound(eps=0.1)])
    expected = objective(x, y)
    with torch.no_grad():
        found = objective(x, y)
    assert torch.equal(found.total, expected.total) and not found.total.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0).double()),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
)
def test_a_loss_whose_parts_do_not_add_up_is_not_split(loss):
    x, y = batch()
    model = small_net(dtype=torch.float64, batch_norm=False)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    with pytest.raises(ValueError, match='give it reduction="none" and no weight'):
        flatreg.backward(sam, Objective(model, loss).bind(x, y))
    plain = Objective(model, nn.CrossEntropyLoss()).bind(x, y)
    whole = plain().total
    assert sum(part().total for part in plain.split(2)).item() == pytest.approx(whole.item())


def test_values_and_labels_of_terms_are_checked():
    (x, y), model = batch(), small_net(dtype=torch.float64)

    class Three:
        requires = frozenset({"clean"})
        value = staticmethod(lambda logits: logits[:3, 0])

        def __call__(self, passes):
            return self.value(passes["clean"].logits)

    with pytest.raises(ValueError, match=r"Three: expected a loss per sample \(8,\), got shape"):
        Objective(model, Three())(x, y)
    Three.value = staticmethod(lambda logits: 1.0)
    with pytest.raises(TypeError, match=r"Three: expected a loss per sample .* got a float"):
        Objective(model, Three())(x, y)
    several = torch.ones(8, 5).double()
    assert Objective(model, nn.BCEWithLogitsLoss())(x, several).total.isfinite()
    with pytest.raises(ValueError, match=r"InputGradient takes labels .* which sum to 1"):
        Objective(model, nn.BCEWithLogitsLoss(), InputGradient(eps=0.1))(x, several)
    with pytest.raises(ValueError, match="the model returns probabilities"):
        Objective(nn.Sequential(model, nn.Softmax(1)))(x, y)
    objective = Objective(model)
    objective(x, y)
    with pytest.raises(ValueError, match="labels: expected 0 to 4, got"):
        objective(x, y + 3)


def test_a_pass_that_is_repeated_at_first_is_tried_again():
    """Its own stream fires only from the third pass on."""
    x, y = batch()
    model = small_net(dtype=torch.float64)
    model.insert(7, OwnList())
    objective = Objective(model, None, [MarginBound(eps=0.1)])
    model[7].forward = lambda x: x
    objective(x, y)
    del model[7].forward
    with pytest.raises(ValueError, match="need a model that repeats a pass"):
        objective(x, y)


def test_computed_weights_may_not_be_cached_over_both_passes():
    x, y = batch()
    model = small_net(dtype=torch.float64)
    parametrizations.weight_norm(model[-1])
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match="within the closure"):
        flatreg.backward(sam, lambda: F.cross_entropy(model(x), y), model=model)


@pytest.mark.parametrize("how", ["backward", "evaluation", "step", "error"])
def test_a_model_is_let_go(how):
    """What a pass started from holds its model, and is kept by its graph alone."""
    x, y = batch()
    model = small_net(dtype=torch.float64).train()
    alive = weakref.ref(model)
    objective = Objective(model, None, [MarginBound(eps=0.1)])
    if how == "error":
        model[0].weight.register_hook(lambda _: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            objective(x, y).total.backward()
        pickle.dumps(model[1])  # a layer that still has its hooks
    elif how == "step":
        flatreg.backward(SAM(torch.optim.SGD(model.parameters(), lr=0.1)), objective.bind(x, y))
    else:
        total = objective(x, y).total
        total.backward() if how == "backward" else None
        del total
    del model, objective
    gc.collect()
    assert alive() is None


def test_logits_that_are_no_numbers_are_not_called_unrepeatable():
    x, y = batch()
    model = small_net(dtype=torch.float64)
    with torch.no_grad():
        model[-1].weight[0, 0] = float("nan")
    total = Objective(model, None, [OffManifoldCurvature(eps=0.1, estimator="chord")])(x, y).total
    assert not total.isfinite()


def test_a_pass_is_repeated_by_the_formulas_it_was_taken_with():
    """Attention has another kernel where terms differentiate twice: its small logits differ."""
    torch.manual_seed(2)
    model = timm.create_model("test_vit", num_classes=1000, img_size=32)
    model = flatreg.with_normalization(model, [0.5] * 3, [0.5] * 3)
    x, y = torch.rand(4, 3, 32, 32), torch.randint(0, 1000, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = Objective(model, None, [flatreg.GradAlign(eps=8 / 255)])(x, y)
    assert bool(loss.total.isfinite())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
def test_a_sparse_tensor_as_an_attribute_is_left_alone(layout):
    class Graph(nn.Linear):
        def forward(self, x):
            return (self.graph @ super().forward(x).T).T

    model, graph = Graph(4, 3), torch.eye(3).to_sparse(layout=layout)
    model.graph = graph
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), rho=0.1)
    flatreg.backward(optimizer, lambda: model(torch.ones(2, 4)).sum(), model=model)
    assert model.graph is graph
    assert torch.equal(graph.to_dense(), torch.eye(3))
