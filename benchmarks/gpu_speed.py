"""The part `speed` of benchmarks/gpu.py."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from attacks import Loaded, run_ours, run_pair
from gpu_bench import (
    Bench,
    Late,
    Row,
    Task,
    batch_of,
    fastest_kernels,
    network,
    wrappers,
)
from optimizers import peer_step
from penalties import ROWS
from side_by_side import Rows
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flatreg
from flatreg.data.files import one_line
from flatreg.data.loading import subset
from flatreg.measures.estimate import Estimate
from flatreg.threat import to_unit_range


class PaperSAM:
    """SAM as its paper has it: ascend by rho g / ||g||, take the gradient there, come back, step.

    Algorithm 1 of Foret et al., ICLR 2021, with the two steps that the peers' loops call.
    """

    def __init__(self, parameters: Iterable[Tensor], base: Any, rho: float = 0.05) -> None:
        self.parameters, self.rho = list(parameters), rho
        self.base_optimizer = base(self.parameters)
        self.state, self.kept = self.base_optimizer.state, list[tuple[Tensor, Tensor]]()

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move to the perturbed weights."""
        moved = [p for p in self.parameters if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in moved]).norm() + 1e-12
        for p in moved:
            self.kept.append((p, p.detach().clone()))
            p.add_(p.grad * (self.rho / length))
        if zero_grad:
            self.base_optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Bring the weights back, and step on the gradient of the perturbed ones."""
        for p, before in self.kept:
            p.copy_(before)
        self.kept.clear()
        self.base_optimizer.step()
        if zero_grad:
            self.base_optimizer.zero_grad()


class Arm:
    """A row of `speed` at work on a model of its own; `peer_step` takes its passes too."""

    def __init__(self, bench: Bench, model: str, pixels: int, row: Row) -> None:
        torch.manual_seed(0)
        fixed = {"img_size": pixels} if "vit" in model else {}
        with bench.device:
            made = timm.create_model(model, num_classes=bench.size.classes, **fixed)
        # ResNets in bfloat16 are trained so; for a transformer it changes nothing
        self.model: nn.Module = made.to(bench.device, memory_format=torch.channels_last).train()
        x, self.y = batch_of(bench, bench.size.batch, pixels)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.bench, base = bench, partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
        parameters = list(self.model.parameters())
        self.peer = row.get("peer")
        wrap = row.get("wrap", lambda base, _: base)
        self.optimizer: Any = (
            self.peer(parameters, base) if self.peer else wrap(base(parameters), self.model)
        )
        criterion, penalties, *_ = row.get("terms", (None, ()))
        self.objective = flatreg.Objective(self.model, criterion, penalties)

    def loss(self) -> Tensor:
        """Forward of a peer."""
        with self.bench.autocast():
            return F.cross_entropy(self.model(self.x), self.y)

    def backward(self, total: Tensor) -> None:
        """Backward of a peer."""
        total.backward()

    def step(self) -> None:
        """Take a training step."""
        if self.peer:
            peer_step(cast(Any, self))
            return
        with self.bench.autocast():
            flatreg.backward(self.optimizer, self.objective.bind(self.x, self.y))
        self.optimizer.step()
        self.optimizer.zero_grad()


def speed_tasks(bench: Bench) -> list[Task]:
    """All rows of `speed`, but for the cascade."""
    rows: Rows = {name: {"wrap": wrap} for name, wrap in wrappers().items()}
    rows["SAM of the paper, written here"] = {"peer": PaperSAM}
    for library in ("davda54", "pytorch_optimizer"):
        sam = getattr(bench.libraries[library], "SAM", None)
        if sam:
            rows[f"{library} SAM"] = {"peer": sam}
    rows |= {name: {"terms": terms} for name, terms in ROWS.items() if name != "plain"}
    return [
        Task("speed", model, name, partial(measure_pair, bench, model, pixels, row))
        for model, pixels in bench.size.models
        for name, row in rows.items()
    ]


@fastest_kernels()
def measure_pair(bench: Bench, model: str, pixels: int, row: Row, late: Late) -> Row:
    """Time and memory of a row beside the plain step."""
    plain, own = Arm(bench, model, pixels, {}), Arm(bench, model, pixels, row)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*kinks of this model's activations")
        try:
            own.step()
        except ValueError as error:
            return {"refused": one_line(error)}
    plain.step()
    for _ in range(bench.size.warm_up):  # cudnn looks for its fastest kernels
        sample(plain), sample(own)
    times: dict[Arm, list[float]] = {plain: [], own: []}
    for turn in range(bench.size.rounds):
        for arm in (plain, own)[:: 1 if turn % 2 else -1]:
            times[arm].append(sample(arm))
    ratios = [a / b for a, b in zip(times[own], times[plain], strict=True)]
    memory, of_plain = peak_memory(own), peak_memory(plain)
    return {
        "milliseconds": statistics.median(times[own]),
        "plain": statistics.median(times[plain]),
        "ratio": asdict(Estimate.median(torch.tensor(ratios))),
        "memory": memory,
        "memory_ratio": memory / of_plain if memory and of_plain else None,
        "samples": {"own": times[own], "plain": times[plain]},
    }


def sample(arm: Arm) -> float:
    """Milliseconds of a step, the mean of some in a row; the device is idle before and after."""
    bench, steps = arm.bench, arm.bench.size.steps
    bench.wait()
    if not bench.is_cuda:
        begin = time.perf_counter()
        for _ in range(steps):
            arm.step()
        return 1e3 * (time.perf_counter() - begin) / steps
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(steps):
        arm.step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / steps


def peak_memory(arm: Arm) -> float | None:
    """Peak of a step in MiB above what is alive between steps; of LookSAM on one that perturbs."""
    if not arm.bench.is_cuda:
        return None
    while not getattr(arm.optimizer, "perturbs_now", True):
        arm.step()
    arm.bench.wait()
    torch.cuda.reset_peak_memory_stats(arm.bench.device)
    between = torch.cuda.memory_allocated(arm.bench.device)
    arm.step()
    arm.bench.wait()
    return (torch.cuda.max_memory_allocated(arm.bench.device) - between) / 2**20


def measure_cascade(bench: Bench, late: Late) -> Row | None:
    """Seconds of the cascade beside the peer's, on the network that N-FGSM trained."""
    weights = bench.state / "N-FGSM.pt"
    if bench.data is None or not weights.exists():
        return None
    saved = torch.load(weights, map_location=bench.device, weights_only=True)
    if len(saved["seconds"]) < bench.size.epochs:
        return None
    model = network(bench, normalized=True).eval().requires_grad_(False)
    model.load_state_dict(saved["average"])
    data = TensorDataset(to_unit_range(bench.data.test.images), bench.data.test.labels)
    indices = subset(range(len(data)), bench.size.compared, 0)
    loaded = Loaded("cifar-nfgsm-8", model, data, indices, bench.device.type)
    if find_spec("pyautoattack") is None or bench.size.attack != "standard":
        return {"peer": "missing", "ours": of_cascade(run_ours(loaded, bench.size.attack))}
    peer, ours = run_pair(loaded, rounds=2, peer_first=True)
    ratio = ours["pair"]["ratio"]
    return {"peer": of_cascade(peer), "ours": of_cascade(ours), "peer over ours": ratio}


def of_cascade(row: Row) -> Row:
    """What is kept of a row of benchmarks/attacks.py."""
    return {k: row[k] for k in ("preset", "n", "clean", "attacked", "units", "seconds")}
