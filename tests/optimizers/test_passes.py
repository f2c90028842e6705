"""`backward` in every loop, precision, accumulation and method, against one made by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from by_hand import DECAY, METHODS, MOMENTUM, ascent, estimate, note_step, unit
from cases import images, small_net
from oracles import flat_gradient, flat_weights, set_gradient
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatreg import (
    AWP,
    NFGSM,
    PGDAT,
    SAM,
    CrossEntropy,
    HeadRelativeSAM,
    MarginBound,
    Objective,
    RandomSAM,
    RelativeFlatness,
    backward,
)
from flatreg.optimizers.closure import BatchLoss

PRECISIONS = ("float32", "bf16", "scaler")
MICRO = 5  # micro-batches an epoch: with accumulation 2 the last step has one


def loss_of(x, y, precision):
    def loss(net):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return F.cross_entropy(net(x), y)

    return loss


def data():
    x, y = images(4 * MICRO)
    return [(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) for i in range(MICRO)]


def groups(accumulation):
    batches = data()
    return [batches[i : i + accumulation] for i in range(0, MICRO, accumulation)]


def by_hand(method, precision, accumulation, clip):
    net, memory = small_net(batch_norm=False), {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY)
    for step, group in enumerate(groups(accumulation)):
        pieces = [estimate(method, net, loss_of(*b, precision), step, memory) for b in group]
        set_gradient(net, torch.stack(pieces).sum(0) / accumulation)
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        note_step(net, memory)
        optimizer.step()
        schedule.step()
    return flat_weights(net)


def plain_loop(method, precision, accumulation, clip):
    net = small_net(batch_norm=False)
    optimizer = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.2, momentum=MOMENTUM), net)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "scaler")
    for group in groups(accumulation):
        for x, y in group:
            loss = loss_of(x, y, precision)
            backward(optimizer, lambda f=loss: f(net) / accumulation, model=net, scaler=scaler)
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    return flat_weights(net)


def accelerate_loop(method, precision, accumulation, clip):
    net = small_net(batch_norm=False)
    optimizer = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.2, momentum=MOMENTUM), net)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        mixed_precision="bf16" if precision == "bf16" else "no",
    )
    if precision == "scaler":
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loader = DataLoader(TensorDataset(*(torch.cat(c) for c in zip(*data(), strict=True))), 4)
    net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
    if precision == "scaler":  # what an fp16 Accelerator, which wants a GPU, does when it clips
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    for x, y in loader:
        with accelerator.accumulate(net):
            loss = lambda x=x, y=y: F.cross_entropy(net(x), y)  # noqa: E731
            backward(optimizer, loss, model=net, accelerator=accelerator)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return flat_weights(net)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_both_loops_equal_the_same_by_formula(method, precision, accumulation, clip):
    expected = by_hand(method, precision, accumulation, clip)
    moved = (expected - flat_weights(small_net(batch_norm=False))).norm()
    assert moved > 0.01
    for loop in (plain_loop, accelerate_loop):
        got = loop(method, precision, accumulation, clip)
        # bf16 rounds the forward pass: a bit of difference before it is 2^-8 of it afterwards.
        tolerance = 2e-2 if precision == "bf16" else 1e-4
        assert (got - expected).norm() <= tolerance * moved, loop.__name__


def test_methods_differ_by_more_than_the_tolerance():
    results = [by_hand(method, "float32", 1, False) for method in METHODS]
    moved = (results[0] - flat_weights(small_net(batch_norm=False))).norm()
    for i, a in enumerate(results):
        assert all((a - b).norm() > 1e-3 * moved for b in results[:i])


def test_an_outer_autocast_does_not_serve_stale_weights():
    """Its cache keeps copies of the weights: without clearing, pass 2 would repeat pass 1."""
    (x, y), net = images(), small_net(batch_norm=False)
    sam, seen = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=1.0), []

    def closure():
        seen.append(F.cross_entropy(net(x), y))
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16):
        backward(sam, closure, model=net)
        assert seen[1] > seen[0] + 0.05
        assert F.cross_entropy(net(x), y) == seen[0]  # and the perturbed copies are gone as well


@pytest.mark.parametrize("overflow", [1, 2])
def test_an_overflow_in_either_pass_is_left_to_the_scaler(overflow):
    """In the first pass: no perturbation, and an ordinary step. In the second: skip, back off."""
    (x, y), net = images(), small_net(batch_norm=False)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, calls = flat_weights(net), []
    plain = flat_gradient(net, loss_of(x, y, "float32"))

    def closure():
        calls.append(flat_weights(net))
        factor = float("inf") if len(calls) == overflow else 1.0
        return F.cross_entropy(net(x), y) * factor

    backward(sam, closure, model=net, scaler=scaler)
    scaler.step(sam)
    scaler.update()
    if overflow == 1:
        assert torch.equal(calls[1], before)
        torch.testing.assert_close(flat_weights(net), before - 0.1 * plain)
        assert scaler.get_scale() == 1024
    else:
        assert not torch.equal(calls[1], before)
        assert torch.equal(flat_weights(net), before)
        assert scaler.get_scale() == 512


@pytest.mark.parametrize("method", ["GSAM", "WSAM", "LookSAM"])
def test_where_the_first_gradient_enters_the_step_its_overflow_skips_it(method):
    (x, y), net = images(), small_net(batch_norm=False)
    optimizer = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.1), net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, calls = flat_weights(net), []

    def closure():
        calls.append(1)
        return F.cross_entropy(net(x), y) * (float("inf") if len(calls) == 1 else 1.0)

    backward(optimizer, closure, model=net, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    if method == "LookSAM":  # a refresh steps on the second gradient alone, and keeps nothing
        assert all(not s.memory["reused"].any() for s in optimizer.parameter_states())
    else:
        assert torch.equal(flat_weights(net), before) and scaler.get_scale() == 512


def test_a_skipped_step_is_seen_by_accelerate_and_its_scheduler():
    (x, y), net = images(), small_net(batch_norm=False)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
    net, optimizer, schedule = accelerator.prepare(net, sam, schedule)
    for factor, skipped, lr in (
        (1.0, False, 0.05),
        (float("inf"), True, 0.05),
        (1.0, False, 0.025),
    ):
        loss = lambda factor=factor: F.cross_entropy(net(x), y) * factor  # noqa: E731
        backward(optimizer, loss, model=net, accelerator=accelerator)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is skipped
        assert optimizer.param_groups[0]["lr"] == lr


def objective_of(net, criterion=None):
    at = "clean" if criterion is None else "attacked"
    return Objective(net, criterion, [RelativeFlatness(strength=0.1, at=at)])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("criterion", [None, NFGSM(eps=0.1)], ids=["clean", "attacked"])
@pytest.mark.parametrize("relative", [False, True], ids=["SAM", "HeadRelativeSAM"])
def test_the_head_alone_takes_one_pass_and_equals_two(criterion, precision, relative):
    x, y = images()
    results, passes = [], []
    for bound in (True, False):
        net = small_net(dropout=0.3).train()
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        sam = (
            HeadRelativeSAM(base, net[8], rho=0.5) if relative else SAM(base, rho=0.5, scope=net[8])
        )
        net[0].register_forward_hook(lambda *_: passes.append(1))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "scaler")
        objective = objective_of(net, criterion)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            objective.check(x[:2])  # finding the head takes a pass of its own, once
            passes.clear()
            batch = objective.bind(x, y)
            batch.prepare()
            attacks = len(passes)
            closure = batch if bound else lambda batch=batch: batch()
            backward(sam, closure, model=net, scaler=scaler)
        assert len(passes) - attacks == (1 if bound else 2)
        results.append([p.grad.clone() for p in net.parameters()] + list(net.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_head_whose_weight_is_used_before_it_takes_two_passes():
    class Tied(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.body, self.gate = nn.Linear(size, 6), nn.Linear(6, 5, bias=False)
            self.head = nn.Linear(6, 5, bias=False)
            self.head.weight = self.gate.weight

        def forward(self, x):
            features = self.body(x.flatten(1)).tanh()
            return self.head(features * self.gate(features).amax(1, keepdim=True))

    x, y = images()
    torch.manual_seed(0)
    net, gradients = Tied(x[0].numel()), []
    for bound in (True, False):
        sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5, scope=net.head)
        batch = objective_of(net).bind(x, y)
        backward(sam, batch if bound else lambda batch=batch: batch(), model=net)
        gradients.append([p.grad.clone() for p in net.parameters()])
        sam.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("frozen", [["bias"], ["bias", "weight"]], ids=len)
def test_what_is_frozen_in_the_head_stays(frozen):
    (x, y), net = images(), small_net()
    for name in frozen:
        getattr(net[8], name).requires_grad_(False)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5, scope=net[8])
    before = flat_weights(net)
    backward(sam, objective_of(net).bind(x, y))
    assert torch.equal(flat_weights(net), before)
    assert [p.grad is None for p in net[8].parameters()] == ["weight" in frozen, True]
    assert net[0].weight.grad is not None


def test_terms_that_look_past_the_head_take_two_passes():
    (x, y), net = images(), small_net()
    sam, passes = SAM(torch.optim.SGD(net.parameters(), lr=0.1), scope=net[8]), []
    objective = Objective(net, CrossEntropy(), [MarginBound(strength=1.0, eps=0.1)])
    for _ in range(2):
        objective(x, y)  # the checks of the first batches
    net[0].register_forward_hook(lambda *_: passes.append(1))
    backward(sam, objective.bind(x, y))
    assert len(passes) == 4  # two of the batch, two of the displaced images


def test_a_scope_without_a_provable_head_takes_two_passes():
    (x, y), net = images(), small_net()
    model = torch.nn.Sequential(net, torch.nn.Tanh())
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), scope=net[8])
    backward(sam, Objective(model).bind(x, y))
    assert net[8].weight.grad is not None


def test_micro_batches_are_perturbed_one_by_one():
    x, y = images(8)
    net = small_net(batch_norm=False)
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1, micro_batches=3)
    loss = backward(sam, objective_of(net).bind(x, y))
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    expected = 0.0
    for rows in torch.arange(8).tensor_split(3):
        loss_here = lambda m, rows=rows: objective_of(m)(x[rows], y[rows]).total  # noqa: E731
        e = 0.1 * unit(flat_gradient(net, loss_here))
        expected = expected + flat_gradient(net, loss_here, e) * len(rows) / 8
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    whole = objective_of(net)(x, y)
    torch.testing.assert_close(loss.total, whole.total.detach())
    assert loss.parts.keys() == whole.parts.keys()
    with pytest.raises(ValueError, match="micro_batches=3 needs a closure that can be split"):
        backward(sam, lambda: F.cross_entropy(net(x), y), model=net)


def test_a_batch_loss_of_ones_own_is_prepared_split_and_perturbed():
    """All that `backward` may call stands in `BatchLoss`; a bare closure is called alone."""
    net, (x, y), calls = small_net(batch_norm=False), images(8), []

    class Halves:
        def __init__(self, x, y):
            self.model, self.x, self.y = net, x, y

        def __call__(self):
            calls.append(("evaluated", len(self.x)))
            return F.cross_entropy(net(self.x), self.y) * len(self.x) / 8

        def prepare(self):
            calls.append(("prepared", len(self.x)))

        def split(self, count):
            pieces = zip(self.x.chunk(count), self.y.chunk(count), strict=True)
            return [Halves(*piece) for piece in pieces]

        def at_head(self, parameters):
            return None

    own = Halves(x, y)
    assert isinstance(own, BatchLoss) and isinstance(Objective(net).bind(x, y), BatchLoss)
    assert not isinstance(lambda: own(), BatchLoss)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = backward(SAM(base, rho=0.1, micro_batches=2), own)
    assert calls == [("prepared", 8), *[("evaluated", 4)] * 4]
    assert loss.item() == pytest.approx(F.cross_entropy(net(x), y).item())
    by_own = [p.grad.clone() for p in net.parameters()]
    base.zero_grad()
    del base.param_groups[0]["sam_rho"]
    backward(SAM(base, rho=0.1, micro_batches=2), Objective(net).bind(x, y))
    torch.testing.assert_close(by_own, [p.grad for p in net.parameters()])


def test_micro_batches_share_one_attack():
    (x, y), net = images(8), small_net()
    bound = Objective(net, PGDAT(eps=0.1, steps=2)).bind(x, y)
    parts = bound.split(4)
    assert torch.equal(torch.cat([part.attacked for part in parts]), bound.attacked)


def test_awp_is_computed_on_the_attacked_batch():
    (x, y), net = images(), small_net(batch_norm=False)
    awp = AWP(torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.05)
    bound = Objective(net, PGDAT(eps=0.1, steps=2)).bind(x, y)
    backward(awp, bound)
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    loss = loss_of(bound.attacked, y, "float32")
    e = ascent("AWP", net, flat_gradient(net, loss), {})
    torch.testing.assert_close(got, flat_gradient(net, loss, e), rtol=1e-4, atol=1e-6)
    assert not torch.equal(bound.attacked, x)


def test_warm_up_and_interval_decide_when_to_perturb():
    (x, y), net = images(), small_net(batch_norm=False)
    sam, calls, per_step = SAM(torch.optim.SGD(net.parameters(), lr=0.1), every=3, begin=2), [], []
    for _ in range(9):
        calls.clear()
        loss = lambda: (calls.append(1), F.cross_entropy(net(x), y))[1]  # noqa: E731
        for _ in range(2):  # two micro-batches of one step are treated alike
            backward(sam, loss, model=net)
        sam.step()
        sam.zero_grad()
        per_step.append(len(calls))
    assert per_step == [2, 2, 4, 2, 2, 4, 2, 2, 4]


def test_a_random_direction_takes_one_pass_and_moves_statistics_once():
    (x, y), net, reference = images(), small_net().train(), small_net().train()
    rnd = RandomSAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.4)
    start, seen = flat_weights(net), []
    closure = lambda: (seen.append(flat_weights(net)), F.cross_entropy(net(x), y))[1]  # noqa: E731
    for _ in range(2):
        backward(rnd, closure, model=net)
    assert len(seen) == 2 and not torch.allclose(seen[0], seen[1])
    for weights in seen:
        assert float((weights - start).norm()) == pytest.approx(0.4, rel=1e-4)
    assert torch.equal(flat_weights(net), start)
    reference(x), reference(x)
    assert int(net[1].num_batches_tracked) == int(reference[1].num_batches_tracked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_raises_loses_nothing(method, failing):
    (x, y), net = images(), small_net(batch_norm=False)
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer, one = METHODS[method](base, net), method in ("MomentumSAM", "StaleSAM")
    if one and failing == 2:
        pytest.skip("has one pass")
    optimizer.param_groups[0]["sam_peak_lr"] = 1.0
    if one or method == "spaced":
        backward(optimizer, lambda: F.cross_entropy(net(x), y), model=net)
        optimizer.step()
    backward(optimizer, lambda: F.cross_entropy(net(x), y), model=net)
    weights, calls = flat_weights(net), []
    kept = [p.grad.clone() for p in net.parameters()]

    def closure():
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("boom")
        return F.cross_entropy(net(x), y)

    with pytest.raises(KeyError, match="boom"):
        backward(optimizer, closure, model=net)
    assert torch.equal(flat_weights(net), weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), kept, strict=True))


def test_parameters_of_another_optimizer_get_their_gradient_once():
    (x, y), net = images(), small_net(batch_norm=False)
    reference = copy.deepcopy(net)
    sam = SAM(torch.optim.SGD(net[8].parameters(), lr=0.1), rho=0.0)
    backward(sam, lambda: F.cross_entropy(net(x), y), model=net)
    F.cross_entropy(reference(x), y).backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_parameter_the_second_pass_does_not_reach_comes_back():
    """Stochastic depth: perturbed in pass 1, without gradient in pass 2."""
    (x, y), net = images(), small_net(batch_norm=False)
    for wrap in (METHODS["SAM"], METHODS["GSAM"], METHODS["LookSAM"]):
        optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.1), net)
        before, calls = flat_weights(net), []

        def closure(calls=calls):
            calls.append(1)
            h = net[0](x) if len(calls) == 1 else net[0](x).detach()
            return F.cross_entropy(net[1:](h), y)

        backward(optimizer, closure, model=net)
        assert torch.equal(flat_weights(net), before)
        optimizer.zero_grad()


def test_a_compiled_model_gives_the_gradients_of_the_model():
    x, y = images()
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = small_net().train()
        model = torch.compile(net, backend="aot_eager") if compiled else net
        sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3)
        for _ in range(2):
            backward(sam, lambda m=model: F.cross_entropy(m(x), y), model=model)
        gradients.append([p.grad for p in net.parameters()] + list(net.buffers()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_tied_mixed_dtype_and_empty_groups():
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(6, (8,))
    a, b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6).double()
    tied = torch.nn.Linear(6, 6)
    tied.weight = a.weight
    net = torch.nn.ModuleList([a, b, tied])
    base = torch.optim.SGD([{"params": list(net.parameters())}, {"params": []}], lr=0.1)
    sam = SAM(base, rho=0.2)
    seen = []

    def closure():
        seen.append([p.detach().double().clone() for p in net.parameters()])
        return F.cross_entropy(tied(b(a(x).tanh().double()).float().tanh()), y)

    backward(sam, closure, model=net)
    moved = torch.cat([(q - p).flatten() for p, q in zip(*seen, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.2, rel=1e-5)
    assert len(sam.parameters()) == 5
    assert all(p.grad is not None for p in net.parameters())


def test_instance_norm_statistics_stand_still_in_the_second_pass():
    x, y = images()
    nets = [
        torch.nn.Sequential(torch.nn.InstanceNorm2d(1, track_running_stats=True), small_net())
        for _ in range(2)
    ]
    sam = SAM(torch.optim.SGD(nets[0].parameters(), lr=0.1), rho=0.5)
    backward(sam, lambda: F.cross_entropy(nets[0](x), y), model=nets[0])
    nets[1](x)
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_work_is_refused_in_one_line():
    net = small_net()
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1))

    class DeepSpeed:
        distributed_type = "DistributedType.DEEPSPEED"

    with pytest.raises(ValueError, match="own the backward pass"):
        backward(sam, lambda: torch.zeros(()), model=net, accelerator=DeepSpeed())
