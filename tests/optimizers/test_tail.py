"""A tail: plain steps bit for bit while the learning rate is high, then exactly the method's."""

import copy
import io
import math
import warnings

import pytest
import timm.scheduler
import torch
import torch.nn.functional as F
from by_hand import METHODS
from cases import images, small_net
from oracles import flat_weights
from torch.optim import lr_scheduler

from flatreg import SAM, LookSAM, Objective, SharpnessAware, backward
from flatreg.optimizers.timing import Timing

X, Y = images(12)
STEPS, LR = 12, 0.2
ALWAYS = {name: make for name, make in METHODS.items() if name not in ("tail", "spaced")}


def cosine(step):
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def warmed_up(step):
    return step / 4 if step < 4 else (STEPS - step) / (STEPS - 4)


def of_timm(sched, **options):
    def make(optimizer):
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=STEPS,
            step_on_epochs=False,
            updates_per_epoch=1,
            **options,
        )
        count = iter(range(1, STEPS + 1))
        return lambda: schedule.step_update(next(count))

    return make


def of_torch(kind, *arguments, **options):
    return lambda optimizer: kind(optimizer, *arguments, **options).step


# A schedule, and the steps whose learning rate is at most half of the highest of the steps so far.
SCHEDULES = {
    "steps by ten": (of_torch(lr_scheduler.StepLR, 5, 0.1), range(5, STEPS)),
    "every epoch of three steps": (
        of_torch(lr_scheduler.LambdaLR, lambda step: cosine(step // 3 * 3)),
        range(6, STEPS),
    ),
    "cosine": (of_torch(lr_scheduler.CosineAnnealingLR, STEPS), range(6, STEPS)),
    "warm-up": (of_torch(lr_scheduler.LambdaLR, warmed_up), range(8, STEPS)),
    "one cycle": (of_torch(lr_scheduler.OneCycleLR, LR, STEPS, pct_start=0.25), range(7, STEPS)),
    "restarts": (
        of_torch(lr_scheduler.CosineAnnealingWarmRestarts, 6),
        [*range(3, 6), *range(9, STEPS)],
    ),
    "constant": (of_torch(lr_scheduler.ConstantLR, 1.0), []),
    "timm, cosine": (of_timm("cosine"), range(6, STEPS)),
    "timm, warm-up": (of_timm("cosine", warmup_epochs=3, warmup_lr=0.0), range(7, STEPS)),
    "timm, step": (of_timm("step", decay_epochs=4, decay_rate=0.5), range(4, STEPS)),
}


def run(make, schedule=None, base=torch.optim.SGD, steps=STEPS, hook=None, **options):
    """Weights after each step, and the passes of each."""
    net = small_net(batch_norm=False, dropout=0.5, dtype=torch.float64).train()
    optimizer = make(base(net.parameters(), lr=LR, momentum=0.9), net)
    advance = schedule(optimizer) if schedule else lambda: None
    torch.manual_seed(0)
    weights, passes = [], []
    for step in range(steps):
        calls = []

        def closure(calls=calls, step=step):
            calls.append(1)
            rows = torch.arange(6) + step % 6
            return F.cross_entropy(net(X[rows].double()), Y[rows])

        if hook:
            optimizer = hook(step, net, optimizer) or optimizer
        backward(optimizer, closure, model=net)
        optimizer.step()
        optimizer.zero_grad()
        advance()
        weights.append(flat_weights(net))
        passes.append(len(calls))
    return weights, passes


def tailed(method, tail=0.5):
    def make(base, net):
        optimizer = ALWAYS[method](base, net)
        optimizer.tail = tail
        return optimizer

    return make


@pytest.mark.parametrize("name", SCHEDULES)
def test_perturbs_where_the_rate_is_low_and_not_in_a_warm_up(name):
    schedule, expected = SCHEDULES[name]
    seen = []
    note = lambda step, _, optimizer: seen.append(step) if optimizer.perturbs_now else None  # noqa: E731
    _, passes = run(lambda base, _: SAM(base, tail=0.5), schedule, hook=note)
    assert seen == [*expected]
    assert passes == [1 + (step in expected) for step in range(STEPS)]


@pytest.mark.parametrize("method", ALWAYS)
def test_before_it_the_base_bit_for_bit_and_inside_exactly_the_method(method):
    """Inside: as one that was wrapped there, but for what a method has from the step before."""
    schedule = of_torch(lr_scheduler.StepLR, 5, 0.1)
    ours, passes = run(tailed(method), schedule)
    plain, _ = run(lambda base, _: base, schedule)
    assert passes[:5] == [1] * 5
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], plain[:5], strict=True))

    def begin(step, net, optimizer):
        if step == 5:
            optimizer.begin = 5
        return None

    def late(base, net):
        optimizer = ALWAYS[method](base, net)
        optimizer.begin = 10**6
        return optimizer

    expected, counts = run(late, schedule, hook=begin)
    assert passes == counts and all(map(torch.equal, ours, expected))
    assert not torch.equal(ours[-1], plain[-1])


def test_a_tail_of_one_is_the_whole_training():
    whole, _ = run(lambda base, _: SAM(base), of_torch(lr_scheduler.LambdaLR, warmed_up))
    same, _ = run(lambda base, _: SAM(base, tail=1), of_torch(lr_scheduler.LambdaLR, warmed_up))
    assert all(map(torch.equal, whole, same))


@pytest.mark.parametrize("at", [2, 5, 8])
def test_resumed_it_knows_the_highest_rate(at):
    """Before the tail, at its first step and inside, where `every` goes on counting."""

    def make(base, _):
        return LookSAM(base, rho=0.1, every=3, tail=0.5)

    def again(step, net, optimizer):
        if step != at:
            return None
        fresh = make(torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9), net)
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        fresh.load_state_dict(torch.load(saved, weights_only=True))
        # The schedule goes on with the old one's groups.
        optimizer.param_groups[:] = fresh.param_groups
        fresh.param_groups = optimizer.param_groups
        return fresh

    schedule = of_torch(lr_scheduler.LambdaLR, lambda step: warmed_up(step) + 0.01)
    straight, _ = run(make, schedule)
    resumed, passes = run(make, schedule, hook=again)
    assert all(map(torch.equal, straight, resumed)) and sum(passes) > STEPS


def test_a_checkpoint_that_does_not_know_the_highest_rate_is_told():
    net = small_net()
    saved = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9).state_dict()
    late = SAM(torch.optim.SGD(net.parameters(), lr=0.1), tail=0.5)
    with pytest.warns(UserWarning, match="does not say the highest learning rate") as caught:
        late.load_state_dict(copy.deepcopy(saved))
    assert caught[0].filename == __file__
    late.param_groups[0]["sam_peak_lr"] = 0.1  # what the message says
    assert late.perturbs_now
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.load_state_dict(late.state_dict())
        SAM(torch.optim.SGD(net.parameters(), lr=0.1)).load_state_dict(saved)
        fresh = SAM(torch.optim.SGD(net.parameters(), lr=0.1), tail=0.5)
        late.load_state_dict(fresh.state_dict())  # from before the first step


def test_skipped_steps_micro_batches_and_several_groups():
    """A skipped step is none; the rate is that of the group with the largest."""
    net = small_net(batch_norm=False)
    groups = [
        {"params": list(net[:4].parameters()), "lr": 0.0},
        {"params": list(net[8].parameters()), "lr": 0.1},
    ]
    optimizer = SAM(torch.optim.SGD(groups), tail=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    objective = Objective(net)
    for overflows, perturbs in ((True, False), (False, False), (False, True)):
        factor = torch.inf if overflows else 1.0
        for _ in range(2):
            assert optimizer.perturbs_now == perturbs
            bound = objective.bind(X[:4], Y[:4])
            backward(optimizer, lambda b=bound, f=factor: b().total * f, model=net, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["sam_peak_lr"] == (0 if overflows else 0.1)
        if not overflows:
            optimizer.param_groups[1]["lr"] *= 0.1
    assert optimizer.param_groups[1]["sam_steps"] == 2


def test_composes_with_every_and_begin():
    optimizer = SharpnessAware(torch.optim.SGD(small_net().parameters(), lr=0.1), every=3)
    optimizer.begin, optimizer.tail = 2, 0.5
    seen = []
    for step, rate in enumerate([1, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0.5]):
        optimizer.param_groups[0]["lr"] = rate
        if optimizer.perturbs_now:
            seen.append(step)
        optimizer.gradients_are_ready = True
        optimizer.step()
    assert seen == [2, 5, 7, 10]  # every third from the first of each tail


@pytest.mark.parametrize("tail", [0, -0.1, 1.5, math.nan, math.inf])
def test_a_tail_out_of_its_range_is_refused(tail):
    base = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^tail: expected a number in \(0, 1\], got "):
        SAM(base, tail=tail)


def test_a_rate_that_does_not_fall_is_refused():
    class ScheduleFree(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                group["weight_lr_power"] = 2.0

    base = ScheduleFree(small_net().parameters())
    with pytest.raises(
        ValueError, match="whose learning rate falls, that of ScheduleFree does not"
    ):
        SAM(base, tail=0.5)
    SAM(base)


def test_rounding_does_not_move_it():
    for rate in (0.1, 0.3, 1e-3, 7e-4):
        base = torch.optim.SGD(small_net().parameters(), lr=rate * 0.1 * 0.1)
        base.param_groups[0]["sam_peak_lr"] = rate
        assert Timing(tail=0.01).perturbs(base)
        assert not Timing(tail=0.00999).perturbs(base)
