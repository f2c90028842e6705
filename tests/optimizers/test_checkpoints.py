"""Every method through every way to save an optimizer: resumed equals uninterrupted exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from by_hand import METHODS
from cases import images, small_net
from oracles import flat_weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from flatreg import SAM, FriendlySAM, LookSAM, RandomSAM, backward

SAVED = METHODS | {"RandomSAM": lambda base, net: RandomSAM(base, rho=0.1)}
X, Y = images()


def make(method, seed=0, base=torch.optim.AdamW, **options):
    net = small_net(seed, batch_norm=False)
    return net, SAVED[method](base(net.parameters(), **({"lr": 1e-2} | options)), net)


def steps(net, optimizer, count, start=0):
    for i in range(start, start + count):
        torch.manual_seed(i)
        rows = torch.arange(4) + i % 5
        backward(optimizer, lambda rows=rows: F.cross_entropy(net(X[rows]), Y[rows]), model=net)
        optimizer.step()
        optimizer.zero_grad()


def by_torch(first, second, folder):
    torch.save([first[0].state_dict(), first[1].state_dict()], folder / "half.pt")
    weights, state = torch.load(folder / "half.pt", weights_only=True)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)


def by_distributed(first, second, folder, **options):
    options = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, saved, options=options)


def by_distributed_flat(first, second, folder):
    by_distributed(first, second, folder, flatten_optimizer_state_dict=True)


def by_distributed_full(first, second, folder):
    by_distributed(first, second, folder, full_state_dict=True, cpu_offload=True)


def by_accelerate(first, second, folder):
    for (net, optimizer), action in ((first, "save_state"), (second, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(net, optimizer)
        getattr(accelerator, action)(folder)


SAVERS = [by_torch, by_distributed, by_distributed_flat, by_distributed_full, by_accelerate]


@pytest.mark.parametrize("saver", SAVERS, ids=lambda saver: saver.__name__)
@pytest.mark.parametrize("method", SAVED)
def test_resumed_equals_uninterrupted(method, saver, tmp_path):
    """Saved after 3 of 6 steps; into fresh objects of other weights, which have stepped or not."""
    straight = make(method)
    steps(*straight, 3)
    for stepped in (0, 2):
        resumed = make(method, seed=1)
        steps(*resumed, stepped)
        saver(straight, resumed, tmp_path)
        steps(*resumed, 3, start=3)
        whole = copy.deepcopy(straight)
        steps(*whole, 3, start=3)
        assert torch.equal(flat_weights(resumed[0]), flat_weights(whole[0]))
    assert not torch.equal(flat_weights(whole[0]), flat_weights(straight[0]))


@pytest.mark.parametrize("saver", SAVERS, ids=lambda saver: saver.__name__)
@pytest.mark.parametrize("method", ["FriendlySAM", "LookSAM", "spaced"])
def test_a_checkpoint_from_before_the_first_step_remembers_nothing(method, saver, tmp_path):
    straight, resumed = make(method), make(method, seed=1)
    saver(straight, resumed, tmp_path)
    assert straight[1].perturbs_now == (method != "spaced")  # looking at the state is no step
    steps(*straight, 3)
    steps(*resumed, 3)
    assert torch.equal(flat_weights(straight[0]), flat_weights(resumed[0]))


@pytest.mark.parametrize("saver", SAVERS[:1] + SAVERS[-1:], ids=lambda saver: saver.__name__)
def test_memory_keeps_its_own_precision(saver, tmp_path):
    """In float32 beside bfloat16 weights, where torch casts a loaded state to the weights' type."""

    def run(saver=None):
        net = small_net(batch_norm=False).bfloat16()
        pair = net, FriendlySAM(torch.optim.AdamW(net.parameters(), lr=1e-2), rho=0.5)
        for i in range(8):
            if saver and i == 4:
                saver(pair, again := run.fresh(), tmp_path)
                pair = again
            closure = lambda m=pair[0]: F.cross_entropy(m(X.bfloat16()), Y)  # noqa: E731
            backward(pair[1], closure, model=pair[0])
            pair[1].step()
            pair[1].zero_grad()
        return pair

    def fresh():
        net = small_net(seed=1, batch_norm=False).bfloat16()
        return net, FriendlySAM(torch.optim.AdamW(net.parameters(), lr=1e-2), rho=0.5)

    run.fresh = fresh
    one, two = run(), run(saver)
    memories = [[s.memory["friendly_mean"] for s in o.parameter_states()] for _, o in (one, two)]
    assert all(m.dtype == torch.float32 for m in memories[1])
    assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))
    assert torch.equal(flat_weights(one[0]), flat_weights(two[0]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adadelta])
def test_the_base_optimizer_loads_the_wrappers_checkpoint_and_the_other_way(base):
    net, sam = make("FriendlySAM", base=base)
    steps(net, sam, 3)
    plain = base(net.parameters(), lr=0.5)
    plain.load_state_dict(copy.deepcopy(sam.state_dict()))
    assert plain.param_groups[0]["lr"] == 1e-2
    plain = base(net.parameters(), lr=0.25)
    F.cross_entropy(net(X), Y).backward()
    plain.step()
    other, again = make("FriendlySAM", base=base)
    steps(other, again, 2)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert again.param_groups[0]["lr"] == 0.25 and again.param_groups[0]["sam_rho"] == 0.1
    assert not any(s.memory for s in again.parameter_states())
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert again.state[q].keys() == plain.state[p].keys()


@pytest.mark.parametrize("method", ["FriendlySAM", "LookSAM"])
def test_a_base_never_sees_what_is_not_its_own(method):
    """As one does that initialises a state where it is empty and iterates over what it finds."""

    class Strict(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                assert group.keys() == plain.param_groups[0].keys()
                for p in group["params"]:
                    state = self.state[p]
                    if len(state) == 0:
                        state["count"] = torch.zeros(())
                    for value in state.values():
                        value += 1
            return super().step(closure)

    plain = torch.optim.SGD(small_net().parameters(), lr=0.1)
    net, optimizer = make(method, base=Strict)
    memories = []
    for i in range(3):
        steps(net, optimizer, 1, start=i)
        memories.append([dict(s.memory) for s in optimizer.parameter_states()])
    assert all(state["count"] == 3 for state in optimizer.state.values())
    assert all(memory for memory in memories[-1])


def test_a_first_batch_that_overflows_starts_no_mean():
    """As under a GradScaler, whose first scale is too large: the mean starts with the next one."""
    net, optimizer = make("FriendlySAM")
    reference, plain = make("FriendlySAM")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    closure = lambda: F.cross_entropy(net(X), Y) * torch.inf  # noqa: E731
    backward(optimizer, closure, model=net, scaler=scaler)
    scaler.step(optimizer)  # skips
    optimizer.zero_grad()
    steps(net, optimizer, 3)
    steps(reference, plain, 3)
    assert torch.equal(flat_weights(net), flat_weights(reference))


def test_looking_at_the_state_of_an_optimizer_warns_of_nothing_and_counts_nothing():
    for wrap in (SAM, FriendlySAM, LookSAM):
        net = small_net()
        optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1), begin=1)
        before = flat_weights(net)
        for _ in range(3):
            groups = get_optimizer_state_dict(net, optimizer)["param_groups"]
        assert groups[0]["sam_steps"] == 0 and torch.equal(flat_weights(net), before)
