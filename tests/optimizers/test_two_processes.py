"""Two processes over gloo against one that averages by hand, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from by_hand import cut, note_step, unit
from distributed_worker import (
    IN_PART,
    LIGHTNING,
    METHODS,
    SETTINGS,
    SHARDED,
    STEPS,
    batches,
    net_of,
)
from oracles import flat_gradient, flat_weights, set_gradient
from safetensors.torch import load_file

RHO = 0.1
ONE_PASS = ("momentum", "stale")  # in which statistics move, at the perturbed weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """State of every setting, method and accumulation at the end, process by process."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).parent.parent / "distributed_worker.py"
    paths = os.pathsep.join([str(worker.parent), str(worker.parent.parent)])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(worker.with_name("run_and_exit.py")),
            str(worker),
            str(folder),
        ],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def loss_on(x, y):
    return lambda model: F.cross_entropy(model(x), y)


def head_only(net):
    inside = [torch.full_like(p, float(k.startswith("8."))) for k, p in net.named_parameters()]
    return torch.cat([t.flatten() for t in inside])


def relative_head(net, g):
    """rho W (W^T G) / ||W^T G|| on the head's weight, zero elsewhere."""
    start = sum(p.numel() for k, p in net.named_parameters() if not k.startswith("8."))
    weight = net[8].weight.detach()
    m = weight.T @ g[start : start + weight.numel()].reshape(weight.shape)
    e = torch.zeros_like(g)
    e[start : start + weight.numel()] = (RHO * weight @ m / m.norm()).flatten()
    return e


def by_hand(method, setting, accumulation):
    """The definition: every process perturbs along its own gradient unless told otherwise."""
    net, memory = net_of(setting), {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    together = method in ("synced", "wsam", "friendly synced")
    for step in range(STEPS):
        total = 0.0
        for i in range(accumulation):
            shares = [batches(rank, accumulation)[i] for rank in (0, 1)]
            if method == "split":
                shares = [
                    half for x, y in shares for half in zip(x.chunk(2), y.chunk(2), strict=True)
                ]
            plain = [flat_gradient(net, loss_on(x, y)) for x, y in shares]
            if setting == "fsdp2":  # one loss over both processes, in both passes
                shares = [(torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares]))]
                plain = [flat_gradient(net, loss_on(*shares[0]))]
            elif together:
                plain = [torch.stack(plain).mean(0)] * len(plain)
            combined = [
                stepped(method, net, g, loss_on(*share), step, memory.setdefault(rank, {}))
                for rank, (g, share) in enumerate(zip(plain, shares, strict=True))
            ]
            total = total + torch.stack(combined).mean(0)
            net(shares[0][0])  # rank 0's BatchNorm statistics are those that DDP broadcasts
            if method == "split":
                net(shares[1][0])
        set_gradient(net, total)
        for own in memory.values():
            note_step(net, own)
        if setting == "unused":
            net.unused.grad = None
        optimizer.step()
    return net.state_dict()


def stepped(method, net, g, loss, step, memory):
    """What one process adds to the gradient, given its gradient at the weights."""
    if method == "looksam" and step % 2:
        return g + 0.7 * g.norm() * memory["v"]
    e = RHO * unit(g)
    if method.startswith("friendly"):
        mean = memory.get("mean", torch.zeros_like(g))
        e = RHO * unit(g - mean)
        memory["mean"] = 0.9 * mean + 0.1 * g if "mean" in memory else g
    if method == "asam":
        t = flat_weights(net).abs() + 0.01
        e = 0.3 * t**2 * g / (t * g).norm()
    if method == "awp":
        e = torch.cat(
            [(RHO * w.norm() * unit(v) * float(w.ndim > 1)).flatten() for _, w, v in cut(net, g)]
        )
    if method == "head":
        e = RHO * unit(g * head_only(net))
    if method == "relative head":
        e = relative_head(net, g)
    if method in ONE_PASS:
        v = memory.get("momentum" if method == "momentum" else "last", 0 * g)
        e = RHO * (unit(v) if v.any() else v) * (-1 if method == "momentum" else 1)
    g_p = flat_gradient(net, loss, e)
    if method == "gsam":
        return g_p - 0.3 * (g - (g @ g_p) / g_p.norm() ** 2 * g_p)
    if method == "wsam":
        return g + 4.0 * (g_p - g)
    if method == "looksam":
        memory["v"] = unit(g_p - (g @ g_p) / g.norm() ** 2 * g)
    return g_p


def check(ranks, key, expected):
    assert any(name.startswith(key) for name in ranks[0])
    for name, value in expected.items():
        got = [rank[f"{key}/{name}"] for rank in ranks]
        torch.testing.assert_close(
            got[0],
            value,
            rtol=1e-9,
            atol=1e-11,
            msg=lambda text, name=name: f"{key}/{name}: {text}",
        )
        if "running" not in name and "tracked" not in name:
            assert torch.equal(*got), f"{key}/{name} differs between the processes"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_equals_averaging_by_hand(ranks, method, accumulation):
    """Weights and, on process 0, BatchNorm statistics, in every setting of DDP."""
    for setting in SETTINGS:
        if setting == "static graph" and accumulation == 2:
            continue  # DDP itself refuses no_sync before the first synchronised pass
        expected = by_hand(method, setting, accumulation)
        one = method in ONE_PASS
        kept = {k: v for k, v in expected.items() if not (one and "running" in k)}
        check(ranks, f"{setting}/{method}/{accumulation}", kept)


@pytest.mark.parametrize("method", ["friendly", "friendly synced", "looksam", "stale"])
def test_the_memory_of_a_process_is_that_of_all_where_all_perturb_alike(ranks, method):
    """So that a checkpoint, which holds that of one process, goes on exactly."""
    names = [name for name in ranks[0] if name.startswith("memory/") and f"/{method}/" in name]
    assert len(names) == 2 * len(SETTINGS) - 1
    for name in names:
        same = torch.equal(ranks[0][name], ranks[1][name])
        assert same == (method in ("friendly synced", "stale")), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_synchronised_random_direction_is_the_same_everywhere(ranks, setting):
    weights = [r[f"{setting}/random/1/0.weight"] for r in ranks]
    assert torch.equal(*weights)
    noises = {name: r[f"{setting}/random/1/8.weight"] for name, r in enumerate(ranks)}
    assert not torch.equal(noises[0], net_of(setting)[8].weight)


@pytest.mark.parametrize("method", SHARDED)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fsdp2_equals_one_process(ranks, method, accumulation):
    """Sharded gradients are always averaged, so the direction is the same everywhere."""
    check(ranks, f"fsdp2/{method}/{accumulation}", by_hand(method, "fsdp2", accumulation))


@pytest.mark.parametrize("method", IN_PART)
def test_fsdp2_on_some_of_the_layers_equals_one_process(ranks, method):
    """The perturbation has one norm, of shards and of whole parameters."""
    check(ranks, f"part/{method}/1", by_hand(method, "fsdp2", 1))


@pytest.mark.parametrize("full", [False, True], ids=["shards", "full"])
@pytest.mark.parametrize("method", SHARDED)
def test_distributed_checkpoints_of_shards_resume_exactly(ranks, method, full):
    for rank in ranks:
        straight, resumed = (
            {k.rpartition("/")[2]: v for k, v in rank.items() if k.startswith(start)}
            for start in (f"checkpoint {full}/{method}/{n}/" for n in ("straight", "resumed"))
        )
        assert straight.keys() == resumed.keys() and straight
        assert all(torch.equal(straight[k], resumed[k]) for k in straight)


@pytest.mark.parametrize("way", ["backward", "perturbed"])
def test_shards_that_get_new_memory_in_the_pass_are_restored_there(ranks, way):
    for name, weight in net_of("fsdp2").named_parameters():
        assert torch.equal(ranks[0][f"moved/{way}/{name}"], weight)


def test_sam_around_a_zero_redundancy_optimizer_is_sam(ranks):
    check(ranks, "plain/sam zero/1", by_hand("sam", "plain", 1))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", LIGHTNING)
def test_lightning_and_fabric_equal_averaging_by_hand(ranks, method, accumulation):
    """Whose DDP lies around a module that the loop does not hold."""
    pytest.importorskip("lightning", reason="needs lightning")
    expected = {k: v for k, v in by_hand(method, "plain", accumulation).items() if "." in k}
    weights = {k: v for k, v in expected.items() if "running" not in k and "tracked" not in k}
    check(ranks, f"lightning/{method}/{accumulation}", weights)
    if accumulation == 1:
        check(ranks, f"fabric/{method}/1", weights)
