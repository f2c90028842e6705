"""Relative flatness by its authors' published code (FAM), by flatreg and by the definition.

    python benchmarks/published_flatness.py --fam PATH   # a clone, or its FAMloss.py

PATH: github.com/kampmichael/RelativeFlatnessAndGeneralization. The file is loaded from where it
lies; nothing of it is in this repository. It is called as its CIFAR-10 script calls it: neuronwise,
method autograd_fast. It divides by the number of features d, so the other two are divided here too.

A   Time of the regularizer, forward and backward, on one head, batch and machine, the head's own
    forward included in each. In every round each method takes its samples, in an order that changes
    from round to round; CPU, one thread, float32. CPU time, which other jobs on the machine do not
    stretch by taking turns, and wall time. `head` is the cross-entropy of the same head.
    Where the Hessian alone would take 16 GiB the published code is left out.
B   Value and gradient on small random heads in float64 beside the dense Hessian of the definition
    and autograd through it: ratio of the values, cosine of the gradients in the weight and in the
    features (0 where no gradient arrives). The published code also with its line 34 changed in
    memory: the index alone, the detach alone, both.
C   What each of its methods does on the CPU, and with fewer features than classes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatreg
from flatreg.data.files import write_json

Regularizer = Callable[[nn.Linear, Tensor, Tensor], Tensor]
IN_CLONE = Path("RelativeFlatnessRegularizer(FAM)/FAMloss.py")
LINE_34 = "torch.tensor(H[:, neuron_j, neuron_i, :], requires_grad=True).to(device)"
VARIANTS = {
    "published": LINE_34,
    "published, index": "torch.tensor(H[neuron_j, :, neuron_i, :], requires_grad=True).to(device)",
    "published, attached": "H[:, neuron_j, neuron_i, :]",
    "published, index and attached": "H[neuron_j, :, neuron_i, :]",
}
SHAPES = [(10, 128), (20, 64), (10, 512), (100, 128), (1000, 2048)]  # classes, features
TOO_LARGE = 2**34  # bytes of a dense Hessian
PARTS = ("ratio", "cosine_weight", "cosine_features")


def load(path: Path, line_34: str = LINE_34) -> ModuleType:
    """The published file as a module, with that expression in its line 34."""
    path = path / IN_CLONE if path.is_dir() else path
    source = path.read_text(encoding="utf-8")
    if source.count(LINE_34) != 1:
        raise ValueError(f"expected {LINE_34} once in {path}, got {source.count(LINE_34)}")
    spec = importlib.util.spec_from_file_location("FAMloss", path)
    module = importlib.util.module_from_spec(spec)
    util = ModuleType("util")  # imported there for a function that the file does not use
    util.torch_conv_layer_to_affine = None
    with patch.dict(sys.modules, {"util": util}):
        exec(compile(source.replace(LINE_34, line_34), str(path), "exec"), module.__dict__)
    return module


def published(
    fam: ModuleType,
    head: nn.Linear,
    features: Tensor,
    labels: Tensor,
    method: str = "autograd_fast",
) -> Tensor:
    """The call of run_training_CIFAR10_FAM.py, on a head instead of a network."""
    hessian = fam.LayerHessian(head, 0, F.cross_entropy, method=method)
    return fam.FAMreg(features, labels, hessian, norm_function="neuronwise", approximate=True).sum()


def ours(head: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """The closed form, the head's forward pass included."""
    kappa = flatreg.relative_flatness(features, head(features), head.weight)
    return kappa.mean() / head.in_features


def cross_entropy(head: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """What the head costs in a training step without a regularizer."""
    return F.cross_entropy(head(features), labels)


def definition(head: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """The sum over s and t of <w_s, w_t> Tr(H_st), by the dense Hessian of the mean loss."""
    classes, width = head.weight.shape

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight, head.bias), labels)

    hessian = torch.autograd.functional.hessian(loss, head.weight, create_graph=True)
    kappa = sum(
        head.weight[s] @ head.weight[t] * hessian[s, :, t, :].trace()
        for s in range(classes)
        for t in range(classes)
    )
    return kappa / width


def random_head(
    classes: int, width: int, batch: int, seed: int
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Normal weights and features, logits of variance 4 (plus the bias), uniform labels."""
    torch.manual_seed(seed)
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=2 * width**-0.5)
    features = torch.randn(batch, width, requires_grad=True)
    return head, features, torch.randint(classes, (batch,))


def measure(regularizer: Regularizer, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient in the weight and in the features, on a small head."""
    head, features, labels = random_head(4, 6, 32, seed)
    value = regularizer(head, features, labels)
    value.backward()
    found = features.grad is not None
    return value.detach(), head.weight.grad, features.grad if found else torch.zeros_like(features)


def agree(regularizers: dict[str, Regularizer], heads: int) -> dict[str, Any]:
    """Ratio and cosines to the definition: of the first head, and their spread over all."""
    rows = {name: {part: [] for part in ("value", *PARTS)} for name in regularizers}
    for seed in range(heads):
        true = measure(definition, seed)
        for name, regularizer in regularizers.items():
            value, *gradients = measure(regularizer, seed)
            cosines = [
                float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
                for a, b in zip(gradients, true[1:], strict=True)
            ]
            numbers = [float(value), float(value / true[0]), *cosines]
            for part, number in zip(("value", *PARTS), numbers, strict=True):
                rows[name][part].append(number)
    return {name: {part: spread(seen) for part, seen in row.items()} for name, row in rows.items()}


def spread(numbers: list[float]) -> dict[str, float]:
    """The first, and the middle and the ends of all."""
    return {
        "first": numbers[0],
        "median": statistics.median(numbers),
        "min": min(numbers),
        "max": max(numbers),
    }


def sample(
    regularizer: Regularizer, problem: tuple[nn.Linear, Tensor, Tensor]
) -> tuple[float, float]:
    """CPU time and wall time of one forward and backward pass, in milliseconds."""
    head, features, _ = problem
    head.zero_grad()
    features.grad = None
    wall, cpu = time.perf_counter(), time.process_time()
    regularizer(*problem).backward()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def measure_time(
    regularizers: dict[str, Regularizer], classes: int, width: int, batch: int, rounds: int
) -> dict[str, Any]:
    """Medians in milliseconds; a method that takes well under a second has more samples a round."""
    problem = random_head(classes, width, batch, 0)
    values = {name: float(r(*problem)) for name, r in regularizers.items()}  # warms up, too
    repeats = {n: 100 if sample(r, problem)[0] < 20 else 1 for n, r in regularizers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in regularizers}
    names = list(regularizers)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            sample(regularizers[name], problem)  # what ran before has emptied the caches
            times[name] += [sample(regularizers[name], problem) for _ in range(repeats[name])]
    found: dict[str, Any] = {
        "values": values,
        "samples": {name: len(seen) for name, seen in times.items()},
    }
    for column, clock in enumerate(("cpu", "wall")):
        for statistic in (statistics.median, min):
            kind = f"{clock}_{statistic.__name__}"
            ms = {name: statistic([s[column] for s in seen]) for name, seen in times.items()}
            found[f"{kind}_ms"] = ms
            found[f"{kind}_to_flatreg"] = {name: t / ms["flatreg"] for name, t in ms.items()}
    return found


def attempt(fam: ModuleType, method: str, classes: int = 4, width: int = 6) -> float | str:
    """Value relative to the definition, or the error, in one line."""
    problem = random_head(classes, width, 32, 0)
    try:
        value = published(fam, *problem, method=method)
    except Exception as error:  # whatever it raises is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return float(value / definition(*problem))


def describe(path: Path, threads: int) -> dict[str, Any]:
    """What ran, and on what."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    cpu = re.search(r"model name\s*: (.*)", text)
    file = path / IN_CLONE if path.is_dir() else path
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatreg": version("flatreg"),
        "fam_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--fam", type=Path, required=True, help="a clone, or its FAMloss.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--heads", type=int, default=100, help="small heads of B")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/published_flatness.json"))
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the published code moves to CUDA where there is one
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch.tensor of a tensor warns, in line 34
    fam = load(args.fam)
    results: dict[str, Any] = {"machine": describe(args.fam, torch.get_num_threads())}
    timed = {"published": partial(published, fam), "flatreg": ours, "head": cross_entropy}
    results["A"] = {"batch": args.batch}
    for classes, width in SHAPES:
        size = 4 * (classes * width) ** 2
        methods = {n: r for n, r in timed.items() if n != "published" or size < TOO_LARGE}
        row = measure_time(methods, classes, width, args.batch, args.rounds)
        results["A"][f"K={classes}, d={width}"] = {"dense_hessian_bytes": size, **row}
    torch.set_default_dtype(torch.float64)
    small = {n: partial(published, load(args.fam, line)) for n, line in VARIANTS.items()}
    results["B"] = {"heads": args.heads, "classes": 4, "features": 6, "batch": 32}
    results["B"]["to_definition"] = agree(
        {"definition": definition, **small, "flatreg": ours}, args.heads
    )
    results["C"] = {m: attempt(fam, m) for m in ("autograd_fast", "functorch", "autograd")}
    results["C"]["autograd_fast, K=6, d=4"] = attempt(fam, "autograd_fast", 6, 4)
    write_json(args.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
