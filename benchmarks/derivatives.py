"""Are the higher derivatives of timm's models right? One small model of every family.

    python benchmarks/derivatives.py --output benchmarks/derivatives.json

The models are those of `benchmarks/heads.json`, of at most 6 million parameters that take images
of 64 pixels, in train mode, without dropout. Every derivative that a term may need is compared with
a central difference of the one below, in float64 (`flatreg.models.derivative_check`):

inputs-2    gradient in the weights of a gradient in the inputs (`InputGradient`, `MarginBound`)
inputs-3    the same of a second derivative in the inputs (`MarginBound` with curvature)
weights-2   of a gradient in the weights (the Hessian)
weights-3   of a second derivative in the weights (`LayerFlatness`)

"right" is also said where nothing can be concluded: where a model stops gradients on purpose.
Runs one model at a time and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from heads import build
from tqdm import tqdm

from flatreg.data.files import write_json
from flatreg.models.derivative_check import Leaves, check_derivatives

DERIVATIVES: tuple[tuple[Leaves, int], ...] = (
    ("inputs", 2),
    ("inputs", 3),
    ("weights", 2),
    ("weights", 3),
)


def verdict(model: torch.nn.Module, images: torch.Tensor, of: Leaves, order: int) -> str:
    """Right, wrong, or what torch says is missing."""
    try:
        check_derivatives(model, images, order, of, what="x", alternative="y")
    except ValueError as error:
        if "wrong" in str(error):
            return "wrong"
        return str(error).partition("lacks (")[2].rpartition(")")[0][:80]
    return "right"


def main() -> None:
    """Run what is not in the output yet, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--largest", type=float, default=6e6)
    options = parser.parse_args()
    survey = json.loads(Path(__file__).with_name("heads.json").read_text(encoding="utf-8"))["rows"]
    rows = {}
    if options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for row in tqdm(survey.values()):
        name = row.get("model", "")
        large = row.get("parameters", 0) > options.largest or row.get("size", 0) > 64
        if not name or name in rows or large:
            continue
        try:
            model, images = build(name)
        except Exception as error:  # a model that does not build is no finding of ours
            rows[name] = {"error": str(error).splitlines()[0][:80]}
            continue
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        start = time.perf_counter()
        rows[name] = {f"{of}-{n}": verdict(model, images, of, n) for of, n in DERIVATIVES}
        rows[name]["seconds"] = round(time.perf_counter() - start, 1)
        del model
        gc.collect()
        machine = {"torch": version("torch"), "timm": version("timm")}
        write_json(options.output, {**machine, "rows": rows})
    for of, n in DERIVATIVES:
        found = Counter(row.get(f"{of}-{n}", "not built") for row in rows.values())
        print(f"{of}-{n}", dict(found))


if __name__ == "__main__":
    main()
