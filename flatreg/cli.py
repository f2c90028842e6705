"""Command line: flatreg run | evaluate | check."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from flatreg.data import Splits
from flatreg.objective import Objective
from flatreg.plots import draw
from flatreg.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from flatreg.report import Report, make_report, table, write_report, write_whole
from flatreg.results import versions
from flatreg.threat import to_unit_range
from flatreg.train import (
    build_model,
    build_optimizer,
    check_batch_size,
    load_checkpoint,
    make_accelerator,
    train,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line a mistake on stderr, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    overrides = [o for o in options.overrides if not o.startswith("output=")]
    output = next(
        (o.removeprefix("output=") for o in options.overrides if o.startswith("output=")), None
    )
    try:
        if options.command == "check":
            check(load_recipe(options.recipe, overrides), options.recipe)
        elif options.command == "run":
            folder = Path(output or Path("runs") / Path(options.recipe).stem)
            run(load_recipe(options.recipe, overrides), folder)
        else:
            source = Path(options.folder)
            evaluate_run(source, overrides, Path(output or source / "evaluation"))
    except (ValueError, OSError, FloatingPointError) as error:
        if options.traceback:
            raise
        prefix = "" if isinstance(error, RecipeError) else "flatreg: "
        print(f"{prefix}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from the last epoch" if options.command == "run" else ""
        print(f"flatreg: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def run(recipe: Recipe, folder: Path) -> Report:
    """Train every arm of `recipe`, judge them, and write everything into `folder`.

    In a folder that holds part of the same recipe's run, it goes on from the last epoch.

    Raises:
        ValueError: the folder holds the run of another recipe.
    """
    accelerator = make_accelerator()
    _warn_of_lost_processes(accelerator)
    resolved = dump_recipe(recipe)
    written = folder / "recipe.yaml"
    if written.exists() and written.read_text() != resolved:
        raise ValueError(
            f"{folder} holds the run of another recipe: choose another folder with output=DIR"
        )
    accelerator.wait_for_everyone()
    splits = recipe.data.load()
    _try_out(recipe, splits)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(written, resolved)
        environment = versions() | {
            "device": str(accelerator.device),
            "processes": str(accelerator.num_processes),
            "threads": str(torch.get_num_threads()),
            "mixed_precision": accelerator.mixed_precision,
        }
        write_whole(folder / "environment.json", json.dumps(environment, indent=1))
    for name, arm in recipe.arms().items():
        train(recipe, name, arm, splits, folder / "checkpoints" / name, accelerator)
    return _judge(recipe, splits, folder, folder, accelerator)


def evaluate_run(source: Path, overrides: Sequence[str], folder: Path) -> Report:
    """Judge the models of the run in `source` again, under `evaluation.*` overrides.

    The report goes into `folder`; by default beside the run's own, which stays.

    Raises:
        ValueError: the run is not complete, or something else than its evaluation is overridden.
    """
    foreign = [o for o in overrides if not o.startswith(("evaluation.", "data.path="))]
    if foreign:
        raise ValueError(f"evaluate takes evaluation.* and data.path overrides, got {foreign[0]!r}")
    recipe = load_recipe(source / "recipe.yaml", overrides)
    return _judge(recipe, recipe.data.load(), source, folder, make_accelerator())


def check(recipe: Recipe, name: str) -> None:
    """Build the data and every arm of `recipe`, and say that they work together."""
    splits = recipe.data.load()
    parameters = _try_out(recipe, splits)
    print(
        f"{name}: ok: {recipe.model.name} ({parameters:,} parameters), "
        f"{len(splits.train)} training and {len(splits.test)} test images, "
        f"arms: {', '.join(recipe.arms())}"
    )


def _try_out(recipe: Recipe, splits: Splits) -> int:
    """Evaluate every arm's objective on one small batch, so that no arm fails after an hour."""
    images, labels = to_unit_range(splits.train.images[:4]), splits.train.labels[:4]
    model = build_model(recipe, splits)
    try:
        model(images)
    except RuntimeError as error:
        raise ValueError(
            f"model {recipe.model.name} does not take images of shape {tuple(images.shape[1:])}: "
            f"{' '.join(str(error).split())}"
        ) from error
    check_batch_size(recipe, splits)
    for arm in recipe.arms().values():
        build_optimizer(recipe, arm, model, splits)
        Objective(model, arm.criterion, arm.penalties)(images, labels)
    return sum(p.numel() for p in model.parameters())


def _warn_of_lost_processes(accelerator: Accelerator) -> None:
    """Say so when `accelerate launch --cpu --num_processes N` started one process in silence.

    Without an MPI hostfile it does (accelerate 1.15), and sets a port that nothing then uses.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and (
        "MASTER_PORT" in os.environ
    )
    if asked and accelerator.num_processes == 1:
        print(
            "flatreg: accelerate started one process only; for several on the CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m flatreg run ...",
            file=sys.stderr,
        )


def _judge(
    recipe: Recipe, splits: Splits, source: Path, folder: Path, accelerator: Accelerator
) -> Report:
    """Evaluate the checkpoints, in float32 whatever they were trained in, and write the report."""
    models, histories = {}, {}
    for name in recipe.arms():
        models[name] = build_model(recipe, splits, initial=False).to(accelerator.device)
        histories[name] = load_checkpoint(source / "checkpoints" / name, models[name])
        if len(histories[name]) < recipe.epochs:
            raise ValueError(
                f"{source}/checkpoints/{name}: expected {recipe.epochs} epochs, "
                f"found {len(histories[name])}: the run is not complete"
            )
    main = accelerator.is_main_process
    report = make_report(recipe, splits, models, histories, progress=main)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(report, folder, draw(report, folder))
        print(table(report))
        processes = f"{accelerator.num_processes} x {accelerator.device.type}"
        print(f"report    {folder / 'report.md'} ({processes})")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flatreg", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show where a mistake came from")
    commands = parser.add_subparsers(dest="command", required=True)
    places = "key.path=value to change the recipe, output=DIR for the folder to write"
    for name, target, explanation in (
        ("run", "recipe", "train the arms of a recipe and report them side by side"),
        ("check", "recipe", "say every mistake of a recipe, or that there is none"),
        ("evaluate", "folder", "judge the models of a run again"),
    ):
        command = commands.add_parser(name, help=explanation, description=explanation)
        command.add_argument(target)
        command.add_argument("overrides", nargs="*", metavar="key=value", help=places)
    return parser
