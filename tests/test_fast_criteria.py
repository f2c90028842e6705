"""NUAT, FGSM-RS-CS, LIET and FGSM-PGI against the loops of their authors, written out again."""

import copy
import errno
import io
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import images, small_net
from safetensors.torch import load_file
from torch import nn

from flatreg import (
    FGSMPGI,
    FGSMRSCS,
    LIET,
    NUAT,
    SAM,
    Memory,
    Objective,
    RelativeFlatness,
    backward,
    load_recipe,
)
from flatreg.run.settings import RecipeError
from flatreg.terms.fast_criteria import nuclear_shares

ROOT = Path(__file__).parent.parent
EPS, EPOCHS, BATCHES, BATCH = 0.1, 5, 3, 4
SAMPLES = BATCHES * BATCH
# Short of the papers' only in what has to happen within five epochs.
CRITERIA = [
    NUAT(eps=EPS),
    FGSMRSCS(eps=EPS, gamma_min=0.1, gamma_max=0.3),
    LIET(eps=EPS, every=2),
    LIET(eps=EPS, every=2, noise=2.0, clip=False),
    FGSMPGI(eps=EPS, reset=3),
    FGSMPGI(eps=EPS, reset=3, momentum=0.0),
]


def ids(criterion):
    changed = {"noise": 2.0, "momentum": 0.0}
    return criterion.kind + "".join(
        f"-{name}" for name, value in changed.items() if getattr(criterion, name, None) == value
    )


each = pytest.mark.parametrize("criterion", CRITERIA, ids=ids)


def data():
    x, y = images(SAMPLES)
    return x.double(), y


def net():
    return small_net(batch_norm=False, dtype=torch.float64)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def order(epoch):
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(BATCH)


def train(criterion, epochs=EPOCHS, state=None, stop_at=None, memory=None, model=None):
    """A training with an objective; `state` to go on from, or the one at a place to stop at."""
    (x, y), model = data(), net() if model is None else model
    optimizer = sgd(model)
    memory = Memory(samples=SAMPLES) if memory is None else memory
    objective, begin, losses = Objective(model, criterion, memory=memory), (0, 0), []
    torch.manual_seed(1)
    if state is not None:
        begin, kept = state[0], torch.load(io.BytesIO(state[1]), weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        memory.load_state_dict(kept["memory"])
        torch.set_rng_state(kept["random"])
    for epoch in range(begin[0], epochs):
        memory.start_epoch(epoch)
        for step, rows in enumerate(order(epoch)):
            if (epoch, step) < begin:
                continue
            if (epoch, step) == stop_at:
                parts = {"model": model, "optimizer": optimizer, "memory": memory}
                kept = {name: part.state_dict() for name, part in parts.items()}
                torch.save(kept | {"random": torch.get_rng_state()}, file := io.BytesIO())
                return stop_at, file.getvalue()
            objective.progress = (epoch * BATCHES + step) / (epochs * BATCHES)
            loss = backward(optimizer, objective.bind(x[rows], y[rows], rows))
            losses.append(float(loss.total))
            optimizer.step()
            optimizer.zero_grad()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


# The authors' loops: one function a method, of a batch; what lasts longer is in `kept`.


def slope(value, at):
    return torch.autograd.grad(value, at)[0]


def nuat(model, x, y, progress, kept, criterion):
    beta, start = 4.0 * progress, (x + EPS / 2 * (2 * torch.randint_like(x, 2) - 1)).clamp(0, 1)
    start.requires_grad_()
    climbed = F.cross_entropy(model(start), y, reduction="sum")
    if kept["batch"] % 2 == 1:
        climbed = climbed + beta * torch.linalg.svdvals(model(start) - model(x).detach()).sum()
    moved = (start + EPS * slope(climbed, start).sign()).clamp(0, 1).detach()
    moved = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    norm = torch.linalg.svdvals(model(moved) - model(x)).sum()
    return F.cross_entropy(model(x), y) + beta * norm / len(x)


def rs_cs(model, x, y, progress, kept, criterion):
    start = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
    moved = (start + EPS * slope(F.cross_entropy(model(start), y), start).sign()).clamp(0, 1)
    normal = F.cross_entropy(model(start.detach()), y)
    loss = F.cross_entropy(model(moved.detach()), y)
    if kept["epoch"] > 1:
        change = kept["means"][-1] - kept["means"][-2]
        gap = normal.item() - kept["means"][-1]
        if abs(gap) > min(max(change, 0.1), 0.3):
            loss = loss + math.copysign(1, gap) * normal
            kept["signs"].append(math.copysign(1, gap))
    kept["normals"].append(normal.item())
    if len(kept["normals"]) == BATCHES:
        kept["means"].append(sum(kept["normals"]) / BATCHES)
        kept["normals"] = []
    return loss


def liet(model, x, y, progress, kept, criterion):
    if kept["batch"] % 2 == 0:
        kept["signs of"] = []
        for label in range(5):
            grey = torch.full_like(x[:1], 0.5).requires_grad_()
            kept["signs of"].append(slope(-model(grey).log_softmax(1)[0, label], grey)[0].sign())
    wide = criterion.noise > 1
    places, share = torch.rand_like(x), torch.rand(())
    noise = (2 if wide else 1) * EPS * (2 * torch.rand_like(x) - 1)
    change = torch.stack([EPS * kept["signs of"][int(label)] for label in y])
    change[places < 0.1 + 0.4 * share] = noise[places < 0.1 + 0.4 * share]
    change = change if torch.rand(()) < 0.5 else -change
    start = (x + change).clamp(0, 1).requires_grad_()
    moved = start + EPS * slope(F.cross_entropy(model(start), y), start).sign()
    if not wide:
        moved = x + (moved - x).clamp(-EPS, EPS)
    moved = moved.clamp(0, 1).detach()
    p, q = model(start.detach()).softmax(1), model(moved).softmax(1)
    middle = ((p + q) / 2).log()
    apart = (p * (p.log() - middle) + q * (q.log() - middle)).sum() / 2 / len(x)
    return F.cross_entropy(model(moved), y) + 100.0 * progress * apart


def pgi(model, x, y, progress, kept, criterion):
    if kept["epoch"] % 3 == 0 and kept["batch"] == 0:
        # what is drawn is told by the memory itself: signs alone
        kept["d"] = kept["drawn"](kept["epoch"] // 3)
        kept["m"] = torch.zeros(SAMPLES, 1, 16, 16, dtype=torch.float16)
    rows = kept["rows"]
    d = kept["d"][rows].double() / 127 * EPS
    start = (x + d).clamp(0, 1).requires_grad_()
    g = slope(F.cross_entropy(model(start), y), start)
    m = g / g.abs().mean() + criterion.momentum * kept["m"][rows].double()
    kept["m"][rows] = m.half()
    ahead = (d + EPS * m.sign()).clamp(-EPS, EPS)
    ahead = torch.max(torch.min(ahead, 1 - x), -x)
    kept["d"][rows] = (ahead / EPS * 127).round().to(torch.int8)
    now = (d + EPS * g.sign()).clamp(-EPS, EPS)
    now = torch.max(torch.min(now, 1 - x), -x)
    first, second = model(start.detach()), model(x + now)
    return F.cross_entropy(second, y) + 10.0 * F.mse_loss(second, first)


LOOPS = {"NUAT": nuat, "FGSMRSCS": rs_cs, "LIET": liet, "FGSMPGI": pgi}


def drawn(turn):
    """The perturbations that a memory of seed 0 draws."""
    memory, x = Memory(samples=SAMPLES), data()[0]
    memory.start_epoch(3 * turn)
    still = FGSMPGI(eps=EPS, reset=3)
    still._make_ready(memory, tuple(x.shape[1:]))
    return memory.stored["perturbation"].clone()


@each
def test_a_training_is_the_loop_of_the_authors(criterion):
    (x, y), model = data(), net()
    optimizer, losses = sgd(model), []
    kept = {"means": [], "normals": [], "signs": [], "drawn": drawn}
    torch.manual_seed(1)
    for epoch in range(EPOCHS):
        for step, rows in enumerate(order(epoch)):
            kept |= {"epoch": epoch, "batch": step, "rows": rows}
            progress = (epoch * BATCHES + step) / (EPOCHS * BATCHES)
            loop = LOOPS[criterion.kind]
            loss = loop(model, x[rows], y[rows], progress, kept, criterion)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    found, weights = train(criterion)
    assert found == pytest.approx(losses, rel=1e-8)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-8)
    if criterion.kind == "FGSMRSCS":
        assert set(kept["signs"]) == {1.0, -1.0}  # both ways, and not in every batch
        assert len(kept["signs"]) < BATCHES * (EPOCHS - 2)


@each
def test_a_training_that_goes_on_from_its_state_ends_with_the_same_bits(criterion, tmp_path):
    whole = train(criterion)[1]
    state = train(criterion, stop_at=(3, 1))
    assert torch.equal(train(criterion, state=state)[1], whole)
    mapped = Memory(samples=SAMPLES, folder=tmp_path / "memory")
    assert torch.equal(train(criterion, state=state, memory=mapped)[1], whole)
    there = sorted(file.name for file in tmp_path.rglob("*.bin"))
    assert there == (
        [] if criterion.kind != "FGSMPGI" else sorted(f"{n}.bin" for n in mapped.stored)
    )
    if criterion.kind == "FGSMPGI":
        (tmp_path / "memory/mine").touch()
        mapped.forget_samples()
        assert [file.name for file in (tmp_path / "memory").iterdir()] == ["mine"]


@each
def test_both_passes_of_sam_see_one_attack_which_counts_once(criterion):
    model, (x, y), memory = net(), data(), Memory(samples=SAMPLES)
    memory.start_epoch(0)
    objective = Objective(model, criterion, [RelativeFlatness(strength=0.1)], memory=memory)
    bound = objective.bind(x, y, torch.arange(SAMPLES))
    loss = backward(SAM(sgd(model), rho=0.1), bound)
    before = {name: images.clone() for name, images in memory.stored.items()}
    assert float(bound().detach().total) == pytest.approx(float(loss.total), rel=1e-12)
    assert memory.batches == 1
    assert all(torch.equal(images, before[name]) for name, images in memory.stored.items())


@each
def test_an_evaluation_without_gradients_leaves_no_trace(criterion):
    model, (x, y), memory = net(), data(), Memory(samples=SAMPLES)
    objective = Objective(model, criterion, memory=memory)
    for epoch in range(3):
        memory.start_epoch(epoch)
        objective.bind(x, y, torch.arange(SAMPLES))()
    before, kept = dict(memory.kept), {name: v.clone() for name, v in memory.stored.items()}
    for _ in range(2):
        with torch.no_grad():
            assert not objective.bind(x, y, torch.arange(SAMPLES))().total.requires_grad
    assert memory.batches == 1 and memory.kept.keys() == before.keys()
    assert all(memory.kept[name] is value for name, value in before.items())
    assert all(torch.equal(memory.stored[name], value) for name, value in kept.items())


@each
def test_an_evaluation_before_the_training_leaves_no_file(criterion, tmp_path):
    model, (x, y) = net(), data()
    memory = Memory(samples=10**9, folder=tmp_path / "memory")  # it takes nothing of that size
    memory.start_epoch(3)
    objective = Objective(model, criterion, memory=memory)
    with torch.no_grad():
        found = objective.bind(x, y, torch.arange(SAMPLES))().total
    assert bool(found.isfinite()) and not list(tmp_path.iterdir())
    assert not memory.stored and not memory.kept and memory.batches == 0


@each
def test_half_precision_is_right_or_refused(criterion):
    def loss(dtype):
        model, (x, y) = small_net(batch_norm=False), data()
        memory, rows = Memory(samples=SAMPLES), torch.arange(SAMPLES)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for epoch in range(2):  # the second batch of NUAT climbs the norm
                memory.start_epoch(epoch // 2)
                found = Objective(model, criterion, memory=memory).bind(x.float(), y, rows)()
        assert found.total.dtype == torch.float32
        return float(found.detach().total)

    assert loss(torch.bfloat16) == pytest.approx(loss(torch.float32), rel=0.05)
    with pytest.raises(ValueError, match="float16 autocast finds gradients of zero"):
        loss(torch.float16)


# The nuclear norm.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 5), (3, 5), (1, 1), (6, 6)])
def test_shares_add_up_to_the_nuclear_norm_and_have_its_gradient(shape, dtype):
    torch.manual_seed(0)
    rows = torch.randn(shape).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        shares = nuclear_shares(rows)
    assert shares.shape == shape[:1] and shares.dtype == torch.promote_types(dtype, torch.float32)
    exact = rows.detach().double().requires_grad_()
    norm = torch.linalg.matrix_norm(exact, "nuc")
    rounding = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(shares.sum().double(), norm, rtol=1e-5, atol=0)
    found, expected = slope(shares.sum(), rows).double(), slope(norm, exact)
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_repeated_and_vanishing_singular_values_have_the_gradient_of_least_norm(rank, scale):
    """Two equal singular values, and others of 0: U V^T of those that are there."""
    basis = torch.linalg.qr(torch.arange(30.0).reshape(6, 5).sin())[0]
    rows = (scale * basis[:, :rank] @ torch.eye(5)[:rank]).requires_grad_()
    shares = nuclear_shares(rows)
    torch.testing.assert_close(
        float(shares.detach().sum()) / scale, float(rank), rtol=1e-5, atol=1e-7
    )
    expected = basis[:, :rank] @ torch.eye(5)[:rank]
    torch.testing.assert_close(slope(shares.sum(), rows), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_not_finite_has_no_finite_norm_and_raises_nothing():
    for broken in (math.nan, math.inf):
        rows = torch.eye(3)
        rows[1, 1] = broken
        assert not bool(nuclear_shares(rows).sum().isfinite())


def test_identical_passes_have_a_loss_and_a_gradient():
    """A model that does not see the image: D is 0 in every batch."""

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.bias + 0 * x.flatten(1)[:, :5]

    model, (x, y) = Blind(), images()
    objective = Objective(model, NUAT(eps=EPS))
    for _ in range(2):
        model.bias.grad = None
        objective(x, y).total.backward()
        wanted = slope(F.cross_entropy(model.bias.expand(8, 5), y), model.bias)
        torch.testing.assert_close(model.bias.grad, wanted)


def test_parts_of_a_batch_are_right_or_refused():
    model, (x, y), rows = net(), data(), torch.arange(SAMPLES)
    for criterion in CRITERIA:
        memory = Memory(samples=SAMPLES)
        for epoch in range(3):  # FGSMRSCS has a sign from the third
            memory.start_epoch(epoch)
            bound = Objective(model, criterion, memory=memory).bind(x, y, rows)
            bound.prepare()
        if criterion.kind == "NUAT":
            with pytest.raises(ValueError, match=r"^NUAT is of the whole batch.* micro_batches$"):
                bound.split(2)
        else:
            whole = sum(float(part().detach().total) for part in bound.split(3))
            assert whole == pytest.approx(float(bound().detach().total), rel=1e-12)


# Several processes.

PROCESSES = """
import sys, torch
from accelerate import Accelerator
sys.path.insert(0, sys.argv[2])
from cases import images, small_net
from flatreg import FGSMPGI, FGSMRSCS, NUAT, Memory, Objective, backward
from safetensors.torch import save_file

accelerator = Accelerator(cpu=True)
rank, count = accelerator.process_index, accelerator.num_processes
x, y = images(12)
out = {}
for name, criterion in {
    "nuat": NUAT(eps=0.1, noise=0.0),
    "rscs": FGSMRSCS(eps=1e-9, gamma_min=0.0, gamma_max=1e-6),
    "pgi": FGSMPGI(eps=0.1),
}.items():
    torch.manual_seed(0)
    net = small_net(batch_norm=False, dtype=torch.float64)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.5))
    memory = Memory(gather=accelerator.gather, samples=12)
    objective = Objective(model, criterion, memory=memory)
    for epoch in range(4):
        memory.start_epoch(epoch)
        for rows in torch.arange(12).split(6):
            rows = rows[rank::count]
            bound = objective.bind(x[rows].double(), y[rows], rows)
            backward(optimizer, bound, accelerator=accelerator)
            optimizer.step()
            optimizer.zero_grad()
    weights = [p.detach().flatten() for p in net.parameters()]
    out[name] = torch.cat([*weights, *(s.double().flatten() for s in memory.stored.values())])
if count > 1:
    for gather, size, expected in ((None, 6, "give Objective"), (accelerator.gather, 5, "[6, 5]")):
        objective = Objective(model, NUAT(eps=0.1), memory=Memory(gather=gather))
        size = 6 if rank == 0 else size
        try:
            objective(x[:size].double(), y[:size])
        except ValueError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(expected)
save_file(out, f"{sys.argv[1]}/{count}.{rank}.safetensors")
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    (tmp_path / "processes.py").write_text(PROCESSES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = [str(part) for part in (tmp_path / "processes.py", tmp_path, ROOT / "tests")]
    monkeypatch.setattr(sys, "argv", script)
    runpy.run_path(script[0])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, ROOT / "tests/run_and_exit.py", *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *two = (load_file(tmp_path / f"{name}.safetensors") for name in ("1.0", "2.0", "2.1"))
    for name, expected in one.items():
        for found in two:
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-10)


# What is refused.


def step(criterion, memory, indices=None, x=None, y=None):
    own_x, own_y = data()
    x, y = own_x if x is None else x, own_y if y is None else y
    return (
        Objective(net(), criterion, memory=memory)(x, y)
        if indices is None
        else (Objective(net(), criterion, memory=memory).bind(x, y, indices)())
    )


def begun(**settings):
    memory = Memory(**{"samples": SAMPLES} | settings)
    memory.start_epoch(0)
    return memory


ALL = torch.arange(SAMPLES)


@pytest.mark.parametrize(
    ("memory", "indices", "expected"),
    [
        (Memory(samples=SAMPLES), ALL, r"^FGSMPGI needs to know the epoch: .*start_epoch"),
        (begun(samples=None), ALL, r"stores something of each training image: give"),
        (
            begun(),
            None,
            r"^FGSMPGI needs to know which samples a batch holds: give objective\.bind",
        ),
        (begun(), ALL + 1, r"^indices: expected 0 to 11, the places of 12 samples, got 1 to 12$"),
        (begun(), ALL - 1, r"got -1 to 10$"),
        (begun(), ALL[:3], r"^indices: expected integers \(12,\), got torch\.int64 \(3,\)$"),
        (begun(), ALL[:, None], r"got torch\.int64 \(12, 1\)$"),
        (begun(), ALL.double(), r"got torch\.float64 \(12,\)$"),
        (begun(), ALL > 3, r"got torch\.bool \(12,\)$"),
    ],
)
def test_a_stored_start_needs_epochs_samples_and_indices(memory, indices, expected):
    with pytest.raises(ValueError, match=expected) as raised:
        step(FGSMPGI(eps=EPS), memory, indices)
    assert "\n" not in str(raised.value)


def steps_at(closure, model, way):
    """Take one step of SAM on a closure that makes the loss."""
    optimizer = SAM(sgd(model), rho=0.1)

    def stepping():
        optimizer.zero_grad()
        loss = closure().total
        loss.backward()
        return loss

    if way == "step":
        optimizer.step(stepping)
    elif way == "backward":
        backward(optimizer, closure, model=model)
    else:
        closure().total.backward()
        with optimizer.perturbed():
            closure().total.backward()


@pytest.mark.parametrize("way", ["backward", "step", "perturbed"])
@each
def test_a_closure_that_attacks_in_both_passes_is_refused(criterion, way):
    """Its batch would count twice, the second time at the perturbed weights."""
    model, (x, y), memory = net(), data(), begun()
    objective = Objective(model, criterion, memory=memory)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with pytest.raises(
        RuntimeError, match=f"{criterion.kind}.*attacks the batch in both"
    ) as raised:
        steps_at(lambda: objective.bind(x, y, ALL)(), model, way)
    assert "\n" not in str(raised.value) and memory.batches == 1
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    memory.start_epoch(1)
    steps_at(objective.bind(x, y, ALL), model, way)
    assert memory.batches == 1


@each
def test_two_objectives_at_work_on_one_memory_are_refused(criterion):
    model, (x, y), memory = net(), data(), begun()
    objectives = [Objective(model, criterion, memory=memory) for _ in range(2)]
    objectives[0].bind(x, y, ALL)()
    with torch.no_grad():
        objectives[1].bind(x, y, ALL)()  # leaves no trace
    with pytest.raises(ValueError, match=f"{criterion.kind}.*two objectives have one memory"):
        objectives[1].bind(x, y, ALL)()
    alike = copy.deepcopy(objectives[0])
    alike.bind(x, y, ALL)()
    assert (memory.batches, alike.memory.batches) == (1, 2)
    objectives.pop(0)
    objectives[0].bind(x, y, ALL)()  # the other is gone
    assert memory.batches == 2


def test_a_memory_of_other_settings_is_refused():
    memory, whole = begun(), begun()
    step(FGSMPGI(eps=EPS, momentum=0.0), memory, ALL)
    with pytest.raises(ValueError, match="expected a memory with the momentum of each image"):
        step(FGSMPGI(eps=EPS), memory, ALL)
    step(FGSMPGI(eps=EPS), whole, ALL)
    state = whole.state_dict()
    state["stored"].pop("class")
    memory.load_state_dict(state)
    with pytest.raises(ValueError, match="expected a memory with the class of each image"):
        step(FGSMPGI(eps=EPS), memory, ALL)


def test_indices_may_come_twice_but_name_one_image():
    y = torch.arange(SAMPLES) % 5
    with pytest.raises(ValueError, match=r"^indices: sample 0 was of class 0 before and is of"):
        step(FGSMPGI(eps=EPS), begun(), torch.zeros_like(ALL), y=y)
    for same in (ALL % 5, (ALL % 5).tolist(), (ALL % 5).numpy(), (ALL % 5).int()):
        step(FGSMPGI(eps=EPS), begun(), same, y=y)


def test_other_samples_under_the_same_store_are_refused():
    memory, (x, y) = begun(), data()
    step(FGSMPGI(eps=EPS), memory, ALL)
    step(FGSMPGI(eps=EPS), memory, ALL, y=0.9 * F.one_hot(y, 5) + 0.02)  # smoothed: the same class
    with pytest.raises(ValueError, match=r"^indices: sample \d+ was of class \d before and is of"):
        step(FGSMPGI(eps=EPS), memory, ALL.flip(0))
    with pytest.raises(ValueError, match=r"images of shape \(1, 16, 16\), got \(1, 12, 12\)"):
        step(FGSMPGI(eps=EPS), memory, ALL, x=x[..., :12, :12])
    other = Memory(samples=SAMPLES + 1)
    with pytest.raises(
        ValueError, match=r"^state: expected 13 stored samples, got 12: it is of an"
    ):
        other.load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match=r"^state: expected what Memory"):
        other.load_state_dict({"epoch": 1})
    memory.start_epoch(2)
    memory.start_epoch(2)
    with pytest.raises(
        ValueError, match=r"^epoch: expected 2 or a later one, got 1: a training th"
    ):
        memory.start_epoch(1)


def test_a_full_disk_is_told_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.delattr(os, "posix_fallocate")  # macOS has none
    step(FGSMPGI(eps=EPS), memory := begun(folder=str(tmp_path / "here")), ALL)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "here").iterdir()}
    assert sizes["perturbation.bin"] == SAMPLES * 256 and len(sizes) == 3
    memory.forget_samples()
    assert not (tmp_path / "here").exists()
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"class\.bin: 0 MiB for what is stored .*: No space left"):
        step(FGSMPGI(eps=EPS), begun(folder=tmp_path), ALL)


def test_a_memory_takes_whole_numbers_and_its_own_state_alone():
    for samples in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^samples: .* number from 1, got {samples}$"):
            Memory(samples=samples)
    for epoch in (-1, 1.5, None):
        with pytest.raises(ValueError, match=rf"^epoch: .* number from 0, got {epoch}$"):
            Memory().start_epoch(epoch)
    state = begun().state_dict()
    for rubbish in ({"stored": {"a": 1}}, {"stored": []}, {"kept": None}, {"epoch": "1"}):
        with pytest.raises(ValueError, match=r"^state: expected what Memory.state_dict\(\)"):
            Memory().load_state_dict(state | rubbish)


def test_smooth_convergence_needs_epochs_and_survives_a_batch_that_is_not_finite():
    criterion = FGSMRSCS(eps=EPS)
    with pytest.raises(ValueError, match=r"^FGSMRSCS needs to know the epoch: .*start_epoch"):
        step(criterion, Memory())
    memory = Memory()
    for epoch in range(3):
        memory.start_epoch(epoch)
        for value in (2.0, math.nan, 4.0):
            sign = criterion._sign(memory, torch.tensor(value), 4)
            expected = 0.0 if epoch < 2 or value != value else math.copysign(1, value - 3)
            assert float(sign) == expected
    assert memory.kept["mean"] == 3.0
    decayed = FGSMRSCS(eps=EPS, decays=(4,))
    for epoch, quiet in ((3, True), (4, True), (5, True), (6, False)):
        memory.start_epoch(epoch)
        sign = decayed._sign(memory, torch.tensor(9.0 + epoch), 4)
        assert bool(sign == 0) is quiet


def test_directions_of_classes_fit_the_images_and_the_batch():
    model, (x, y), memory = net(), data(), Memory()
    LIET(eps=EPS).move(model, x[:2], y[:2], memory)  # five classes, two at a time
    whole = memory.kept["class signs"]
    LIET(eps=EPS).move(model, x, y, memory)
    assert torch.equal(memory.kept["class signs"], whole) and whole.shape == (5, 1, 16, 16)
    memory.batches = 1
    LIET(eps=EPS).move(model, x[..., :12, :12], y, memory)
    assert memory.kept["class signs"].shape == (5, 1, 12, 12)


def test_settings_that_contradict_each_other_are_refused():
    for make, expected in (
        (lambda: FGSMRSCS(eps=EPS, gamma_min=0.1), "gamma_min: expected at most gamma_max=0.03"),
        (lambda: LIET(eps=EPS, mask=(0.5, 0.1)), r"mask: expected \[least, largest\]"),
        (lambda: NUAT(eps=1.0, norm="l2"), "norm"),
        (lambda: FGSMPGI(eps=EPS, momentum=1), "momentum"),
        (lambda: Memory(seed=1.5), "seed: expected a whole number from 0, got 1.5"),
        (lambda: Memory(samples=True), "samples: expected a whole number from 1, got True"),
        (lambda: Memory(folder=""), "folder: expected the name of a folder"),
    ):
        with pytest.raises(ValueError, match=expected):
            make()


RECIPE = """
data: {kind: digits, limit: 100, test_limit: 20}
model: {name: test_convnext3}
optimizer: {lr: 1.0e-3}
epochs: 1
batch_size: 20
evaluation: {eps: 0.1}
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["criterion={kind: NUAT, eps: 0.1}", "accumulation=2"], "NUAT is of the whole batch"),
        (
            ["variants.a={criterion: {kind: FGSMRSCS, eps: 0.1}}", "accumulation=2"],
            "FGSMRSCS is of the whole batch: expected accumulation 1, got 2",
        ),
        (
            ["criterion={kind: NUAT, eps: 0.1}", "optimizer.wrapper={kind: SAM, micro_batches: 2}"],
            "NUAT is of the whole batch: delete micro_batches",
        ),
        (["criterion={kind: FGSMPGI, eps: 0.1}", "augment.mixup=0.4"], "mixup mixes images"),
        (
            [
                "criterion={kind: FGSMPGI, eps: 0.1}",
                "data={kind: folder, path: x, size: 32, workers: 2}",
            ],
            "in memory: delete data.workers",
        ),
    ],
)
def test_recipes_that_cut_or_mix_what_a_criterion_needs_whole_are_refused(
    tmp_path, overrides, expected
):
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=expected) as raised:
        load_recipe(tmp_path / "r.yaml", overrides)
    assert "\n" not in str(raised.value)
