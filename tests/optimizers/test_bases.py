"""Other people's optimizers under and around the wrapper, against a SAM step written by hand."""

import copy

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from by_hand import METHODS
from cases import images, small_net
from oracles import flat_weights
from timm.optim import Lookahead
from torch import nn

from flatreg import ASAM, SAM, FriendlySAM, LookSAM, RelativeSAM, SharpnessAware, backward
from flatreg.optimizers.parameter_state import OURS
from flatreg.optimizers.sharpness_aware import find_wrapper

RHO, STEPS = 0.1, 3
torch.manual_seed(0)
X, Y = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss(model):
    return F.cross_entropy(model(X), Y)


def sam_gradients(model, parameters):
    first = torch.autograd.grad(loss(model), parameters)
    length = torch.sqrt(sum((g**2).sum() for g in first))
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, first, strict=True):
            p += RHO * g / length
    second = torch.autograd.grad(loss(model), parameters)
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    return second


def by_hand(make, steps=STEPS):
    model = net()
    base = make(model)
    own = [p for group in base.param_groups for p in group["params"]]
    torch.manual_seed(1)
    for _ in range(steps):
        for p, g in zip(own, sam_gradients(model, own), strict=True):
            p.grad = g
        base.step()
        base.zero_grad()
    return flat_weights(model)


def by_wrapper(make, steps=STEPS):
    model = net()
    optimizer = make(model)
    torch.manual_seed(1)
    for _ in range(steps):
        backward(optimizer, lambda: loss(model), model=model)
        optimizer.step()
        optimizer.zero_grad()
    return flat_weights(model)


def off(make, steps=STEPS):
    """How far the wrapped one is from the hand-written one, as a fraction of the movement."""
    got = by_wrapper(lambda model: SAM(make(model), rho=RHO), steps)
    expected = by_hand(make, steps)
    moved = (expected - flat_weights(net())).abs().max()
    if moved == 0 and steps == STEPS:
        return off(make, steps=12)  # some only collect at first
    return float((got - expected).abs().max() / moved)


@pytest.fixture
def uncompiled():
    """Some of them compile their step, which takes longer than all the rest."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


NEEDS_CUDA = ("bnb", "fused")


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_every_optimizer_of_timm(uncompiled):
    wrong, refused = [], []
    for name in timm.optim.list_optimizers():
        if name.startswith(NEEDS_CUDA):
            continue

        def make(model, name=name):
            return timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2)

        try:
            if not (distance := off(make)) <= 1e-6:
                wrong.append(f"{name}: {distance}")
        except ValueError as error:
            refused.append(f"{name}: {error}")
    assert not wrong, wrong
    assert len(refused) == 1 and refused[0].startswith("adahessian: Adahessian needs second")


def matrices_apart(cls, model):
    of = lambda few: [p for p in model.parameters() if (p.ndim < 2) == few]  # noqa: E731
    return cls([{"params": of(few), "use_muon": not few} for few in (False, True)], lr=1e-2)


THEIR_OWN_WAY = {
    **dict.fromkeys(("adago", "adamuon", "muon", "muonclip", "normuon"), matrices_apart),
    "adammini": lambda cls, model: cls(model, lr=1e-2),
    "ranger21": lambda cls, model: cls(model.parameters(), num_iterations=9, lr=1e-2),
    "sara": lambda cls, model: cls(model.parameters(), lr=1e-2, threshold=0.2),
    "spectralsphere": lambda cls, model: cls([p for p in model.parameters() if p.ndim > 1]),
}
REFUSED = {  # before any step, but for those that say nothing of it before
    "adahessian": "AdaHessian needs second derivatives",
    "alig": "AliG needs a closure",
    "bsam": "BSAM needs a closure",
    "lbfgs": "LBFGS needs a closure",
    "lomo": "an optimizer steps inside it",
    "adalomo": "an optimizer steps inside it",
    "sophiah": "SophiaH needs second derivatives",
}
NOT_HERE = {
    "demo": "wants a process group",
    "distributedmuon": "wants a process group",
    "fadam": "cannot step in float64",
    "soap": "takes the eigenvectors of a matrix of rank one: rounding decides",
}


def test_every_optimizer_of_pytorch_optimizer(uncompiled):
    theirs = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    wrong = []
    for name in theirs.get_supported_optimizers():
        cls = theirs.load_optimizer(name)
        build = THEIR_OWN_WAY.get(name, lambda cls, model: cls(model.parameters(), lr=1e-2))
        make = lambda model, cls=cls, build=build: build(cls, model)  # noqa: E731
        if name not in REFUSED and name not in NOT_HERE:
            if not (distance := off(make)) <= 1e-6:
                wrong.append(f"{name}: {distance}")
    assert not wrong, wrong


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_base_says_so_in_one_line(name):
    theirs = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    model = net()
    cls = theirs.load_optimizer(name)
    build = {
        "bsam": lambda: cls(model.parameters(), num_data=32),
        "lomo": lambda: cls(model),
        "adalomo": lambda: cls(model),
    }
    base = build.get(name, lambda: cls(model.parameters(), lr=1e-2))()
    with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]) as caught:
        optimizer = SAM(base)
        backward(optimizer, lambda: loss(model), model=model)
        optimizer.step()
    assert "\n" not in str(caught.value)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(optimizer):
    """A wrapper that has to be told that it trains."""
    optimizer.train()
    return optimizer


def others():
    found = {"timm Lookahead": lambda base: Lookahead(base, k=2)}
    try:
        import pytorch_optimizer as theirs

        found |= {
            "Lookahead": lambda base: theirs.Lookahead(base, k=2),
            "ScheduleFreeWrapper": lambda base: trained(theirs.ScheduleFreeWrapper(base)),
            "TRAC": theirs.TRAC,
            "OrthoGrad": theirs.OrthoGrad,
        }
    except ImportError:
        pass
    try:
        from schedulefree import ScheduleFreeWrapper

        found["schedulefree"] = lambda base: trained(
            ScheduleFreeWrapper(base, momentum=0.9, weight_decay_at_y=0)
        )
    except ImportError:
        pass
    return found


WRAPPERS = others()


@pytest.mark.parametrize("around", [True, False], ids=["around SAM", "within SAM"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_in_both_orders(name, around):
    wrap = WRAPPERS[name]
    if around:
        got = by_wrapper(lambda model: wrap(SAM(sgd(model), rho=RHO)))
    else:
        got = by_wrapper(lambda model: SAM(wrap(sgd(model)), rho=RHO))
    torch.testing.assert_close(got, by_hand(lambda m: wrap(sgd(m))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("around", [True, False], ids=["around", "within"])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("method", [FriendlySAM, LookSAM], ids=lambda m: m.__name__)
def test_wrappers_resume_in_both_orders(method, name, around):
    wrap = WRAPPERS[name]

    def make(model):
        one = method(sgd(model), rho=RHO) if around else wrap(sgd(model))
        return wrap(one) if around else method(one, rho=RHO)

    def steps(model, optimizer, count):
        for _ in range(count):
            backward(optimizer, lambda: loss(model), model=model)
            optimizer.step()
            optimizer.zero_grad()

    straight, resumed = net(), net()
    first, second = make(straight), make(resumed)
    steps(straight, first, 3)
    saved = copy.deepcopy((straight.state_dict(), first.state_dict()))
    steps(straight, first, 3)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    steps(resumed, second, 3)
    torch.testing.assert_close(flat_weights(resumed), flat_weights(straight), rtol=0, atol=0)


class Guarded(torch.optim.SGD):
    """Acts on every group it gets, and forbids more than one, as LBFGS and Shampoo's kin."""

    def __init__(self, *args, **options):
        self.added = 0
        super().__init__(*args, **options)

    def add_param_group(self, param_group):
        self.added += 1
        assert self.added == 1 and len(param_group["params"]) > 0
        super().add_param_group(param_group)


@pytest.mark.parametrize("method", METHODS)
def test_wrapping_adds_no_group_and_changes_no_setting(method):
    model = small_model()
    base = Guarded(model.parameters(), lr=0.1, momentum=0.9)
    groups, state, defaults = base.param_groups, base.state, dict(base.defaults)
    plain_step = torch.optim.Optimizer.step
    optimizer = METHODS[method](base, model)
    assert base.added == 1 and base.param_groups is groups and base.state is state
    assert base.defaults == defaults and len(state) == 0
    assert torch.optim.Optimizer.step is plain_step
    assert groups[0].keys() - set(OURS) == defaults.keys() | {"params"}
    assert optimizer.param_groups is groups and optimizer.defaults is base.defaults


def small_model():
    return small_net(batch_norm=False)


class Averaged:
    """Around another, with a state of its own that it does not save, in a form of its own."""

    def __init__(self, base, standard):
        self.inner, self.standard, self.defaults = base, standard, base.defaults
        self.param_groups, self.state = base.param_groups, {}

    def step(self, closure=None):
        self.inner.step()

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        saved = self.inner.state_dict()
        own = self.inner.defaults.keys() | {"params"}  # and no entry that it does not know
        groups = [{k: v for k, v in group.items() if k in own} for group in saved["param_groups"]]
        saved = {"state": saved["state"], "param_groups": groups}
        return saved if self.standard else {"inner": saved}

    def load_state_dict(self, state_dict):
        assert len(state_dict) == (2 if self.standard else 1)
        self.inner.load_state_dict(state_dict if self.standard else state_dict["inner"])
        self.param_groups = self.inner.param_groups


@pytest.mark.parametrize("standard", [True, False], ids=["torch's form", "its own form"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_what_the_base_does_not_save(method, standard):
    def make():
        model = small_model()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, METHODS[method](Averaged(base, standard), model)

    def steps(model, optimizer, count):
        x, y = images()
        for _ in range(count):
            backward(optimizer, lambda: F.cross_entropy(model(x), y), model=model)
            optimizer.step()
            optimizer.zero_grad()

    first, second = make(), make()
    if method == "MomentumSAM":  # which cannot see the momentum of the one within
        with pytest.raises(
            ValueError, match="a momentum of each weight in its state, got one with"
        ):
            steps(*first, 1)
        return
    steps(*first, 3)
    first[1].param_groups[0]["sam_rho"] = 0.2
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    for pair in (first, second):
        steps(*pair, 3)
    assert torch.equal(flat_weights(first[0]), flat_weights(second[0]))


def test_a_base_with_a_rho_of_its_own_keeps_it():
    for rho in (0.0, 0.05, 0.3):
        model = net()
        optimizer = SAM(torch.optim.Adadelta(model.parameters(), rho=0.8), rho=rho)
        start, seen = flat_weights(model), []

        def closure(model=model, seen=seen):
            seen.append(flat_weights(model))
            return loss(model)

        backward(optimizer, closure, model=model)
        assert float((seen[1] - start).norm()) == pytest.approx(rho, abs=1e-9)
        optimizer.step()
        assert optimizer.param_groups[0]["rho"] == 0.8
        again = SAM(torch.optim.Adadelta(net().parameters()), rho=rho / 2)
        again.load_state_dict(optimizer.state_dict())
        assert again.param_groups[0]["rho"] == 0.8 and again.param_groups[0]["sam_rho"] == rho
    assert off(lambda m: torch.optim.Adadelta(m.parameters(), rho=0.8)) < 1e-6


def test_a_radius_under_another_name_is_refused_before_it_is_ignored():
    model = net()
    groups = [{"params": list(model.parameters()), "rho": 0.2}]
    with pytest.raises(ValueError, match="write the radius of a group as 'sam_rho'"):
        SAM(torch.optim.SGD(groups, lr=0.1))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0]["rho"] = 0.2
    with pytest.raises(ValueError, match=r"has rho=0.2, which SGD does not know"):
        backward(optimizer, lambda: loss(model), model=model)
    groups = [{"params": list(model.parameters()), "sam_rho": 0.2}]
    assert SAM(torch.optim.SGD(groups, lr=0.1)).parameter_states()[0].rho == 0.2


def test_an_optimizer_that_is_prepared_already_is_refused():
    """It steps when it likes, so that steps could not be counted."""
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(sgd(net()))
    with pytest.raises(ValueError, match="wrap it first, then let Accelerate, Lightning or Fabric"):
        SAM(prepared)


@pytest.mark.parametrize("engine", ["deepspeed", "fairscale", "horovod.torch", "megatron.core"])
def test_engines_that_own_the_parameters_are_refused(engine):
    """As modules, also deep inside, as optimizers, and by what DeepSpeed writes on parameters."""
    line = "owns the parameters and the backward pass: use DDP or FSDP2"
    module = type("Engine", (nn.Sequential,), {"__module__": f"{engine}.engine"})
    inner = net()
    for model in (module(inner), nn.Sequential(module(inner))):
        optimizer = SAM(sgd(model))
        with pytest.raises(ValueError, match=line):
            backward(optimizer, lambda m=model: loss(m), model=model)
    kind = type("Sharded", (torch.optim.SGD,), {"__module__": f"{engine}.optimizer"})
    with pytest.raises(ValueError, match=line):
        SAM(kind(inner.parameters(), lr=0.1))
    optimizer = SAM(sgd(inner))
    for p in inner.parameters():
        p.ds_id = 0
    with pytest.raises(ValueError, match=line), optimizer.perturbed():
        pass


class Parts(torch.optim.Optimizer):
    """One optimizer for the weights and one for the biases, as those beside Muon."""

    def __init__(self, model, lr=0.1, *, anew=()):
        of = lambda few: [p for p in model.parameters() if (p.ndim < 2) == few]  # noqa: E731
        self.parts = torch.optim.SGD(of(False), lr=lr), torch.optim.AdamW(of(True), lr=lr)
        self.anew, self.defaults = anew, {}
        self.all = dict[torch.Tensor, dict]()

    @property
    def param_groups(self):
        groups = [group for part in self.parts for group in part.param_groups]
        return [dict(group) for group in groups] if "groups" in self.anew else groups

    @property
    def state(self):
        state = {k: v for part in self.parts for k, v in part.state.items()}
        if "state" in self.anew:
            return state
        for key, value in state.items():
            self.all.setdefault(key, value)
        return self.all

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)


def test_an_optimizer_of_parts_is_right_or_refused():
    assert off(Parts) < 1e-6
    assert off(lambda m: Parts(m, anew=["state"])) < 1e-6  # nothing to remember
    model = net()
    with pytest.raises(ValueError, match="makes its groups anew"):
        SAM(Parts(model, anew=["groups"]))
    optimizer = FriendlySAM(Parts(model, anew=["state"]))
    before = flat_weights(model)
    with pytest.raises(RuntimeError, match="makes its state anew"):
        backward(optimizer, lambda: loss(model), model=model)
    assert torch.equal(flat_weights(model), before)


# What else a base offers


class WithModes(torch.optim.SGD):
    """Weights for training and others for evaluation, as schedule-free optimizers have."""

    training = True

    def train(self, mode=True):
        self._move(1.0 if mode and not self.training else 0.0)
        self.training = mode

    def eval(self):
        self._move(-1.0 if self.training else 0.0)
        self.training = False

    def _move(self, by):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p += by


@pytest.mark.parametrize("through", ["itself", "Accelerate", "Lookahead"])
def test_train_and_eval_of_the_base_are_called(through):
    from accelerate import Accelerator

    model = net()
    wrapped = SAM(WithModes(model.parameters(), lr=0.1))
    outer = wrapped
    if through == "Accelerate":
        outer = Accelerator(cpu=True).prepare(wrapped)
    if through == "Lookahead":
        outer = SAM(Lookahead(WithModes(model.parameters(), lr=0.1)))
        with pytest.raises(AttributeError, match="train"):
            outer.train()  # timm's has none to pass on, and that must not be hidden
        return
    before = flat_weights(model)
    outer.eval()
    torch.testing.assert_close(flat_weights(model), before - 1)
    outer.train()
    torch.testing.assert_close(flat_weights(model), before)
    assert wrapped.training and not hasattr(wrapped, "fantasy")
    wrapped.training = False
    assert not wrapped.base.training and "training" not in vars(wrapped)
    wrapped.every, wrapped.note = 3, "mine"
    assert wrapped.perturbs_now and wrapped.every == 3 and not hasattr(wrapped.base, "note")
    assert not hasattr(SAM(sgd(model)), "train")


def test_schedule_free_steps_and_evaluates_as_it_does_by_hand():
    free = pytest.importorskip("schedulefree", reason="needs schedulefree")
    from accelerate import Accelerator

    weights = {}
    for way in ("hand", "itself", "Accelerate"):
        model = net()
        base = free.AdamWScheduleFree(model.parameters(), lr=0.05)
        optimizer, accelerator = base if way == "hand" else SAM(base, rho=RHO), None
        if way == "Accelerate":
            accelerator = Accelerator(cpu=True)
            optimizer = accelerator.prepare(optimizer)
        optimizer.train()
        for _ in range(5):
            if way == "hand":
                own = list(model.parameters())
                for p, g in zip(own, sam_gradients(model, own), strict=True):
                    p.grad = g
            else:
                backward(optimizer, lambda m=model: loss(m), model=model, accelerator=accelerator)
            optimizer.step()
            optimizer.zero_grad()
        weights[way, "train"] = flat_weights(model)
        optimizer.eval()
        weights[way, "eval"] = flat_weights(model)
    assert not torch.allclose(weights["hand", "train"], weights["hand", "eval"], rtol=1e-3)
    for way in ("itself", "Accelerate"):
        for mode in ("train", "eval"):
            torch.testing.assert_close(weights[way, mode], weights["hand", mode])


def test_the_wrapper_is_found_through_optimizers_of_any_kind():
    from accelerate import Accelerator

    class NoOptimizer:
        """Wraps one without being one, as schedulefree's wrapper does."""

        def __init__(self, base):
            self.base, self.param_groups, self.state = base, base.param_groups, base.state
            self.me = self  # and a cycle

        def step(self, closure=None):
            return self.base.step(closure)

        def zero_grad(self, set_to_none=True):
            self.base.zero_grad(set_to_none)

        def state_dict(self):
            return self.base.state_dict()

        def load_state_dict(self, state):
            self.base.load_state_dict(state)

    sam = SAM(sgd(net()))
    assert find_wrapper(Accelerator(cpu=True).prepare_optimizer(NoOptimizer(sam))) is sam
    with pytest.raises(ValueError, match="not sharpness-aware yet"):
        SAM(NoOptimizer(sam))
    assert find_wrapper(NoOptimizer(sgd(net()))) is None


# Groups that change after the wrapping


def test_parameters_that_come_go_and_change_places_keep_what_is_known_of_them():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    weights = [layer.weight for layer in model]
    optimizer = FriendlySAM(torch.optim.SGD(weights[:3], lr=0.1), scope=[weights[1]])
    backward(optimizer, lambda: model(torch.ones(2, 3)).square().sum(), model=model)
    (group,) = optimizer.param_groups

    def inside():
        states = optimizer.parameter_states()
        assert [s.weight for s in states] == group["params"]
        assert all(bool(s.memory) == s.in_scope for s in states)
        return [s.weight for s in states if s.in_scope]

    assert inside() == [weights[1]]
    group["params"].insert(0, weights[3])
    assert inside() == [weights[1]]
    group["params"].reverse()
    assert inside() == [weights[1]]
    group["params"].remove(weights[2])
    assert inside() == [weights[1]]
    optimizer.state.clear()
    replaced = nn.Parameter(weights[1].detach().clone())  # as FSDP2 and Accelerate do
    group["params"][group["params"].index(weights[1])] = replaced
    assert [s.weight for s in optimizer.parameter_states() if s.in_scope] == [replaced]


def test_a_convolution_that_is_unfrozen_later_keeps_its_layout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2))
    late = RelativeSAM(torch.optim.SGD([model[0].bias], lr=0.1), model)
    late.add_param_group({"params": [model[0].weight, model[1].weight]})
    states = late.parameter_states()
    assert [(s.groups, s.transposed) for s in states] == [(1, False), (2, False), (2, True)]
    with pytest.raises(ValueError, match="does not know the layer of a parameter of shape"):
        late.add_param_group({"params": [nn.Conv2d(4, 6, 3, groups=2).weight]})
        late.parameter_states()
    anywhere = ASAM(torch.optim.SGD([model[0].bias], lr=0.1))
    anywhere.add_param_group({"params": [nn.Conv2d(4, 6, 3, groups=2).weight], "sam_rho": 0.7})
    assert [s.rho for s in anywhere.parameter_states()] == [0.5, 0.7]


def test_a_group_that_came_through_the_base_counts_the_same_steps():
    model = net()
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer = SharpnessAware(base, every=2)
    for _ in range(3):
        backward(optimizer, lambda: loss(model), model=model)
        optimizer.step()
        optimizer.zero_grad()
    base.add_param_group({"params": list(model[2].parameters())})
    optimizer.state_dict()
    assert [g["sam_steps"] for g in base.param_groups] == [3, 3]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["SAM", "ASAM", "GSAM"])
def test_a_base_that_maximizes_is_refused(method, late):
    """Its worst case is where the loss is lower, and all rules climb."""
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, maximize=not late)
    with pytest.raises(ValueError, match="negate the loss, and delete maximize"):
        optimizer = METHODS[method](base, model)
        optimizer.param_groups[0]["maximize"] = True
        optimizer.parameter_states()
