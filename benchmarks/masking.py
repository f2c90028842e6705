"""Defences that mask: what `standard` and adaptive attacks leave, and which finding is flagged.

    python benchmarks/masking.py --output benchmarks/masking.json

The adaptive attack is the gradient stages of `standard` with `bpda=` for the module of the defence,
by the identity; for a defence that draws noise, PGD and APGD on the mean of 20 draws, and a vote of
15. "both" counts the images that survive `standard` and the adaptive attack.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from defences import DEFENCES, EPS, Defence, digits
from side_by_side import Rows, describe_machine, show

from flatreg import evaluate
from flatreg.attacks import apgd, eot, pgd
from flatreg.attacks.cascade import PRESETS
from flatreg.data.files import write_json
from flatreg.measures.estimate import Estimate

EOT = (
    partial(eot, attack=partial(pgd, steps=10), draws=20),
    partial(eot, attack=partial(apgd, loss="margin", steps=25), draws=20),
)


def judge(defence: Defence, samples: int) -> dict[str, Any]:
    """Clean accuracy, that under `standard` and under the adaptive attack, and what is flagged."""
    torch.manual_seed(0)
    model = defence.build()
    how = dict(eps=EPS, samples=samples, progress=False)
    standard = evaluate(model, digits()[1], **how)
    if defence.random:
        adaptive = evaluate(model, digits()[1], attack=EOT, votes=15, diagnose=False, **how)
    else:
        steep, options = PRESETS["standard"][:-1], dict(bpda=defence.bpda, diagnose=False)
        adaptive = evaluate(model, digits()[1], attack=steep, **options, **how)
    pairs = zip(standard.verdicts, adaptive.verdicts, strict=True)
    both = sum(verdicts == (-1, -1) for verdicts in pairs)
    estimates = {
        "clean": standard.clean,
        "standard": standard.attacked,
        "without Square": standard.stages[-2].accuracy,
        "adaptive": adaptive.attacked,
        "both": Estimate.share(both, samples),
    }
    flagged = {f.name: f.value for f in standard.findings if f.verdict == "flagged"}
    jumps = next(f.value for f in standard.findings if f.name == "margin jumps")
    numbers = {name: [e.value, e.low, e.high] for name, e in estimates.items()}
    shown = {name: str(e) for name, e in estimates.items()}
    return {"numbers": numbers, "shown": shown, "margin jumps": jumps, "flagged": flagged}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", default="", help="names with this; the other rows stay")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/masking.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine("cpu") | {"samples": args.samples}
    print(json.dumps(machine, indent=1))
    results: dict[str, Any] = {"eps": EPS, "defences": {}}
    if args.only and args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    table: Rows = {}
    for name, defence in DEFENCES.items():
        if args.only in name:
            found = judge(defence, args.samples) | {"machine": machine}
            results["defences"][name] = found
            table[name] = found["shown"] | {"flagged": ", ".join(found["flagged"]) or "none"}
            write_json(args.output, results)  # after each: a run takes minutes
            print(name, table[name], flush=True)
    show("Masking", table, ["clean", "standard", "without Square", "adaptive", "both", "flagged"])


if __name__ == "__main__":
    main()
