"""The part `checks` of benchmarks/gpu.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import (
    Bench,
    Row,
    Task,
    batch_of,
    network,
    wrappers,
)
from optimizers import WAITS
from penalties import ROWS
from side_by_side import Rows
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, schedule

import flatreg
from flatreg.data.files import one_line

COPY = "Memcpy DtoH"  # how the profiler's names of copies to the host start


def check_tasks(bench: Bench) -> list[Task]:
    """All rows of `checks`."""
    exact = {"bits": torch.float32, "bits, bfloat16 weights": torch.bfloat16}
    tasks = []
    for subject in ("SAM", "MarginBound"):
        for name, (limit, options) in cases(bench).items():
            tasks.append((name, subject, partial(check_case, bench, subject, limit, options)))
        tasks.append(("overflow", subject, partial(check_overflow, bench, subject)))
    for (name, dtype), (method, wrap) in (
        (e, w) for e in exact.items() for w in wrappers().items()
    ):
        tasks.append((name, method, partial(check_restored, bench, wrap, dtype)))
    tasks.append(("bits", "SAM, second pass raises", partial(check_raising, bench)))
    steps: Rows = {"a loop without flatreg": {"bare": 0}, "a loop that reads": {"bare": 1}}
    steps |= {name: {"wrap": wrap} for name, wrap in wrappers().items()}
    steps |= {name: {"terms": terms} for name, terms in ROWS.items()}
    for name, row in steps.items():
        tasks.append(("host reads", name, partial(check_reads, bench, row)))
    return [Task("checks", *names, lambda late, run=run: run()) for *names, run in tasks]


def cases(bench: Bench) -> dict[str, tuple[float, Row]]:
    """How a case differs from plain float32, and how far its update may be from that."""
    return {
        "float16, GradScaler": (0.1, {"dtype": torch.float16, "scale": 1024.0}),
        "bfloat16": (0.2, {"dtype": torch.bfloat16}),
        "channels_last": (0.05, {"layout": torch.channels_last}),
        "torch.compile": (0.05, {"compiler": bench.size.compiler}),
        "FSDP2": (0.05, {"mesh": True}),
    }


def check_case(bench: Bench, subject: str, limit: float, options: Row) -> Row:
    """Distance of the weights from those of plain float32, relative to how far these moved."""
    with process_group(bench) if "mesh" in options else nullcontext():
        found, _ = trained_weights(bench, subject, **options)
    plain, start = trained_weights(bench, subject)
    distance = float((found - plain).norm() / (plain - start).norm())
    return {"ok": distance < limit, "number": distance, "expected": f"< {limit}"}


def trained_weights(
    bench: Bench,
    subject: str,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    compiler: str | None = None,
    mesh: bool = False,
) -> tuple[Tensor, Tensor]:
    """All weights after three steps and before them, as float32 vectors."""
    model, (x, y) = (
        network(bench).to(memory_format=layout),
        batch_of(bench, bench.size.checked_batch, 32),
    )
    x, start = x.contiguous(memory_format=layout), flat(model)
    if mesh:
        fully_shard(model, mesh=torch.distributed.init_device_mesh(bench.device.type, (1,)))
    # Made from the parameters of the sharded model: FSDP2 puts new ones in.
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = flatreg.SAM(optimizer, rho=0.2) if subject == "SAM" else optimizer
    ran: Any = torch.compile(model, backend=compiler) if compiler else model
    penalties = [] if subject == "SAM" else [flatreg.MarginBound(eps=0.1, step=1.0)]
    objective = flatreg.Objective(ran, None, penalties)
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=scale or 1.0, enabled=bool(scale))
    for _ in range(3):
        with bench.autocast(dtype):
            flatreg.backward(optimizer, objective.bind(x, y), scaler=scaler if scale else None)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if compiler:
        torch.compiler.reset()
    return flat(model), start


def flat(model: nn.Module) -> Tensor:
    """All weights, as a float32 vector."""
    parts = [p.detach() for p in model.parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parts]
    return torch.cat([p.float().reshape(-1) for p in whole]).clone()


@contextmanager
def process_group(bench: Bench) -> Iterator[None]:
    """A group of this process alone, for FSDP2; it needs no network."""
    backend, store = "nccl" if bench.is_cuda else "gloo", torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def check_overflow(bench: Bench, subject: str) -> Row:
    """Weights that a step moves whose loss scale overflows float16: a GradScaler skips it."""
    found, start = trained_weights(bench, subject, dtype=torch.float16, scale=2.0**100)
    moved = int((found != start).sum())
    return {"ok": moved == 0, "number": moved, "expected": "0 weights"}


def check_restored(bench: Bench, wrap: Any, dtype: torch.dtype) -> Row:
    """Weights that differ in a bit after both passes."""
    model, (x, y) = network(bench).to(dtype), batch_of(bench, bench.size.checked_batch, 32)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    for group in optimizer.param_groups:
        group["sam_rho"] = 1.0  # far enough that w + e - e would round
    closure = flatreg.Objective(model).bind(x.to(dtype), y)
    flatreg.backward(optimizer, closure)
    optimizer.step()  # from which some methods have their direction
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    flatreg.backward(optimizer, closure)
    return bits_moved(model, before)


def check_raising(bench: Bench) -> Row:
    """The same where the second pass raises."""
    model, (x, y) = network(bench), batch_of(bench, bench.size.checked_batch, 32)
    optimizer = flatreg.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    before, passes = [p.detach().clone() for p in model.parameters()], list[int]()

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == 2:
            raise InterruptedError
        return F.cross_entropy(model(x), y)

    try:
        flatreg.backward(optimizer, closure, model=model)
    except InterruptedError:
        return bits_moved(model, before)
    raise RuntimeError(f"expected two passes, got {len(passes)}")


def bits_moved(model: nn.Module, before: Sequence[Tensor]) -> Row:
    """How many weights are not what they were, compared as integers: -0 is not 0, nan is nan."""
    moved = 0
    for p, old in zip(model.parameters(), before, strict=True):
        whole = {2: torch.int16, 4: torch.int32}[p.element_size()]
        moved += int((p.detach().view(whole) != old.view(whole)).sum())
    return {"ok": moved == 0, "number": moved, "expected": "0 weights"}


def check_reads(bench: Bench, row: Row) -> Row:
    """How often a step waits for the device; on a CPU nothing waits, and nothing is judged."""
    model, (x, y) = network(bench), batch_of(bench, bench.size.batch, 32)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizer = row["wrap"](optimizer, model) if "wrap" in row else optimizer
    criterion, penalties, *_ = row.get("terms", (None, ()))
    objective = flatreg.Objective(model, criterion, penalties)

    def step() -> None:
        if "bare" in row:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            [loss.item() for _ in range(row["bare"])]
        else:
            flatreg.backward(optimizer, objective.bind(x, y))
        optimizer.step()
        optimizer.zero_grad()

    # `Objective` reads on its passes 0, 1, 10 and 100, to check the model: the third step is past
    # the second pass, and before the tenth. LookSAM perturbs again on its sixth.
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    third = schedule(wait=0, warmup=1, active=1, repeat=1)  # a profiler that starts may wait
    try:
        for _ in range(max(2, getattr(optimizer, "every", 1)) - 1):
            step()
    except ValueError as error:
        return {"ok": None, "number": None, "expected": "0", "refused": one_line(error)}
    with profile(activities=activities, schedule=third) as profiled:
        for _ in range(2):
            step()
            profiled.step()
    trace = bench.state / "trace.json"  # read in a tenth of the time that `key_averages` takes
    profiled.export_chrome_trace(str(trace))
    found = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    trace.unlink()
    events = Counter(e["name"] for e in found if e.get("ph") == "X")
    reads = {
        k: n
        for k, n in events.items()
        if k in (*WAITS, "cudaEventSynchronize") or k.startswith(COPY)
    }
    number, control = max(reads.values(), default=0), row.get("bare") == 1
    ok = number >= 1 if control else number == 0 if bench.is_cuda else None
    return {"ok": ok, "number": number, "expected": "1 or more" if control else "0", "reads": reads}
