import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cases import images, small_net, timm_net
from oracles import two_pass_sam_step
from timm.optim import create_optimizer_v2
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flatreg import (
    GSAM,
    NFGSM,
    SAM,
    WSAM,
    CrossEntropy,
    HeadRelativeSAM,
    LookSAM,
    Objective,
    RelativeFlatness,
    RelativeSAM,
    SharpnessAware,
    backward,
)
from flatreg.optimizers import Relative

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def close(a, b):
    """Up to the rounding of a fused multiply-add."""
    return all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-7) for k in a) and a.keys() == b.keys()


def cross_entropy(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("base", BASES)
def test_equals_a_hand_written_two_pass_loop(base):
    x, y = images()
    ours, theirs = small_net(batch_norm=False), small_net(batch_norm=False)
    optimizer = SAM(BASES[base](ours.parameters()), rho=0.1)
    reference = BASES[base](theirs.parameters())
    for _ in range(5):
        backward(optimizer, cross_entropy(ours, x, y), model=ours)
        optimizer.step()
        optimizer.zero_grad()
        two_pass_sam_step(theirs, reference, 0.1, cross_entropy(theirs, x, y))
    assert close(weights(ours), weights(theirs))
    assert not close(weights(ours), weights(small_net(batch_norm=False)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapped", [True, False], ids=["rho=0", "not wrapped"])
def test_rho_zero_and_an_unwrapped_optimizer_are_the_base_bit_for_bit(base, wrapped):
    """With BatchNorm and dropout: replayed masks, statistics moved once."""
    x, y = images()
    ours, theirs = small_net(dropout=0.5).train(), small_net(dropout=0.5).train()
    optimizer = BASES[base](ours.parameters())
    if wrapped:
        optimizer = SAM(optimizer, rho=0.0)
    reference = BASES[base](theirs.parameters())
    for model, run in ((ours, optimizer), (theirs, reference)):
        torch.manual_seed(0)
        for _ in range(5):
            if model is ours:
                backward(run, cross_entropy(model, x, y), model=model)
            else:
                F.cross_entropy(model(x), y).backward()
            run.step()
            run.zero_grad()
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_weights_come_back_exactly_when_a_pass_raises(failing_pass):
    x, y = images()
    model = small_net().bfloat16()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.5)
    before, calls = {k: v.clone() for k, v in model.named_parameters()}, []

    def closure():
        calls.append(1)
        loss = F.cross_entropy(model(x.bfloat16()), y)
        if len(calls) == failing_pass:
            raise KeyError("boom")
        return loss

    with pytest.raises(KeyError, match="boom"):
        backward(optimizer, closure, model=model)
    assert len(calls) == failing_pass
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    assert all(m.track_running_stats for m in model.modules() if hasattr(m, "running_mean"))


def test_the_second_pass_sees_perturbed_weights_of_length_rho():
    x, y = images()
    model = small_net(batch_norm=False)
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.3)
    start, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        return F.cross_entropy(model(x), y)

    loss = backward(optimizer, closure, model=model)
    moved = torch.cat([(seen[1][k] - start[k]).flatten() for k in start])
    assert float(moved.norm()) == pytest.approx(0.3, rel=1e-4)
    assert same(seen[0], start) and same(weights(model), start)
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), y).item())
    assert not loss.requires_grad


def test_checkpoints_interchange_with_the_base_optimizer(tmp_path):
    x, y = images()
    models = [small_net() for _ in range(3)]
    sam = SAM(torch.optim.AdamW(models[0].parameters(), lr=0.01), rho=0.05)
    for _ in range(3):
        backward(sam, cross_entropy(models[0], x, y), model=models[0])
        sam.step()
        sam.zero_grad()
    torch.save(sam.state_dict(), tmp_path / "sam.pt")
    plain = torch.optim.AdamW(models[1].parameters(), lr=0.5)
    plain.load_state_dict(torch.load(tmp_path / "sam.pt", weights_only=True))
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    again = SAM(torch.optim.AdamW(models[2].parameters(), lr=0.5), rho=0.2)
    for group in again.param_groups:
        del group["sam_rho"]  # as a plain optimizer's checkpoint has none
    stripped = torch.load(tmp_path / "plain.pt", weights_only=True)
    for group in stripped["param_groups"]:
        del group["sam_rho"]
    again.param_groups[0]["sam_rho"] = 0.2
    again.load_state_dict(stripped)
    assert again.param_groups[0]["sam_rho"] == 0.2 and again.param_groups[0]["lr"] == 0.01
    for model, optimizer in ((models[1], plain), (models[2], again)):
        model.load_state_dict(models[0].state_dict())
        for p, q in zip(models[0].parameters(), model.parameters(), strict=True):
            for key, value in sam.state[p].items():
                assert torch.equal(value, optimizer.state[q][key])


def test_shares_groups_state_and_defaults_with_the_base_by_identity():
    model = small_net()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    groups, state = base.param_groups, base.state
    sam = SAM(base, rho=0.1)
    assert sam.param_groups is groups is base.param_groups and sam.state is state
    assert len(groups) == 1 and groups[0]["sam_rho"] == 0.1
    sam.load_state_dict(copy.deepcopy(sam.state_dict()))
    assert sam.param_groups is base.param_groups and sam.state is base.state
    sam.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "sam_rho": 0.7})
    assert base.param_groups[-1]["sam_rho"] == 0.7 and base.param_groups[-1]["lr"] == 0.01
    scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, 0.1)
    sam.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.001)


def test_perturbed_gives_the_users_own_two_passes():
    x, y = images()
    ours, theirs = small_net(batch_norm=False), small_net(batch_norm=False)
    sam, reference = (
        SAM(BASES["sgd"](ours.parameters()), rho=0.1),
        BASES["sgd"](theirs.parameters()),
    )
    F.cross_entropy(ours(x), y).backward()
    with sam.perturbed():
        F.cross_entropy(ours(x), y).backward()
    sam.step()
    two_pass_sam_step(theirs, reference, 0.1, cross_entropy(theirs, x, y))
    assert close(weights(ours), weights(theirs))


def test_step_with_a_closure_follows_the_lbfgs_convention():
    x, y = images()
    ours, theirs = small_net(batch_norm=False), small_net(batch_norm=False)
    sam, reference = (
        SAM(BASES["sgd"](ours.parameters()), rho=0.1),
        BASES["sgd"](theirs.parameters()),
    )

    def closure():
        sam.zero_grad()
        loss = F.cross_entropy(ours(x), y)
        loss.backward()
        return loss

    expected = F.cross_entropy(ours(x), y).item()
    assert sam.step(closure).item() == expected
    two_pass_sam_step(theirs, reference, 0.1, cross_entropy(theirs, x, y))
    assert close(weights(ours), weights(theirs))
    for _ in range(2):
        sam.step(closure)
        two_pass_sam_step(theirs, reference, 0.1, cross_entropy(theirs, x, y))
    assert close(weights(ours), weights(theirs))
    closure()
    with pytest.raises(RuntimeError, match=r"flatreg\.backward"):
        sam.step(closure)


def test_an_overflow_means_no_perturbation_and_intact_weights():
    x, y = images()
    model = small_net(batch_norm=False)
    sam = SAM(BASES["sgd"](model.parameters()), rho=0.1)
    start, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        return F.cross_entropy(model(x), y) * (float("inf") if len(seen) == 1 else 1.0)

    backward(sam, closure, model=model)
    assert same(seen[1], start) and same(weights(model), start)


def test_accumulated_gradients_are_kept():
    """Two micro-batches: each is a group of its own, the gradients add up."""
    (x, y), model = images(), small_net(batch_norm=False)
    sam = SAM(BASES["sgd"](model.parameters()), rho=0.1)
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        sam.zero_grad()
        backward(sam, cross_entropy(model, x[half], y[half]), model=model)
        parts.append([p.grad.clone() for p in model.parameters()])
    sam.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        backward(sam, cross_entropy(model, x[half], y[half]), model=model)
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        assert torch.equal(p.grad, a + b)


def test_a_loss_scale_changes_nothing():
    """GradScaler with scale 1024: after unscaling, the step is the unscaled one."""
    x, y = images()
    plain, scaled = small_net(batch_norm=False), small_net(batch_norm=False)
    one, two = SAM(BASES["sgd"](plain.parameters())), SAM(BASES["sgd"](scaled.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    for _ in range(3):
        backward(one, cross_entropy(plain, x, y), model=plain)
        one.step()
        one.zero_grad()
        backward(two, cross_entropy(scaled, x, y), model=scaled, scaler=scaler)
        scaler.unscale_(two)
        scaler.step(two)
        scaler.update()
        two.zero_grad()
    assert same(weights(plain), weights(scaled))


def test_under_accelerate_with_accumulation_clipping_and_a_scheduler():
    """`prepare`, `accumulate(2)` and clipping equal the same loop written out in plain torch."""
    (x, y), rho = images(), 0.1
    ours, theirs = small_net(batch_norm=False), small_net(batch_norm=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    sam = SAM(BASES["sgd"](ours.parameters()), rho=rho)
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
    model, optimizer, schedule = accelerator.prepare(ours, sam, schedule)
    objective = Objective(model, CrossEntropy(), [RelativeFlatness(strength=0.1)])
    for half in (slice(0, 4), slice(4, 8)) * 2:
        with accelerator.accumulate(model):
            backward(optimizer, objective.bind(x[half], y[half]), accelerator=accelerator)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    reference = SAM(BASES["sgd"](theirs.parameters()), rho=rho)
    plain = Objective(theirs, CrossEntropy(), [RelativeFlatness(strength=0.1)])
    for step in range(2):
        for half in (slice(0, 4), slice(4, 8)):
            bound = plain.bind(x[half], y[half])
            halved = lambda bound=bound: bound().total / 2  # noqa: E731
            backward(reference, halved, model=theirs)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        reference.param_groups[0]["lr"] = 0.1 * 0.5 ** (step + 1)
    assert same(weights(ours), weights(theirs))
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.25


def test_both_passes_see_one_attack_and_one_dropout_mask():
    x, y = images()
    model = small_net(dropout=0.5).train()
    inputs, masks = [], []
    model.register_forward_pre_hook(lambda _, a: inputs.append(a[0].detach().clone()))
    model[7].register_forward_hook(lambda _, a, out: masks.append((out != 0).clone()))
    sam = SAM(BASES["sgd"](model.parameters()), rho=0.0)
    torch.manual_seed(0)
    backward(sam, Objective(model, NFGSM(eps=0.1)).bind(x, y))
    assert torch.equal(inputs[-1], inputs[-2]) and torch.equal(masks[-1], masks[-2])
    state = torch.get_rng_state()
    backward(sam, Objective(model, NFGSM(eps=0.1)).bind(x, y))
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(inputs[-1], inputs[1])  # the next batch draws new noise


def test_batch_norm_moves_in_the_first_pass_alone():
    (x, y), model, reference = images(), small_net().train(), small_net().train()
    sam = SAM(BASES["sgd"](model.parameters()), rho=0.5)
    backward(sam, cross_entropy(model, x, y), model=model)
    reference(x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name))


def test_wraps_timms_optimizer_and_trains_a_timm_model():
    x, y = images(16, size=32)
    model = timm_net()
    base = create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
    sam = SAM(base, rho=0.05)
    assert len(sam.param_groups) == 2 and all(g["sam_rho"] == 0.05 for g in sam.param_groups)
    objective = Objective(model)
    losses = []
    for _ in range(20):
        losses.append(float(backward(sam, objective.bind(x, y)).total))
        sam.step()
        sam.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_bad_arguments_are_refused_in_one_line():
    model = small_net()
    base = BASES["sgd"](model.parameters())
    for options, message in (
        ({"rho": -1}, "rho must be >= 0 and finite, got -1"),
        ({"rho": float("nan")}, "rho must be >= 0 and finite, got nan"),
        ({"rho": float("inf")}, "rho must be >= 0 and finite, got inf"),
        ({"every": 0}, "every: expected a whole number from 1, got 0"),
        ({"every": 1.5}, "every: expected a whole number from 1, got 1.5"),
        ({"every": "2"}, "every: expected a whole number from 1, got '2'"),
        ({"begin": -1}, "begin: expected a whole number from 0, got -1"),
        ({"begin": 0.1 * 25, "every": 2}, "begin: expected a whole number from 0, got 2.5"),
        ({"begin": float("nan")}, "begin: expected a whole number from 0, got nan"),
        ({"micro_batches": 0}, "micro_batches: expected a whole number from 1, got 0"),
        ({"micro_batches": 2.5}, "micro_batches: expected a whole number from 1, got 2.5"),
        ({"sync_perturbation": "no"}, "sync_perturbation: expected True or False, got 'no'"),
        ({"ascent": Relative()}, "Relative needs model"),
    ):
        with pytest.raises(ValueError, match=message):
            SharpnessAware(base, **options)
    wrapped = SAM(base)
    with pytest.raises(ValueError, match=r"not sharpness-aware yet, got a SharpnessAware$"):
        SAM(wrapped)
    wrapped.param_groups[0]["sam_rho"] = -0.1
    with pytest.raises(ValueError, match=r"sam_rho of a group must be >= 0 and finite, got -0\.1"):
        wrapped.parameter_states()
    wrapped.param_groups[0]["sam_rho"] = 0.1
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\), got 1.0"):
        WSAM(base, gamma=1.0)
    with pytest.raises(TypeError, match="expected an optimizer that exists, got the class SGD"):
        SAM(torch.optim.SGD, rho=1)
    with pytest.raises(TypeError, match="expected a module after the optimizer, got a list"):
        HeadRelativeSAM(base, list(model.parameters()))
    with pytest.raises(TypeError, match="expected a module after the optimizer, got a list"):
        RelativeSAM(base, model=list(model.parameters()))
    with pytest.raises(TypeError, match=r"got a float: give settings by name, as rho=0\.05$"):
        SAM(base, 0.05)
    with pytest.raises(AttributeError, match=r"no first_step in flatreg: write flatreg.backward"):
        wrapped.first_step(zero_grad=True)
    with pytest.raises(ValueError, match="needs its model"):
        backward(SAM(BASES["sgd"](model.parameters())), lambda: torch.zeros(()))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrap", [SAM, GSAM, LookSAM], ids=lambda w: w.__name__)
def test_step_with_a_closure_equals_backward(base, wrap):
    x, y = images()
    nets = [small_net(batch_norm=False) for _ in range(2)]
    ours, theirs = (wrap(BASES[base](net.parameters()), rho=0.1) for net in nets)

    def closure():
        ours.zero_grad()
        loss = F.cross_entropy(nets[0](x), y)
        loss.backward()
        return loss

    for _ in range(7):
        ours.step(closure)
        backward(theirs, cross_entropy(nets[1], x, y), model=nets[1])
        theirs.step()
        theirs.zero_grad()
    assert close(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize("wrap", [SAM, GSAM, LookSAM], ids=lambda w: w.__name__)
def test_perturbed_equals_backward(wrap):
    x, y = images()
    nets = [small_net(batch_norm=False) for _ in range(2)]
    ours, theirs = (wrap(BASES["sgd"](net.parameters()), rho=0.1) for net in nets)
    for _ in range(7):
        F.cross_entropy(nets[0](x), y).backward()
        with ours.perturbed():
            F.cross_entropy(nets[0](x), y).backward()
        backward(theirs, cross_entropy(nets[1], x, y), model=nets[1])
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert close(weights(nets[0]), weights(nets[1]))


def test_a_step_on_gradients_of_loss_backward_warns_once():
    (x, y), model = images(), small_net()
    sam = SAM(BASES["sgd"](model.parameters()))
    sam.step()  # no gradients: nothing to say
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(
        UserWarning, match=r"plain step of the base optimizer; call flatreg\.backward"
    ):
        sam.step()
    sam.step()
    backward(sam, cross_entropy(model, x, y), model=model)
    sam.step()


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "after loading"])
def test_a_scheduler_may_be_attached_at_any_time(when):
    (x, y), model = images(), small_net()
    base = BASES["adamw"](model.parameters())
    attach = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    if when == "before wrapping":
        schedule, sam = attach(base), SAM(base)
    else:
        sam = SAM(base)
        if when == "after loading":
            sam.load_state_dict(copy.deepcopy(sam.state_dict()))
        schedule = attach(sam)
    for expected in (5e-3, 2.5e-3):
        backward(sam, cross_entropy(model, x, y), model=model)
        sam.step()
        schedule.step()
        assert base.param_groups[0]["lr"] == sam.param_groups[0]["lr"] == expected


def test_groups_that_came_later_are_perturbed_too():
    (x, y), model = images(), small_net(batch_norm=False)
    sam, seen = SAM(torch.optim.SGD(model[8].parameters(), lr=0.1), rho=0.2), []
    sam.add_param_group({"params": list(model[0].parameters())})
    sam.base.add_param_group({"params": list(model[3].parameters()), "sam_rho": 0.2})
    backward(
        sam, lambda: (seen.append(weights(model)), F.cross_entropy(model(x), y))[1], model=model
    )
    assert all(not torch.equal(seen[0][k], seen[1][k]) for k in seen[0])


def test_weights_stay_in_their_memory_and_bf16_does_not_drift():
    """Flat buffers and views of weights stay valid; 20 steps at learning rate 0 change no bit."""
    (x, y), model = images(), small_net(batch_norm=False).bfloat16()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5)
    start, memory = weights(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(20):
        backward(sam, lambda: F.cross_entropy(model(x.bfloat16()), y), model=model)
        sam.step()
        sam.zero_grad()
    assert same(weights(model), start)
    assert [p.data_ptr() for p in model.parameters()] == memory


def test_frozen_and_unused_parameters_are_left_alone():
    x, y = images()
    model = small_net(batch_norm=False)
    model[0].weight.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(3))
    model.forward = lambda x: torch.nn.Sequential.forward(model[:], x)
    before = weights(model)
    sam = SAM(BASES["sgd"](model.parameters()), rho=0.1)
    backward(sam, cross_entropy(model, x, y), model=model)
    sam.step()
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["unused"], after["unused"])
    assert not torch.equal(before["8.weight"], after["8.weight"])


def test_hooks_on_the_steps_of_all_optimizers_are_called_once_a_step():
    """Torch calls them on every optimizer that steps, and the base optimizer steps within."""
    (x, y), net, calls = images(), small_net(), []
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1))
    sam.base.register_step_post_hook(lambda *_: calls.append("its own"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        for _ in range(2):
            backward(sam, cross_entropy(net, x, y), model=net)
            sam.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == 2 * ["before", "its own", "after"]
