"""What the command line does: each command writes into one folder and can be called again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatreg.data.files import alone_in, write_json, write_whole
from flatreg.data.images import Splits
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.results import versions
from flatreg.report.card import card_text, write_card
from flatreg.report.figures.card import draw_card
from flatreg.report.figures.pareto import pareto
from flatreg.report.figures.report import draw
from flatreg.report.figures.style import save
from flatreg.report.figures.sweep import sweep_curve
from flatreg.report.make import make_report
from flatreg.report.results import insert_table, sections_text
from flatreg.report.rows import Report
from flatreg.report.runs import keep_results, read_runs, sections
from flatreg.report.sweep import sweep_table
from flatreg.report.text import table, write_report
from flatreg.run.build import build_model, build_optimizer, check_batch_size, fit_manifolds
from flatreg.run.checkpoints import read_history
from flatreg.run.models import load_model
from flatreg.run.recipe import Arm, Recipe, dump_recipe, load_recipe
from flatreg.run.sweep import Sweep, recipes_over, run_sweep, trained_arm
from flatreg.run.target import load_target, measure_target
from flatreg.run.train import augmented, finished, make_accelerator, train
from flatreg.terms.objective import Objective
from flatreg.threat import to_unit_range

_MOVED = ("data.path=", "data.root=")  # the same data in another place
_TRIED_IMAGES = 4096  # a manifold is tried out on so many: more than any rank in use


def run(recipe: Recipe, folder: Path) -> Report:
    """Train every arm of `recipe`, judge them, and write everything into `folder`.

    In a folder that holds part of the same recipe's run, it goes on from the last epoch.

    Raises:
        ValueError: the folder holds the run of another recipe, or another run writes there.
    """
    accelerator = make_accelerator(recipe.log_with, folder)
    _warn_of_lost_processes(accelerator)
    resolved = dump_recipe(recipe)
    written = folder / "recipe.yaml"
    if written.exists() and load_recipe(written) != recipe:
        raise ValueError(
            f"{folder} holds the run of another recipe: choose another folder with output=DIR"
        )
    accelerator.wait_for_everyone()
    splits = recipe.data.load()
    manifolds: dict[str, Any] = {}
    arms: dict[str, Arm] = {}
    for name, arm in recipe.arms().items():
        place = folder / "checkpoints" / name
        arms[name] = fit_manifolds(arm, splits.train.images, manifolds, place)
    _try_out(recipe, splits, arms)
    with alone_in(folder, accelerator.is_main_process):
        if accelerator.is_main_process:
            write_whole(written, resolved)
            _write_environment(folder, accelerator)
        if recipe.log_with:
            accelerator.init_trackers("flatreg", {"recipe": resolved})
        for name, arm in arms.items():
            train(recipe, name, arm, splits, folder / "checkpoints" / name, accelerator)
        accelerator.end_training()
        return _judge(recipe, splits, folder, folder, accelerator)


def sweep(recipe: Recipe, key: str, values: Sequence[Any], folder: Path) -> Sweep:
    """Train and judge `recipe` for every value of `key`, and write everything into `folder`.

    See `flatreg.run.sweep.run_sweep`; a folder that holds part of the sweep is gone on with.
    """
    accelerator = make_accelerator()
    _warn_of_lost_processes(accelerator)
    splits, name = recipe.data.load(), trained_arm(key)
    manifolds: dict[str, Any] = {}
    for one in recipes_over(recipe, key, values).values():
        _try_out(one, splits, {name: _fit_a_few(one.arms()[name], splits, manifolds)})
    with alone_in(folder, accelerator.is_main_process):
        result = run_sweep(recipe, key, values, folder, accelerator)
    if accelerator.is_main_process:
        _write_environment(folder, accelerator)
        save(sweep_curve(result), folder / "sweep.png")
        print(sweep_table(result))
        print(f"sweep     {folder / 'sweep.json'}, {folder / 'sweep.png'}")
    return result


def evaluate_run(source: Path, overrides: Sequence[str], folder: Path) -> Report:
    """Judge the models of the run in `source` again, under `evaluation.*` overrides.

    The report goes into `folder`; by default beside the run's own, which stays.

    Raises:
        ValueError: the run is not complete, or something else than its evaluation is overridden.
    """
    foreign = [o for o in overrides if not o.startswith(("evaluation.", *_MOVED))]
    if foreign:
        raise ValueError(
            f"evaluate takes evaluation.*, data.path and data.root overrides, got {foreign[0]!r}"
        )
    recipe = load_recipe(source / "recipe.yaml", overrides)
    accelerator, splits = make_accelerator(), recipe.data.load()
    with alone_in(folder, accelerator.is_main_process):
        return _judge(recipe, splits, source, folder, accelerator)


def tabulate(paths: Sequence[str], file: Path | None, kept: Path | None) -> str:
    """Print the table of finished runs; see `flatreg.report.results.results_table`.

    Args:
        paths: folders of runs, or `report.json` files.
        file: Markdown to write it into, between its markers if it has them; the figure of what
            attacked accuracy costs goes beside it.
        kept: folder in which to keep what the table needs of each run.

    Raises:
        ValueError: reports that do not belong into one table, or no place for it in `file`.
    """
    if file is not None and file.suffix != ".md":
        raise ValueError(f"output: expected a file FILE.md, got {file}")
    runs = read_runs(paths)
    found = sections(runs)
    text = sections_text(found)
    if file is not None:
        picture = file.with_suffix(".png")
        caption = "Attacked accuracy against training time"
        insert_table(file, f"{text}\n![{caption}]({picture.name})")
        save(pareto(found), picture)
    if kept is not None:
        keep_results(runs, kept)
    print(text, end="")
    return text


def measure(
    model: str, data: str | None, overrides: Sequence[str], folder: Path | None
) -> GeometryCard:
    """Measure the geometry of a timm model or of an arm of a run, and write its card.

    The card goes into `folder`; by default beside the checkpoints of the run, or into
    `runs/geometry`.
    """
    accelerator = make_accelerator()
    target = load_target(model, data, overrides)
    _try_pass(target.name, target.model, target.splits.train.images[:2])
    target.model.to(accelerator.device)
    card = measure_target(target, progress=accelerator.is_main_process)
    if accelerator.is_main_process:
        run = Path(model).resolve().parent.parent if Path(model).is_dir() else Path("runs")
        folder = folder or run / "geometry" / Path(model).name
        folder.mkdir(parents=True, exist_ok=True)
        write_card(card, folder, draw_card(card, folder))
        print(card_text(card))
        print(f"card      {folder / 'card.md'}, {folder / 'card.json'}")
    return card


def check(recipe: Recipe, name: str) -> None:
    """Build the data and every arm of `recipe`, and say that they work together."""
    splits = recipe.data.load()
    manifolds: dict[str, Any] = {}
    arms = {n: _fit_a_few(arm, splits, manifolds) for n, arm in recipe.arms().items()}
    parameters = _try_out(recipe, splits, arms)
    print(
        f"{name}: ok: {recipe.model.name} ({parameters:,} parameters), "
        f"{len(splits.train)} training and {len(splits.test)} test images, "
        f"arms: {', '.join(recipe.arms())}"
    )


def _fit_a_few(arm: Arm, splits: Splits, manifolds: dict[str, Any]) -> Arm:
    """Fit the manifolds of an arm to some images: to try it out, not to train it."""
    return fit_manifolds(arm, splits.train.images[:_TRIED_IMAGES], manifolds)


def _write_environment(folder: Path, accelerator: Accelerator) -> None:
    environment = versions() | {
        "device": str(accelerator.device),
        "processes": str(accelerator.num_processes),
        "threads": str(torch.get_num_threads()),
        "mixed_precision": accelerator.mixed_precision,
    }
    write_json(folder / "environment.json", environment)


def _try_out(recipe: Recipe, splits: Splits, arms: Mapping[str, Arm]) -> int:
    """Evaluate every arm's objective on one small batch, so that no arm fails after an hour."""
    check_batch_size(recipe, splits)
    stored, prepare = (splits.train.images[:4], splits.train.labels[:4]), augmented(recipe, splits)
    for arm in arms.values():
        spec = arm.model or recipe.model
        model = build_model(spec, splits, seed=recipe.seed)
        _try_pass(spec.name, model, stored[0])
        build_optimizer(recipe, arm, model, splits)
        Objective(model, arm.criterion, arm.penalties)(*prepare(*stored))
    return sum(p.numel() for p in model.parameters())


def _try_pass(name: str, model: nn.Module, images: Tensor) -> None:
    try:
        model(to_unit_range(images))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model {name} does not take images of shape {tuple(images.shape[1:])}: "
            f"{' '.join(str(error).split())}"
        ) from error


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
        place = source / "checkpoints" / name
        histories[name] = read_history(place)
        if not finished(recipe, histories[name]):
            raise ValueError(
                f"{place}: expected {recipe.epochs} epochs, found {len(histories[name])}: the run "
                "is not complete"
            )
        models[name] = load_model(place).to(accelerator.device)
    main = accelerator.is_main_process
    report = make_report(
        recipe, splits, models, histories, folder=folder / "evaluations", progress=main
    )
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(report, folder, draw(report, folder))
        print(table(report))
        processes = f"{accelerator.num_processes} x {accelerator.device.type}"
        print(f"report    {folder / 'report.md'} ({processes})")
    return report
