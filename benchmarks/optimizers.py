"""Sharpness-aware optimizers side by side: flatreg, davda54/sam and pytorch_optimizer.

    python benchmarks/optimizers.py --davda54 PATH/TO/sam.py --output benchmarks/optimizers.json

All methods share one run: in every round each takes one sample, in an order that changes from round
to round, on its own copy of the model. LookSAM's sample is the mean of five consecutive steps.

A   Time of a training step, and its ratio to the plain step of the same base optimizer.
B   Time of the optimizer alone, on gradients made beforehand: extra over the plain base step, and
    flatreg's extra as a multiple of the best peer's. It runs `flatreg.backward` on stand-ins for
    the passes; what peers do not do, freeze BatchNorm statistics and replay devices' random
    streams, is in the row "with its model" alone. A peer with foreach=True has a base optimizer
    with it and is compared with such a base. On CUDA, host_reads counts waits for the device.
C   Memory above the moment when weights, optimizer state and one set of gradients are alive: peak
    of the ascent, what is held once the second gradients are there, peak of restoring and stepping,
    what stays between steps beyond the plain row's state; in MiB, and "/w" in multiples of the
    weights. On the CPU storages that operators return are counted, on CUDA allocated bytes.
D   Correctness on the CPU; peers as Accelerate drives them, by `scaler.step(optimizer, closure)`.
    Update under a loss scale of 1024 over that without; relative error of an update over 2
    micro-batches at rho=0; whether weights stay perturbed when pass 2 raises; error a step after
    AdamW was resumed; movement of bfloat16 weights in 20 steps at lr=0; what step(closure) is with
    no backward pass before; relative distance from flatreg after 5 steps.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from side_by_side import Meter, Rows, describe_machine, show
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import flatreg
from flatreg.data.files import write_json

WAITS = ("cudaStreamSynchronize", "aten::item", "aten::_local_scalar_dense")
BASES = {"sgd": partial(SGD, lr=1e-4, momentum=0.9), "adamw": partial(AdamW, lr=1e-5)}
MODELS = {"resnet18": (32, {}), "vit_tiny_patch16_224": (64, {"img_size": 64})}
COLUMNS = {
    "A": "min median max ratio_min ratio_median",
    "B": "min median max extra_min extra_median extra_min_to_peer extra_median_to_peer host_reads",
    "C": "ascent second step kept ascent/w second/w step/w kept/w largest/w",
}


@dataclass(frozen=True)
class Method:
    """A row; `build` makes its optimizer, `reference` is the plain row it is compared with."""

    name: str
    build: Any  # of a model and a base class; None where the peer is missing
    step: Callable[[Arm], None]
    parts: str = "ABC"
    reference: str = "plain"
    steps: int = 1  # in a sample


class Arm:
    """A method at work on a model of its own; takes the passes, in place of an accelerator too."""

    gradient_accumulation_steps, scaler = 1, None

    def __init__(self, method: Method, model: str, base: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        size, options = MODELS.get(model, (32, {}))
        self.model = timm.create_model(model, num_classes=10, **options).to(device).train()
        self.x = torch.rand(batch, 3, size, size, device=device)
        self.y = torch.arange(batch, device=device) % 10
        self.optimizer = method.build(self.model, BASES[base])
        self.method, self.parameters = method, list(self.model.parameters())
        self.objective = flatreg.Objective(self.model)
        self.made: list[list[Tensor]] | None = None
        self.passes, self.mark = 0, lambda phase: None

    def ready(self, *made: list[Tensor]) -> None:
        """Let these gradients, and new ones for lack of them, come out of the next passes."""
        self.made, self.passes = list(made), 0

    def loss(self) -> Tensor:
        """Forward."""
        made = self.made is not None
        return self.x.new_zeros(()) if made else F.cross_entropy(self.model(self.x), self.y)

    def backward(self, total: Tensor, **reach: Any) -> None:
        """Backward."""
        if self.made is None:
            total.backward()
            return
        self.passes += 1
        self.mark(f"before pass {self.passes}")
        gradients = self.made.pop(0) if self.made else list(map(torch.randn_like, self.parameters))
        for p in self.parameters:
            p.grad = gradients.pop(0)  # the method alone decides how long gradients live
        self.mark(f"after pass {self.passes}")

    def state(self) -> list[Tensor]:
        """All tensors that outlive a step."""
        inner = getattr(self.optimizer, "base_optimizer", self.optimizer)
        kept = [*self.optimizer.state.values(), *inner.state.values()]
        kept += [s.memory for s in getattr(self.optimizer, "parameter_states", list)()]
        return [*self.parameters, *(t for k in kept for t in k.values() if isinstance(t, Tensor))]


def plain_step(arm: Arm) -> None:
    """The base optimizer's own loop."""
    arm.backward(arm.loss())
    arm.optimizer.step()
    arm.optimizer.zero_grad()


def peer_step(arm: Arm) -> None:
    """The two-pass loop of the peers' READMEs."""
    arm.backward(arm.loss())
    arm.optimizer.first_step(zero_grad=True)
    arm.backward(arm.loss())
    arm.optimizer.second_step(zero_grad=True)


def flatreg_step(arm: Arm, *, bound: bool = False, with_model: bool = False) -> None:
    """Both passes by `flatreg.backward`; with a bound objective one does if the scope is a head."""
    closure: Any = arm.objective.bind(arm.x, arm.y) if bound else arm.loss
    stand_in: Any = None if arm.made is None else arm
    model = arm.model if with_model or arm.made is None else nn.Identity()
    flatreg.backward(arm.optimizer, closure, model=model, accelerator=stand_in)
    arm.optimizer.step()
    arm.optimizer.zero_grad()


def load_libraries(path: Path | None) -> dict[str, Any]:
    """Modules by name; None where one is missing."""
    found: dict[str, Any] = {"flatreg": flatreg, "davda54": None, "pytorch_optimizer": None}
    if path is not None and path.is_file():
        spec: Any = importlib.util.spec_from_file_location("davda54_sam", path)
        found["davda54"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found["davda54"])
    with suppress(ModuleNotFoundError):
        found["pytorch_optimizer"] = importlib.import_module("pytorch_optimizer")
    return found


def list_methods(libraries: dict[str, Any]) -> list[Method]:
    """All rows, plain ones first."""

    def own(name: str, wrap: Callable[..., Any], step: Any = flatreg_step, **more: Any) -> Method:
        build = lambda model, kind: wrap(kind(model.parameters()), model)  # noqa: E731
        return Method(f"flatreg {name}", build, step, **more)

    def peer(library: str, name: str, parts: str = "ABC", **extra: Any) -> Method:
        sam = getattr(libraries[library], "SAM", None)
        build = sam and (lambda model, kind: sam(model.parameters(), kind, **extra))
        reference = "plain, foreach" if "foreach" in extra else "plain"
        return Method(f"{library} {name}", build, peer_step, parts, reference)

    head: dict[str, Any] = {"step": partial(flatreg_step, bound=True), "parts": "A"}
    served = {"step": partial(flatreg_step, with_model=True), "parts": "BC"}
    adaptive: dict[str, Any] = {"parts": "BC", "adaptive": True, "rho": 0.5}
    return [
        Method("plain", lambda m, kind: kind(m.parameters()), plain_step),
        Method("plain, foreach", lambda m, kind: kind(m.parameters(), foreach=True), plain_step),
        own("SAM", lambda base, _: flatreg.SAM(base)),
        own("SAM, with its model", lambda base, _: flatreg.SAM(base), **served),
        own("SAM, head", lambda base, m: flatreg.SAM(base, scope=m.get_classifier()), **head),
        own("HeadRelativeSAM", lambda b, m: flatreg.HeadRelativeSAM(b, m.get_classifier()), **head),
        own("ASAM", lambda base, _: flatreg.ASAM(base)),
        own("GSAM", lambda base, _: flatreg.GSAM(base)),
        own("LookSAM, every 5", lambda base, _: flatreg.LookSAM(base, every=5), steps=5),
        own("MomentumSAM", lambda base, _: flatreg.MomentumSAM(base), parts="A"),
        own("StaleSAM", lambda base, _: flatreg.StaleSAM(base), parts="A"),
        own("SAM, before its tail", lambda base, _: flatreg.SAM(base, tail=0.5), parts="A"),
        peer("davda54", "SAM"),
        peer("davda54", "ASAM", **adaptive),
        peer("pytorch_optimizer", "SAM"),
        peer("pytorch_optimizer", "SAM, foreach", foreach=True),
        peer("pytorch_optimizer", "ASAM", **adaptive),
        peer("pytorch_optimizer", "ASAM, foreach", foreach=True, **adaptive),
    ]


def measure_time(part: str, arms: Sequence[Arm], rounds: int) -> Rows:
    """Part A or B; one more round comes first, to warm up."""
    made = [list(map(torch.randn_like, arms[0].parameters)) for _ in range(2)]
    samples: dict[str, list[float]] = {arm.method.name: [] for arm in arms}
    for turn in range(rounds * (4 if part == "B" else 1) + 1):
        first = turn % len(arms)
        for arm in [*arms[first:], *arms[:first]][:: 1 if turn % 2 else -1]:
            steps = []
            for _ in range(arm.method.steps):
                if part == "B":
                    arm.ready(*([g.clone() for g in gradients] for gradients in made))
                steps.append(timed(arm))
            samples[arm.method.name].append(statistics.mean(steps))
    rows = compare([arm.method for arm in arms], {k: v[1:] for k, v in samples.items()})
    for arm in (arm for arm in arms if part == "B" and arm.x.is_cuda):
        rows[arm.method.name]["host_reads"] = host_reads(arm)
    return rows


def timed(arm: Arm) -> float:
    """Milliseconds of a step, until the device is done."""
    wait = torch.cuda.synchronize if arm.x.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    arm.method.step(arm)
    wait()
    return 1e3 * (time.perf_counter() - begin)


def compare(methods: Sequence[Method], samples: dict[str, list[float]]) -> Rows:
    """All statistics; the peer to compare with is the one with the least extra."""
    family = {m.name: m.name.split(",")[0].split()[-1] for m in methods}
    rows: Rows = {}
    for m in methods:
        own, plain = samples[m.name], samples[m.reference]
        rows[m.name] = {"samples": own, "max": max(own)}
        for how, of in (("median", statistics.median), ("min", min)):
            rows[m.name] |= {how: of(own), f"ratio_{how}": of(own) / of(plain)}
            rows[m.name][f"extra_{how}"] = of(own) - of(plain)
    for m, key in product(methods, ("extra_median", "extra_min")):
        peers = [p.name for p in methods if (family[p.name], p.step) == (family[m.name], peer_step)]
        least = min((rows[name][key] for name in peers), default=0.0)
        if m.step is not peer_step and least > 0:
            rows[m.name][f"{key}_to_peer"] = rows[m.name][key] / least
    return rows


def host_reads(arm: Arm) -> dict[str, int]:
    """How often a step makes the host wait for the device."""
    arm.ready()
    with torch.profiler.profile() as profile:  # of all devices there are
        arm.method.step(arm)
    return {e.key: e.count for e in profile.key_averages() if e.key in WAITS}


def measure_memory(arms: Sequence[Arm]) -> Rows:
    """Part C."""
    rows: Rows = {}
    for arm in arms:
        sizes = [p.nbytes / 2**20 for p in arm.parameters]
        fresh, *_, steady = (metered_step(arm) for _ in range(arm.method.steps + 1))
        row = {"weights": sum(sizes), "largest": max(sizes), "step": steady.peaks["step"] / 2**20}
        row["ascent"] = steady.peaks.get("before pass 2", 0) / 2**20
        row["second"] = steady.ends.get("after pass 2", 0) / 2**20
        row["kept"] = fresh.ends["step"] / 2**20 + sum(sizes)  # its gradients are gone
        row["kept"] -= rows["plain"]["kept"] if rows else 0
        rows[arm.method.name] = row | {f"{k}/w": v / sum(sizes) for k, v in row.items()}
    return rows


def metered_step(arm: Arm) -> Meter:
    """The second gradients are new memory, as a backward pass makes them."""
    first = list(map(torch.randn_like, arm.parameters))
    arm.ready(first)
    meter = Meter([*arm.state(), *first], arm.x.is_cuda)
    arm.mark = meter.mark
    with meter:
        arm.method.step(arm)
        meter.mark("step")
    return meter


class Trial:
    """A small model of fixed seed under one library's SAM, or under a plain optimizer for None."""

    def __init__(self, library: Any, base: Any = SGD, **options: Any) -> None:
        torch.manual_seed(0)
        self.dtype, self.fails_at = options.get("dtype", torch.float32), options.get("fails_at")
        lr, rho = options.get("lr", 0.1), options.get("rho", 0.05)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(self.dtype)
        self.x, self.y = torch.randn(16, 64), torch.arange(16) % 10
        self.own, parameters = library in (None, flatreg), list(self.model.parameters())
        if self.own:
            plain = base(parameters, lr=lr)
            self.optimizer = plain if library is None else flatreg.SAM(plain, rho=rho)
        else:
            self.optimizer = library.SAM(parameters, base, lr=lr, rho=rho)
        self.start, self.passes = self.weights(), 0

    def weights(self) -> Tensor:
        """All weights, as one vector."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()

    def loss(self, part: int = 0, parts: int = 1) -> Tensor:
        """What one of `parts` micro-batches adds to the loss."""
        self.passes += 1
        if self.passes == self.fails_at:
            raise InterruptedError
        x, y = self.x.chunk(parts)[part], self.y.chunk(parts)[part]
        return F.cross_entropy(self.model(x.to(self.dtype)), y) / parts

    def update(self, steps: int = 1, parts: int = 1, scaler: Any = None) -> Tensor:
        """Train; return how far the weights are from their start."""
        step = partial(scaler.step, self.optimizer) if scaler else self.optimizer.step
        scale = scaler.scale if scaler else torch.clone
        for i in range(steps * parts):
            loss = partial(self.loss, i % parts, parts)
            if self.own:
                flatreg.backward(self.optimizer, loss, model=self.model, scaler=scaler)
            else:
                scale(loss()).backward()
            if i % parts == parts - 1:
                step(*() if self.own else [lambda loss=loss: scale(loss()).backward()])
                self.optimizer.zero_grad()
        return self.weights() - self.start


def check(library: Any) -> dict[str, Any]:
    """Part D."""
    trial, scaler = partial(Trial, library), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, unscaled = trial().update(scaler=scaler), trial().update()
    halves, plain = trial(rho=0.0).update(parts=2), Trial(None).update(parts=2)
    five, own = trial().update(steps=5), Trial(flatreg).update(steps=5)
    raising, narrow = trial(fails_at=2), trial(lr=0.0, dtype=torch.bfloat16)
    with suppress(InterruptedError):
        raising.update()
    return {
        "scaled": float(scaled.norm() / unscaled.norm()),
        "accumulated": float((halves - plain).norm() / plain.norm()),
        "stays_perturbed": not torch.equal(raising.weights(), raising.start),
        "resumed": resume(trial),
        "bfloat16": float(narrow.update(steps=20).abs().max()),
        "bare_closure": bare_closure(trial()),
        "from_flatreg": float((five - own).norm() / own.norm()),
    }


def resume(trial: Callable[..., Trial]) -> float:
    """Step on, and step with what a checkpoint brings back."""
    one, other = trial(AdamW, lr=0.01), trial(AdamW, lr=0.01)
    one.update(steps=3)
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    other.model.load_state_dict(one.model.state_dict())
    return float((one.update() - other.update()).abs().max())


def bare_closure(trial: Trial) -> str:
    """Name of what the step is."""
    try:
        trial.optimizer.step(lambda: trial.loss().backward())
    except Exception as error:  # whatever the library raises is the answer
        return f"raises {type(error).__name__}"
    update = trial.weights() - trial.start
    known = {"no step": Trial(None, lr=0.0), "plain SGD": Trial(None), "SAM": Trial(flatreg)}
    return next((k for k, t in known.items() if torch.allclose(update, t.update())), "another step")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--davda54", type=Path, help="the sam.py of github.com/davda54/sam")
    parser.add_argument("--rounds", type=int, default=5, help="of A; B has four times as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="A,B,C,D", help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one round on a tiny model")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/optimizers.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    libraries = load_libraries(args.davda54)
    davda54 = getattr(libraries["davda54"], "__file__", None)
    results: dict[str, Any] = {
        "machine": describe_machine(args.device)
        | {
            "pytorch_optimizer": libraries["pytorch_optimizer"] and version("pytorch_optimizer"),
            "davda54_sha256": davda54 and hashlib.sha256(Path(davda54).read_bytes()).hexdigest(),
        }
    }
    print(json.dumps(results["machine"], indent=1))
    models, bases, batch, rounds = list(MODELS), list(BASES), 64, args.rounds
    if args.quick:
        models, bases, batch, rounds = ["test_resnet"], ["sgd"], 4, 1
    for part, model, base in product(sorted({*args.only} & {*COLUMNS}), models, bases):
        methods = [m for m in list_methods(libraries) if part in m.parts]
        arms = [Arm(m, model, base, batch, args.device) for m in methods if m.build]
        found = measure_memory(arms) if part == "C" else measure_time(part, arms, rounds)
        rows = {m.name: found.get(m.name, {"missing": True}) for m in methods}
        results.setdefault(part, {})[f"{model}, {base}"] = rows
        show(f"{part}: {model}, {base}", rows, COLUMNS[part].split())
    if "D" in args.only:
        results["D"] = {k: check(v) if v else {"missing": True} for k, v in libraries.items()}
        show("D", results["D"], list(results["D"]["flatreg"]))
    write_json(args.output, results)


if __name__ == "__main__":
    main()
