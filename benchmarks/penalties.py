"""What a step with each penalty costs, beside the plain step and adversarial training.

    python benchmarks/penalties.py --output benchmarks/penalties.json

All rows share one run: in every round each takes one step, in an order that changes from round to
round, on its own copy of the model.

A   Time of a training step (forward, penalty, backward, SGD with momentum), and its ratio to the
    plain one.
B   Time of `RelativeFlatness` in isolation, forward and backward from features and logits, d = 512,
    as a share of the plain step: what it adds at 10 and at 1000 classes.
C   Memory of a step above weights, gradients and optimizer state: peak, in MiB and as a ratio to
    the plain one. On the CPU storages that operators return are counted, on CUDA allocated bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from side_by_side import Meter, Rows, describe_machine, show
from torch import Tensor

import flatreg
from flatreg import (
    NFGSM,
    PGDAT,
    CrossEntropy,
    GradAlign,
    InputGradient,
    JacobianNorm,
    LayerFlatness,
    LocalLinearity,
    MarginBound,
    OffManifoldConfidence,
    OffManifoldCurvature,
    RelativeFlatness,
)
from flatreg.data.files import write_json

EPS = 8 / 255
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
}
TWICE: Any = "double_backward"


def curvature(estimator: Any, **more: Any) -> list[Any]:
    """The penalty on the input curvature, by one estimator."""
    return [OffManifoldCurvature(eps=EPS, estimator=estimator, **more)]


# name: criterion, penalties, target of the ratio
ROWS: dict[str, tuple[Any, Sequence[Any], float | None]] = {
    "plain": (CrossEntropy(), [], None),
    "RelativeFlatness": (CrossEntropy(), [RelativeFlatness()], 1.03),
    "LayerFlatness": (CrossEntropy(), [LayerFlatness()], None),
    "LayerFlatness, double backward": (CrossEntropy(), [LayerFlatness(method=TWICE)], None),
    "InputGradient": (CrossEntropy(), [InputGradient(eps=EPS)], 2.7),
    "InputGradient, double backward": (
        CrossEntropy(),
        [InputGradient(eps=EPS, method=TWICE)],
        None,
    ),
    "MarginBound": (CrossEntropy(), [MarginBound(eps=EPS)], 2.7),
    "MarginBound, double backward": (CrossEntropy(), [MarginBound(eps=EPS, method=TWICE)], None),
    "MarginBound, curvature": (
        CrossEntropy(),
        [MarginBound(eps=EPS, subtract_curvature=True)],
        None,
    ),
    "chord": (CrossEntropy(), curvature("chord"), 2.7),
    "chord, fraction 0.5": (CrossEntropy(), curvature("chord", fraction=0.5), 2.0),
    "elle": (CrossEntropy(), curvature("elle"), None),
    "second_difference": (CrossEntropy(), curvature("second_difference"), 3.2),
    "fisher": (CrossEntropy(), curvature("fisher"), 2.6),
    "gradient_difference": (CrossEntropy(), curvature("gradient_difference"), 5.0),
    "OffManifoldConfidence": (CrossEntropy(), [OffManifoldConfidence(eps=EPS)], None),
    "GradAlign": (CrossEntropy(), [GradAlign(eps=EPS)], None),
    "LocalLinearity": (CrossEntropy(), [LocalLinearity(eps=EPS)], None),
    "JacobianNorm": (CrossEntropy(), [JacobianNorm(eps=EPS)], None),
    "NFGSM": (NFGSM(eps=EPS), [], None),
    "PGDAT, 10 steps": (PGDAT(eps=EPS, steps=10), [], None),
}


class Arm:
    """A row at work on a model of its own."""

    def __init__(self, row: str, model: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        size, options = MODELS.get(model, (32, {}))
        self.model = timm.create_model(model, num_classes=10, **options).to(device).train()
        self.x = torch.rand(batch, 3, size, size, device=device)
        self.y = torch.arange(batch, device=device) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        criterion, penalties, _ = ROWS[row]
        self.objective = flatreg.Objective(self.model, criterion, penalties)

    def step(self) -> None:
        """Take a training step."""
        flatreg.backward(self.optimizer, self.objective.bind(self.x, self.y))
        self.optimizer.step()
        self.optimizer.zero_grad()


def milliseconds(work: Callable[[], None], cuda: bool) -> float:
    """Time until the device is done."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return 1e3 * (time.perf_counter() - begin)


def measure_steps(model: str, batch: int, device: str, rounds: int) -> Rows:
    """Part A; one more round comes first, to warm up and to prove the head."""
    arms = {row: Arm(row, model, batch, device) for row in ROWS}
    refused = {row: reason for row, arm in arms.items() if (reason := refusal(arm))}
    names = [row for row in ROWS if row not in refused]
    samples: dict[str, list[float]] = {row: [] for row in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]][:: 1 if turn % 2 else -1]:
            samples[name].append(milliseconds(arms[name].step, arms[name].x.is_cuda))
    plain = samples["plain"][1:]
    rows: Rows = {row: {"missing": True, "refused": refused[row]} for row in refused}
    for name in names:
        own, target = samples[name][1:], ROWS[name][2]
        rows[name] = {
            "samples": own,
            "median": statistics.median(own),
            # a step over the plain step of the same round: what else the machine did cancels
            "ratio": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
            "ratio_min": min(own) / min(plain),
        } | ({} if target is None else {"target": target})
    return rows


def refusal(arm: Arm) -> str:
    """Why the penalty cannot train this model; empty where it can."""
    try:
        arm.step()
    except ValueError as error:
        return str(error)
    return ""


def measure_head(plain: float, batch: int, device: str, rounds: int) -> Rows:
    """Part B."""
    rows: Rows = {}
    for classes, target in ((10, 1.03), (1000, 1.10)):
        head = torch.nn.Linear(512, classes, device=device)
        features = torch.randn(batch, 512, device=device, requires_grad=True)
        logits = head(features).detach().requires_grad_()

        def work(features: Tensor = features, logits: Tensor = logits, head: Any = head) -> None:
            flatreg.relative_flatness(features, logits, head.weight).mean().backward()

        own = [milliseconds(work, features.is_cuda) for _ in range(10 * rounds + 5)][5:]
        rows[f"K = {classes}, d = 512"] = {
            "samples": own,
            "median": statistics.median(own),
            "step": plain,
            "ratio": 1 + statistics.median(own) / plain,
            "target": target,
        }
    return rows


def measure_memory(model: str, batch: int, device: str) -> Rows:
    """Part C, on the second step of each row."""
    rows: Rows = {}
    for name in ROWS:
        arm = Arm(name, model, batch, device)
        if refusal(arm):
            continue
        state = [t for s in arm.optimizer.state.values() for t in s.values()]
        known = [*arm.model.parameters(), *arm.model.buffers(), *state, arm.x, arm.y]
        if arm.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        meter = Meter([t for t in known if isinstance(t, Tensor)], arm.x.is_cuda)
        with meter:
            arm.step()
            meter.mark("step")
        peak = meter.peaks["step"] / 2**20
        rows[name] = {"peak": peak, "ratio": peak / (rows["plain"]["peak"] if rows else peak)}
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", help="some of the rows, separated by semicolons")
    parser.add_argument("--quick", action="store_true", help="one round on a tiny model")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/penalties.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rows:
        for row in set(ROWS) - {"plain", *args.rows.split(";")}:
            del ROWS[row]
    models, batch, rounds = list(MODELS), args.batch, args.rounds
    if args.quick:
        models, batch, rounds = ["test_resnet"], 8, 1
    results: dict[str, Any] = {"machine": describe_machine(args.device)}
    print(json.dumps(results["machine"], indent=1))
    for model in models:
        steps = measure_steps(model, batch, args.device, rounds)
        show(f"A: {model}", steps, ["median", "ratio", "ratio_min", "target"])
        head = measure_head(steps["plain"]["median"], batch, args.device, rounds)
        show(f"B: {model}", head, ["median", "step", "ratio", "target"])
        memory = measure_memory(model, batch, args.device)
        show(f"C: {model}", memory, ["peak", "ratio"])
        results[model] = {"A": steps, "B": head, "C": memory}
    write_json(args.output, results)


if __name__ == "__main__":
    main()
