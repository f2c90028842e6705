"""What an epoch of every arm of a recipe costs, beside its plain arm.

    python benchmarks/arm_times.py recipes/cifar10_50k.yaml 'data={kind: array, path: FILE}'

Every arm trains in the recipe's own loop, with its loader, augmentation, clipping and average of
the weights, but on `--steps` batches alone. In every round each arm takes one such epoch, in an
order that changes from round to round; the first round is not counted. The ratio is the median,
over rounds, of the arm's seconds over the plain arm's in the same round, and its quartiles. The
monitor and the checkpoints are left out. Further arguments change the recipe, as for `flatreg run`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from side_by_side import Rows, describe_machine, show

from flatreg import load_recipe
from flatreg.data.files import write_json
from flatreg.data.progress import progress_bar
from flatreg.run.build import Training
from flatreg.run.epoch import EpochSoFar, train_epoch
from flatreg.run.train import make_accelerator, new_memory
from flatreg.run.trial import build_all
from flatreg.terms.objective import Objective

NEVER: Any = SimpleNamespace(due=lambda update, at_once: False)  # saves, and ends early


class Arm:
    """An arm that can take one epoch after the other."""

    def __init__(self, training: Training, accelerator: Accelerator, folder: Path) -> None:
        model, optimizer, loader = accelerator.prepare(
            training.model, training.optimizer, training.loader
        )
        memory = new_memory(training, folder, accelerator)
        self.training = replace(training, optimizer=optimizer, loader=loader)
        self.objective = Objective(
            torch.compile(model) if training.network.compile else model,
            training.arm.criterion,
            training.arm.penalties,
            memory=memory,
        )
        self.memory, self.accelerator = memory, accelerator

    def seconds(self, epoch: int, bar: Any) -> float:
        """Train for an epoch."""
        set_seed(epoch)
        self.memory.start_epoch(epoch)
        sofar = EpochSoFar(epoch=epoch)
        return train_epoch(
            self.training, self.objective, self.accelerator, bar, sofar, NEVER
        ).seconds


def measure(arms: dict[str, Arm], rounds: int, steps: int) -> Rows:
    """Seconds of every arm in every round but the first, and the ratio to the plain arm's."""
    names, seconds = list(arms), dict[str, list[float]]()
    with progress_bar("rounds", (rounds + 1) * len(names) * steps, unit="batches") as bar:
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in [*names[first:], *names[:first]][:: 1 if turn % 2 else -1]:
                seconds.setdefault(name, []).append(arms[name].seconds(turn, bar))
    plain, rows = seconds["plain"][1:], Rows()
    for name in names:
        own = seconds[name][1:]
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"ratio": middle, "low": low, "high": high, "seconds": own}
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="as for `flatreg run`")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.rounds < 2 or args.steps < 1:
        parser.error(f"expected rounds >= 2 and steps >= 1, got {args.rounds} and {args.steps}")
    torch.set_num_threads(args.threads)
    short = [f"epochs={args.rounds + 1}", "optimizer.warmup_epochs=0", "monitor=null"]
    recipe = load_recipe(args.recipe, [*args.changes, *short])
    if "plain" not in recipe.arms():
        parser.error("expected a recipe with baseline: true, whose plain arm is the measure")
    machine = describe_machine("cpu")
    print(json.dumps(machine, indent=1))
    splits = recipe.data.load()
    count = args.steps * recipe.batch_size
    if len(splits.train) < count:
        parser.error(f"expected at least {count} training images, got {len(splits.train)}")
    splits = splits._replace(train=splits.train.at(torch.arange(count)))
    with tempfile.TemporaryDirectory() as scratch:
        accelerator = make_accelerator(
            accumulation=recipe.accumulation, mixed_precision=recipe.mixed_precision
        )
        trainings = build_all(recipe, splits, Path(scratch))
        arms = {t.name: Arm(t, accelerator, path) for path, t in trainings.items()}
        rows = measure(arms, args.rounds, args.steps)
    show(args.recipe.stem, rows, ["ratio", "low", "high"])
    stored = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    write_json(args.output, stored | {args.recipe.stem: {"machine": machine, "arms": rows}})


if __name__ == "__main__":
    main()
