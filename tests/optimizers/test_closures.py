"""What a closure may do, what it is refused for, and which tensors get a gradient from it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from by_hand import DECAY, METHODS, MOMENTUM, estimate, note_step
from cases import images, small_net
from oracles import flat_gradient, flat_weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatreg import ASAM, GSAM, SAM, LookSAM, Objective, RandomSAM, backward

X, Y = images()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=MOMENTUM)


def wrapped(method="SAM", dropout=0.0, dtype=torch.float64):
    net = small_net(batch_norm=False, dropout=dropout, dtype=dtype)
    return net, METHODS[method](sgd(net.parameters()), net)


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


# Leaves that are in no module: a temperature, class centres, the images themselves


@pytest.mark.parametrize("accumulated", [False, True], ids=["", "accumulated"])
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_tensor_outside_the_model_gets_its_gradient_once(method, accumulated):
    """That at the perturbed weights, beside what it had; also on steps that do not perturb."""
    net, optimizer = wrapped(method)
    leaf = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    memory, seen = {}, []
    own = X.double()

    def closure():
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return F.cross_entropy(net(own) / leaf, Y)

    for step in range(3):
        seen.clear()
        leaf.grad = torch.full((), 3.0, dtype=torch.float64) if accumulated else None
        loss = lambda m: F.cross_entropy(m(own) / leaf.detach(), Y)  # noqa: E731
        expected = estimate(method, net, loss, step, memory)
        backward(optimizer, closure, model=net)
        there = small_net(batch_norm=False, dtype=torch.float64)
        there.load_state_dict(seen[-1])
        t = leaf.detach().clone().requires_grad_()
        F.cross_entropy(there(own) / t, Y).backward()
        torch.testing.assert_close(leaf.grad, t.grad + (3.0 if accumulated else 0.0))
        torch.testing.assert_close(gradient(net), expected, rtol=1e-6, atol=1e-9)
        note_step(net, memory)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= DECAY
        optimizer.zero_grad()


def test_a_pass_that_raises_leaves_such_a_tensor_its_gradient():
    net, optimizer = wrapped()
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaf.grad = torch.full((), 3.0, dtype=torch.float64)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("boom")

    closure = lambda: leaf * F.cross_entropy(Fails.apply(net(X.double())), Y)  # noqa: E731
    with pytest.raises(KeyError, match="boom"):
        backward(optimizer, closure, model=net)
    assert leaf.grad == 3.0


# Reentrant checkpoints, whose inside is in no graph


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(256, 8), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.double()

    def forward(self, x):
        h = self.stem(x.flatten(1))
        if self.reentrant is None:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


SCOPES = {
    "all": lambda m: None,
    "block": lambda m: m.block,
    "part of the block": lambda m: m.block[2],
    "block and head": lambda m: [*m.block.parameters(), *m.head.parameters()],
    "head": lambda m: m.head,
    "stem": lambda m: m.stem,
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wrap", [SAM, ASAM, GSAM, LookSAM], ids=lambda w: w.__name__)
def test_a_scope_within_a_checkpoint_is_perturbed(wrap, reentrant):
    for name, scope in SCOPES.items():
        gradients = []
        for kind in (None, reentrant):
            net = Checkpointed(kind)
            optimizer = wrap(sgd(net.parameters()), rho=0.5, scope=scope(net))
            for _ in range(2):
                optimizer.zero_grad()
                backward(optimizer, lambda n=net: F.cross_entropy(n(X.double()), Y), model=net)
            gradients.append(gradient(net))
        assert torch.equal(*gradients), name
        still = flat_gradient(Checkpointed(None), lambda m: F.cross_entropy(m(X.double()), Y))
        assert not torch.allclose(gradients[0], still, rtol=1e-3), name


# Random streams


def masks_of(net):
    seen = []
    net[7].register_forward_hook(lambda _, args, out: seen.append((out == 0) & (args[0] != 0)))
    return seen


def lbfgs_closure(optimizer, net):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X.double()), Y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("method", METHODS)
def test_step_with_a_closure_and_perturbed_replay_the_masks_and_equal_backward(method):
    """Over three steps, whose masks differ from each other."""
    ways = {}
    for way in ("backward", "closure", "perturbed"):
        net, optimizer = wrapped(method, dropout=0.5)
        masks = masks_of(net)
        torch.manual_seed(3)
        for _ in range(3):
            masks.clear()
            if way == "backward":
                backward(optimizer, lambda n=net: F.cross_entropy(n(X.double()), Y), model=net)
                optimizer.step()
            elif way == "closure":
                optimizer.step(lbfgs_closure(optimizer, net))
            else:
                optimizer.zero_grad()
                replay = optimizer.record_rng()
                F.cross_entropy(net(X.double()), Y).backward()
                with optimizer.perturbed(replay):
                    F.cross_entropy(net(X.double()), Y).backward()
                optimizer.step()
            optimizer.zero_grad()
            assert all(torch.equal(mask, masks[0]) for mask in masks) and masks[0].any()
        ways[way] = flat_weights(net), torch.get_rng_state()
    for weights, stream in ways.values():
        torch.testing.assert_close(weights, ways["backward"][0], rtol=1e-9, atol=1e-12)
        assert torch.equal(stream, ways["backward"][1])


def test_a_random_direction_is_drawn_beside_the_streams_of_the_passes():
    for dropout in (0.0, 0.5):
        net = small_net(batch_norm=False, dropout=dropout, dtype=torch.float64)
        optimizer, masks = RandomSAM(sgd(net.parameters()), rho=0.1), masks_of(net)
        directions = []
        for _ in range(2):
            optimizer.zero_grad()
            before, replay = flat_weights(net), optimizer.record_rng()
            F.cross_entropy(net(X.double()), Y).backward()
            with optimizer.perturbed(replay if dropout else None):
                directions.append(flat_weights(net) - before)
                F.cross_entropy(net(X.double()), Y).backward()
            assert torch.equal(masks[-1], masks[-2]) and masks[-1].any() == (dropout > 0)
        assert not torch.allclose(*directions)
        assert dropout == 0 or not torch.equal(masks[0], masks[-1])


def test_perturbed_without_a_replay_refuses_a_pass_that_draws():
    for dropout in (0.0, 0.5):
        net, optimizer = wrapped(dropout=dropout)
        before = flat_weights(net)
        F.cross_entropy(net(X.double()), Y).backward()
        if dropout == 0.0:
            with optimizer.perturbed():
                F.cross_entropy(net(X.double()), Y).backward()
            continue
        with (
            pytest.raises(RuntimeError, match=r"call replay = optimizer.record_rng\(\)"),
            optimizer.perturbed(),
        ):
            F.cross_entropy(net(X.double()), Y).backward()
        assert torch.equal(flat_weights(net), before)


# Optimizers that step inside backward


def step_in_hook(p):
    inner = torch.optim.SGD([p], lr=0.1)

    def hook(p):
        inner.step()
        inner.zero_grad()

    p.register_post_accumulate_grad_hook(hook)


def step_by_data(p):
    """As LOMO does, unseen by torch's count of writes."""
    p.register_hook(lambda g: p.data.add_(g, alpha=-0.1))


def step_in_accumulator(p):
    """As torch's older `_apply_optimizer_in_backward`, at the node that accumulates."""
    p.accumulator = p.view_as(p).grad_fn.next_functions[0][0]

    def hook(*_):
        with torch.no_grad():
            p.add_(p.grad, alpha=-0.1)

    p.accumulator.register_hook(hook)


IN_BACKWARD = [step_in_hook, step_by_data, step_in_accumulator]


@pytest.mark.parametrize("inside", IN_BACKWARD, ids=lambda i: i.__name__)
@pytest.mark.parametrize("method", [*METHODS, "RandomSAM", "head objective"])
def test_an_optimizer_that_steps_inside_backward_is_refused(method, inside):
    net = small_net(batch_norm=False)
    if method == "head objective":
        optimizer = SAM(sgd(net.parameters()), scope=net[8])
        closure = Objective(net).bind(X, Y)
    else:
        wrap = METHODS.get(method, lambda base, net: RandomSAM(base))
        optimizer, closure = wrap(sgd(net.parameters()), net), lambda: F.cross_entropy(net(X), Y)
    for p in net.parameters():
        inside(p)
    with pytest.raises(RuntimeError, match="an optimizer steps inside it"):
        for _ in range(2):  # that which is spaced out perturbs in its second step
            backward(optimizer, closure, model=net)
            optimizer.step()


@pytest.mark.parametrize("inside", IN_BACKWARD, ids=lambda i: i.__name__)
def test_so_it_is_in_a_closure_of_step(inside):
    net, optimizer = wrapped()
    for p in net.parameters():
        inside(p)
    with pytest.raises(RuntimeError, match="an optimizer steps inside it"):
        optimizer.step(lbfgs_closure(optimizer, net))


def test_hooks_that_leave_weights_alone_and_weights_that_a_forward_writes_are_not():
    """Gradients that are scaled or logged by hooks; an embedding that renormalises its rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 5)).double()
    for p in net[2].parameters():
        p.register_hook(lambda g: 2 * g)
        p.register_post_accumulate_grad_hook(lambda p: None)
    tokens = torch.randint(7, (8, 2))
    for how in ("backward", "closure"):
        optimizer = SAM(sgd(net.parameters()), rho=0.1)
        optimizer.zero_grad()
        if how == "backward":
            backward(optimizer, lambda: F.cross_entropy(net(tokens), Y), model=net)
            optimizer.step()
        else:

            def closure(optimizer=optimizer):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(tokens), Y)
                loss.backward()
                return loss

            optimizer.step(closure)


# First mistakes


def test_first_mistakes_say_in_one_line_what_to_write():
    net, optimizer = wrapped(dtype=torch.float32)
    plain = sgd(net.parameters())
    loss = lambda: F.cross_entropy(net(X), Y)  # noqa: E731

    def calls_backward():
        value = loss()
        value.backward()
        return value

    mistakes = {
        "expected a closure that computes the loss, got a Tensor": loss(),
        "expected a closure, got a Objective without a batch": Objective(net),
        "expected a closure that computes the loss, got a Sequential": net,
        "expected a closure, got a loss: write backward": Objective(net)(X, Y),
        "the closure changed gradients": calls_backward,
        "as a tensor, it returned None": lambda: None,
        "as a tensor, it returned a float": lambda: loss().item(),
        "as a tensor, it returned a tuple": lambda: (loss(), net(X)),
        "a scalar loss, it has shape": lambda: F.cross_entropy(net(X), Y, reduction="none"),
        "has no graph": lambda: loss().detach(),
    }
    for message, closure in mistakes.items():
        for chosen in (optimizer, plain):
            before = flat_weights(net)
            with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as caught:
                backward(chosen, closure, model=net)
            assert "\n" not in str(caught.value)
            assert torch.equal(flat_weights(net), before)
            net.zero_grad()
    for several in ([optimizer, plain], net):
        with pytest.raises(TypeError, match="expected one optimizer, got a"):
            backward(several, loss, model=net)
    for message, argument in {
        "step expected a closure or nothing, got a Tensor": loss(),
        "the closure of step did not call backward": loss,
    }.items():
        with pytest.raises((TypeError, RuntimeError), match=message):
            optimizer.step(argument)


def test_an_optimizer_of_another_model_is_refused():
    net, other = small_net(), small_net(seed=1)
    temperature = torch.zeros((), requires_grad=True)
    scaled = lambda: F.cross_entropy(net(X) * temperature.exp(), Y)  # noqa: E731
    for optimizer in (sgd(other.parameters()), SAM(sgd(other.parameters()))):
        with pytest.raises(ValueError, match=r"^the optimizer got no gradient, and none of its"):
            backward(optimizer, Objective(net).bind(X, Y))
    frozen = small_net(seed=2).requires_grad_(False)
    copies = [p.detach().double().requires_grad_() for p in net.parameters()]
    with_it = [*other.parameters(), temperature]
    for allowed in ([temperature], list(frozen.parameters()), with_it, copies):
        backward(sgd(allowed), scaled, model=net)
    with pytest.raises(ValueError, match="got no gradient"):
        backward(SAM(sgd(copies)), scaled, model=net)


def test_methods_say_what_they_take():
    net = small_net()
    for call in (
        lambda m: m(net.parameters(), torch.optim.AdamW),
        lambda m: m(net.parameters(), base_optimizer=torch.optim.SGD, lr=0.1),
        lambda m: m(torch.optim.SGD, lr=0.1),
        lambda m: m(net),
    ):
        for method in (SAM, ASAM, GSAM, LookSAM, RandomSAM):
            with pytest.raises(TypeError, match=r"write SAM\(torch.optim.AdamW\(model.parameters"):
                call(method)


@pytest.mark.parametrize("method", [SAM, GSAM])
def test_zeros_before_a_closure_are_no_gradients(method):
    found = []
    for zeros in (False, True):
        net = small_net()
        optimizer = method(sgd(net.parameters()))

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(net(X), Y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.zero_grad(set_to_none=not zeros)
            optimizer.step(closure)
        found.append(flat_weights(net))
    assert torch.equal(*found)


def test_a_model_that_is_not_the_closures_is_refused():
    net, other = small_net(), small_net(seed=3)
    optimizer, bound = SAM(sgd(net.parameters())), Objective(net).bind(X, Y)
    with pytest.raises(ValueError, match="model: expected that of the closure, a Sequential"):
        backward(optimizer, bound, model=other)
    for model in (net, nn.ModuleList([net, other])):
        backward(optimizer, bound, model=model)


@pytest.mark.parametrize("method", [SAM, GSAM])
def test_a_loss_from_before_the_closure_is_refused(method):
    net = small_net()
    loss, before = F.cross_entropy(net(X), Y), flat_weights(net)
    with pytest.raises(RuntimeError, match="compute it within the closure, as lambda") as error:
        backward(method(sgd(net.parameters())), lambda: loss, model=net)
    assert "\n" not in str(error.value) and torch.equal(flat_weights(net), before)


class Centred(nn.Module):
    """A loss with a running centre, as DINO's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(5, dtype=torch.float64))

    def forward(self, z):
        loss = F.cross_entropy(z - self.centre, Y)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(z.mean(0))
        return loss


class Loop:
    """A trainer of one's own."""

    def __init__(self, net, loss):
        self.net, self.loss = net, loss

    def compute(self):
        return self.loss(self.net(X.double()))


def by_name(net, loss):
    return lambda: loss(net(X.double()))


def in_a_list(net, loss):
    losses = [loss]
    return lambda: sum(part(net(X.double())) for part in losses)


def by_another_function(net, loss):
    def compute():
        return loss(net(X.double()))

    return lambda: 1.0 * compute()


def in_a_partial(net, loss):
    return partial(lambda net, loss: loss(net(X.double())), net, loss=loss)


def of_an_object(net, loss):
    return Loop(net, loss).compute


def of_self(net, loss):
    loop = Loop(net, loss)
    return lambda: loop.compute()


HOLDERS = [by_name, in_a_list, by_another_function, in_a_partial, of_an_object, of_self]


@pytest.mark.parametrize("take", ["backward", "step"])
@pytest.mark.parametrize("holder", HOLDERS, ids=lambda f: f.__name__)
def test_modules_beside_the_model_count_a_batch_once(holder, take):
    """A loss with buffers in a bare closure: it is no part of the model that is given."""
    net, loss = small_net(dtype=torch.float64).train(), Centred()
    closure, once = holder(net, loss), copy.deepcopy(nn.ModuleList([net, loss]))
    once[1](once[0](X.double()))
    optimizer = SAM(sgd(net.parameters()), rho=0.5)
    if take == "backward":
        backward(optimizer, closure, model=net)
    else:

        def stepping():
            optimizer.zero_grad()
            total = closure()
            total.backward()
            return total

        optimizer.step(stepping)
    for name, buffer in nn.ModuleList([net, loss]).named_buffers():
        torch.testing.assert_close(buffer, once.get_buffer(name), rtol=0, atol=0)
