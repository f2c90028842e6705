"""What the command line does: each command writes into one folder and can be called again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter

import flatreg.report.tables as tables
from flatreg.data.files import alone_in, read_json, sweep_partials, write_json, write_whole
from flatreg.data.images import Splits
from flatreg.data.progress import tell, write
from flatreg.data.sharing import rank_and_world
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.evaluation.results import versions
from flatreg.report.card import card_text, write_card
from flatreg.report.figures.card import draw_card
from flatreg.report.figures.pareto import pareto
from flatreg.report.figures.report import draw, sweep_curve
from flatreg.report.figures.style import save
from flatreg.report.make import make_report, report_on
from flatreg.report.rows import Report, Section, keep_results, read_runs, sections
from flatreg.report.text import insert_table, sections_text, sweep_table, table, write_report
from flatreg.run.build import (
    check_input,
    load_model,
)
from flatreg.run.checkpoints import read_history
from flatreg.run.processes import check_batch, check_shared, in_turn, warn_of_lost_processes
from flatreg.run.recipe import Recipe, dump_recipe, holds_another, load_recipe
from flatreg.run.recipe_sections import EvaluationSettings
from flatreg.run.settings import parse_settings
from flatreg.run.sweep import Sweep, recipes_over, run_sweep, trained_arm
from flatreg.run.target import load_target, measure_target, run_of, short_form, to_evaluate
from flatreg.run.train import finished, make_accelerator, train
from flatreg.run.trial import Mistakes, build_all, check_disk, noted, refuse, try_out_all

_ENVIRONMENT = TypeAdapter(dict[str, str])


def run_recipe(recipe: Recipe, folder: str | Path) -> Report:
    """Train every arm of `recipe`, evaluate them, and write everything into `folder`.

    In a folder that holds part of the same recipe's run, it continues from the last epoch. The
    table of the report is printed as well.

    Raises:
        ValueError: the folder holds the run of another recipe, or another run writes there; or
            the recipe names what cannot be had, such as a model that timm does not know.
        FloatingPointError: the loss of an arm is not finite.
    """
    folder = Path(folder)
    check_disk(folder, [])
    accelerator = make_accelerator(
        recipe.log_with, folder, recipe.accumulation, recipe.mixed_precision
    )
    warn_of_lost_processes(accelerator)
    check_batch(recipe, accelerator.num_processes)
    check_shared(folder)
    _refuse_another(folder, recipe)
    accelerator.wait_for_everyone()
    splits = in_turn(recipe.data.load, fetches=getattr(recipe.data, "download", False))
    fetches = any(arm.model and arm.model.pretrained for arm in recipe.arms().values())
    trainings = in_turn(partial(build_all, recipe, splits, folder), fetches=fetches)
    resolved = dump_recipe(recipe)
    with alone_in(folder, accelerator.is_main_process):
        if accelerator.is_main_process:
            _refuse_another(folder, recipe)  # one may have begun since
            sweep_partials(folder)
            write_whole(folder / "recipe.yaml", resolved)
            _write_environment(folder, accelerator)
        if recipe.log_with:
            accelerator.init_trackers("flatreg", {"recipe": resolved})
            tell(_announced(recipe, splits))
        while trainings:  # one that is over is not kept in memory
            place = next(iter(trainings))
            train(trainings.pop(place), place, accelerator)
        report = _evaluate_arms(recipe, splits, folder, folder, accelerator, list(recipe.arms()))
        if accelerator.is_main_process:
            arm = folder / "checkpoints" / recipe.arm
            tell(
                f"next      flatreg evaluate {folder} eps={recipe.evaluation.eps / 2:g}; "
                f"flatreg measure {arm}; flatreg table {folder}"
            )
        accelerator.end_training()  # closes the trackers, and the process group that judging needs
        return report


def _refuse_another(folder: Path, recipe: Recipe) -> None:
    if holds_another(folder / "recipe.yaml", recipe):
        raise ValueError(
            f"{folder} holds the run of another recipe: choose another folder with output=DIR"
        )


def sweep(recipe: Recipe, key: str, values: Sequence[Any], folder: Path) -> Sweep:
    """Train and evaluate `recipe` for every value of `key`, and write everything into `folder`.

    See `flatreg.run.sweep.run_sweep`; in a folder that holds part of the sweep, it continues.
    """
    check_disk(folder, [])
    accelerator = make_accelerator(
        accumulation=recipe.accumulation, mixed_precision=recipe.mixed_precision
    )
    warn_of_lost_processes(accelerator)
    check_shared(folder)
    recipes = recipes_over(recipe, key, values)
    for one in recipes.values():
        check_batch(one, accelerator.num_processes)
    splits = in_turn(recipe.data.load, fetches=getattr(recipe.data, "download", False))
    arms = {f"{key}={name}: ": (one, trained_arm(one, key)) for name, one in recipes.items()}
    refuse(try_out_all(arms, splits, folder)[0])
    with alone_in(folder, accelerator.is_main_process):
        result = run_sweep(recipe, key, values, folder, accelerator)
    if accelerator.is_main_process:
        _write_environment(folder, accelerator)
        save(sweep_curve(result), folder / "sweep.png")
        print(sweep_table(result))
        tell(f"sweep     {folder / 'sweep.json'}, {folder / 'sweep.png'}")
    return result


def check(recipe: Recipe, name: str, folder: Path) -> dict[str, Any]:
    """Try what `run_recipe` needs, leave nothing behind, and print that it is all there.

    Data and trackers, every arm's model, objective and optimizer, its evaluation on test images,
    and room for its checkpoints on the disk of `folder`.

    Returns:
        The model, the arms, and the numbers of parameters and images.

    Raises:
        RecipeError: every mistake that was found, one a line.
    """
    mistakes: Mistakes = []
    with noted(mistakes):
        make_accelerator(recipe.log_with, Path(), recipe.accumulation, recipe.mixed_precision)
    with noted(mistakes):
        splits = recipe.data.load()
    if any(about == "" for about, _, _ in mistakes):  # the data are missing, or a tracker is
        refuse(mistakes, name)
    arms = recipe.arms()
    found, parameters = try_out_all({f"arm {arm}: ": (recipe, arm) for arm in arms}, splits, folder)
    refuse(found, name)
    train, test = len(splits.train), len(splits.test)
    if rank_and_world()[0] == 0:  # one process of a launch says it
        print(
            f"{name}: ok: {recipe.model.name} ({parameters:,} parameters), {train} training and "
            f"{test} test images, arms: {', '.join(arms)}"
        )
    counts = {"parameters": parameters, "training_images": train, "test_images": test}
    return {"recipe": name, "model": recipe.model.name, "arms": list(arms)} | counts


def evaluate(
    model: str, data: str | None, overrides: Sequence[str], folder: Path | None
) -> tuple[Report, Path]:
    """Evaluate the arms of a run again, one of them, or a timm model, and write a report.

    The report goes into `folder`: by default into `evaluation` of the run (one arm: a folder of its
    name there), or into `runs/evaluation/NAME`. The report of a run stays.

    Args:
        model: folder of a run, RUN/checkpoints/ARM, or what `load_target` takes.
        data: as `load_target` takes it.
        overrides: `key=value`, settings of the evaluation and `data.*`; of a timm model also those
            of `TargetSettings`.
        folder: left out, as above.

    Returns:
        The report, and its folder.

    Raises:
        ValueError: the run is not complete, an override changes more than the evaluation, or as
            `load_target`.
    """
    place = Path(model)
    run, arm = (place, None) if (place / "recipe.yaml").is_file() else (run_of(place), place.name)
    if not place.is_dir() or run is None:
        return _evaluate_target(model, data, overrides, folder)
    recipe = load_recipe(run / "recipe.yaml", _of_evaluation(data, overrides))
    if arm is not None and arm not in recipe.arms():
        raise ValueError(
            f"{place}: expected an arm of the run, {', '.join(recipe.arms())}, got {arm}"
        )
    folder = folder or (run / "evaluation" / arm if arm else run / "evaluation")
    accelerator = make_accelerator()
    splits = in_turn(partial(to_evaluate, recipe.data))
    check_shared(folder)
    arms = [arm] if arm else list(recipe.arms())
    with alone_in(folder, accelerator.is_main_process):
        return _evaluate_arms(recipe, splits, run, folder, accelerator, arms), folder


def _of_evaluation(data: str | None, overrides: Sequence[str]) -> list[str]:
    """Overrides of a recipe: names of the evaluation's settings may stand without `evaluation.`."""
    found = [] if data is None else [f"data={json.dumps(short_form(data, None))}"]
    for override in overrides:
        (key,) = parse_settings([override])
        if key.split(".")[0] in EvaluationSettings.model_fields:
            override = f"evaluation.{override}"
        elif not key.startswith(("evaluation.", "data.")):
            raise ValueError(
                "evaluate takes settings of the evaluation (eps, norm, ...) and data.*, got "
                f"{key!r}"
            )
        found.append(override)
    return found


def _evaluate_target(
    model: str, data: str | None, overrides: Sequence[str], folder: Path | None
) -> tuple[Report, Path]:
    """Evaluate a model that no run of ours has trained."""
    accelerator = make_accelerator()
    folder = folder or Path("runs") / "evaluation" / Path(model).name
    target = in_turn(partial(load_target, model, data, overrides, EvaluationSettings))
    check_input(target.name, target.model, target.images.first(2))
    target.model.to(accelerator.device)
    check_shared(folder)
    with alone_in(folder, accelerator.is_main_process):
        main = accelerator.is_main_process
        report = report_on(target, folder=folder / "evaluations", progress=main)
        if main:
            _write(report, folder, accelerator)
    return report, folder


def tabulate(paths: Sequence[str], file: Path | None, kept: Path | None) -> list[Section]:
    """Print the table of finished runs; see `flatreg.report.text.results_table`.

    It is also written into `file`, in Markdown, between its markers if it has them, with the figure
    of attacked accuracy against training time beside it. `kept` is for small copies of the reports.

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
        insert_table(file, f"{text}\n{tables.picture(picture.name, caption)}")
        save(pareto(found), picture)
    if kept is not None:
        keep_results(runs, kept)
    print(text, end="")
    return found


def measure(model: str, data: str | None, overrides: Sequence[str], folder: Path | None) -> Path:
    """Measure the geometry of a timm model or of an arm of a run, and write its card.

    The card goes into `folder`, which is returned; by default beside the checkpoints of the run, or
    into `runs/geometry`.

    Raises:
        ValueError: as `load_target`, or as `flatreg.measure`.
    """
    accelerator = make_accelerator()
    target = load_target(model, data, overrides, MeasureSettings)
    check_input(target.name, target.model, target.splits.train.first(2))
    target.model.to(accelerator.device)
    card = measure_target(target, progress=accelerator.is_main_process)
    run = Path(model).resolve().parent.parent if Path(model).is_dir() else Path("runs")
    folder = folder or run / "geometry" / Path(model).name
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_card(card, folder, draw_card(card, folder))
        print(card_text(card))
        tell(f"card      {folder / 'card.md'}, {folder / 'card.json'}")
    return folder


def _write_environment(folder: Path, accelerator: Accelerator) -> None:
    file, now = folder / "environment.json", str(accelerator.num_processes)
    before = read_json(file, _ENVIRONMENT, what="an environment") if file.exists() else {}
    processes = before.get("processes", now)
    if processes.split(", then ")[-1] != now:  # of another session of this run
        processes += f", then {now}"
        write(
            f"flatreg: {folder}: the run began with another number of processes ({processes}): it "
            "continues, and its numbers are not those of a run with one number"
        )
    environment = versions() | {
        "device": str(accelerator.device),
        "processes": processes,
        "threads": str(torch.get_num_threads()),
        "mixed_precision": accelerator.mixed_precision,
        "accumulation": str(accelerator.gradient_accumulation_steps),
    }
    write_json(file, environment)


def _announced(recipe: Recipe, splits: Splits) -> str:
    """What a run is about to do."""
    threat, arms = recipe.evaluation, list(recipe.arms())
    steps = len(splits.train) // recipe.batch_size * recipe.accumulation
    n = min(threat.samples or len(splits.test), len(splits.test))
    return (
        f"flatreg: trains {len(arms)} arm{'s' * (len(arms) > 1)} ({', '.join(arms)}), "
        f"{recipe.epochs} epochs of {steps} batches each; then attacks {n} test images of each "
        f"({threat.norm} eps {threat.eps:.4g}, {threat.attack})"
    )


def _evaluate_arms(
    recipe: Recipe,
    splits: Splits,
    source: Path,
    folder: Path,
    accelerator: Accelerator,
    arms: Sequence[str],
) -> Report:
    """Evaluate checkpoints, in float32 whatever they were trained in, and write the report."""
    models, histories = {}, {}
    for name in arms:
        place = source / "checkpoints" / name
        histories[name] = read_history(place)
        if not finished(recipe, histories[name]):
            raise ValueError(
                f"{place}: expected {recipe.epochs} epochs, found {len(histories[name])}: the run "
                f"is not complete: flatreg run {source / 'recipe.yaml'} output={source} continues "
                "it"
            )
        models[name] = load_model(place)
        check_input(name, models[name], splits.test.first(2))
        models[name].to(accelerator.device)
    main, kept = accelerator.is_main_process, folder / "evaluations"
    report = make_report(recipe, splits, models, histories, folder=kept, progress=main)
    if main:
        _write(report, folder, accelerator)
    return report


def _write(report: Report, folder: Path, accelerator: Accelerator) -> None:
    """Write a report with its figures, and print its table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_report(report, folder, draw(report, folder))
    print(table(report))
    processes = f"{accelerator.num_processes} x {accelerator.device.type}"
    tell(f"report    {folder / 'report.md'} ({processes})")
