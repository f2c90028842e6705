"""What the command line does: each command writes into one folder and can be called again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from accelerate import Accelerator

import flatreg.report.tables as tables
from flatreg.data.files import alone_in, write_json, write_whole
from flatreg.data.images import Splits
from flatreg.data.progress import tell, write
from flatreg.data.sharing import rank_and_world
from flatreg.data.text import counted
from flatreg.evaluation.results import versions
from flatreg.report.comparison import write_comparison
from flatreg.report.figures.attacked_against import attacked_against
from flatreg.report.figures.report import sweep_curve
from flatreg.report.figures.style import save, save_formats
from flatreg.report.results_table import insert_table, sections_text
from flatreg.report.rows import Report
from flatreg.report.sections import Section, keep_results, read_environment, read_runs, sections
from flatreg.report.text import sweep_table
from flatreg.run.checkpoints import read_history
from flatreg.run.evaluation import evaluate_arms
from flatreg.run.export import (
    CONFIG,
    WEIGHTS,
    CardSettings,
    PushSettings,
    export,
    files_to_push,
    push,
    write_model_card,
)
from flatreg.run.places import arm_folder
from flatreg.run.processes import check_batch, check_shared, in_turn, warn_of_lost_processes
from flatreg.run.recipe import Recipe, dump_recipe, holds_another, load_recipe
from flatreg.run.settings import parse_settings
from flatreg.run.sweep import Sweep, recipes_over, run_sweep, trained_arm
from flatreg.run.target import validated
from flatreg.run.trackers import close_trackers, log_report
from flatreg.run.train import finished, make_accelerator, train
from flatreg.run.trial import Mistakes, build_all, check_disk, noted, refuse, try_out_all


def run_recipe(recipe: Recipe, folder: str | Path) -> Report:
    """Train every arm of `recipe`, evaluate them, and write everything into `folder`.

    In a folder that holds part of the same recipe's run, it continues from the last epoch. The
    table of the report is printed as well.

    Raises:
        TypeError: `recipe` is none, as the path of one.
        ValueError: the folder holds the run of another recipe, or another run writes there; or
            the recipe names what cannot be had, such as a model that timm does not know.
        FloatingPointError: the loss of an arm is not finite.
    """
    if not isinstance(recipe, Recipe):
        kind = type(recipe).__name__
        advice = "write run_recipe(flatreg.load_recipe(file), folder)"
        raise TypeError(f"expected a recipe that is loaded, got a {kind}: {advice}")
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
            write_whole(folder / "recipe.yaml", resolved)
            _write_environment(folder, accelerator)
        if recipe.log_with:
            accelerator.init_trackers("flatreg", {"recipe": resolved})
        if accelerator.is_main_process:
            tell(_announced(recipe, splits))
        while trainings:  # one that is over is not kept in memory
            place = next(iter(trainings))
            train(trainings.pop(place), place, accelerator)
        report = evaluate_arms(recipe, splits, folder, folder, accelerator, list(recipe.arms()))
        if accelerator.is_main_process:
            run, arm = quote(str(folder)), quote(str(folder / recipe.arm))
            tell(
                f"next      flatreg evaluate {run} eps={recipe.evaluation.eps / 2:g}; "
                f"flatreg measure {arm}; flatreg table {run}"
            )
        log_report(accelerator, report, folder)
        close_trackers(accelerator)
        accelerator.end_training()  # closes the process group, which judging needs
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
        save_formats(sweep_curve(result), folder / "sweep.png")
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


def tabulate(paths: Sequence[str], file: Path | None, kept: Path | None) -> list[Section]:
    """Print the table of finished runs; see `flatreg.report.results_table.results_table`.

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
        save(attacked_against(found), picture)
    if kept is not None:
        keep_results(runs, kept)
    print(text, end="")
    return found


def compare_runs(paths: Sequence[str], file: Path) -> Path:
    """Write the page that compares finished runs; see `flatreg.report.comparison`."""
    write_comparison(paths, file)
    print(f"comparison {file}")
    return file


def export_arm(arm: str, folder: Path | None) -> Path:
    """Write an arm's model as timm loads it; see `flatreg.run.export.export`."""
    place = arm_folder(arm)
    known, history = place.parent.parent / "recipe.yaml", read_history(place)
    recipe = load_recipe(known) if known.is_file() else None
    folder = export(place, folder or _export_folder(place))
    size = (folder / WEIGHTS).stat().st_size
    if recipe and not finished(recipe, history):
        write(f"flatreg: {place}: trained {len(history)} of {counted(recipe.epochs, 'epoch')}")
    print(f"export    {folder / WEIGHTS} ({_megabytes(size)}), {folder / CONFIG}")
    print(f'load      timm.create_model("local-dir:{folder}", pretrained=True)')
    return folder


def card(arm: str, overrides: Sequence[str], folder: Path | None) -> Path:
    """Export an arm with its model card; see `flatreg.run.export.write_model_card`."""
    settings, place = validated(CardSettings, parse_settings(overrides)), arm_folder(arm)
    file = write_model_card(place, folder or _export_folder(place), settings)
    print(f"card      {file}")
    return file


def push_folder(folder: Path, repo: str, overrides: Sequence[str]) -> dict[str, Any]:
    """List the files of a folder and upload them; see `flatreg.run.export.push`."""
    settings = validated(PushSettings, parse_settings(overrides))
    files, address = files_to_push(folder), None
    for name, size in files.items():
        print(f"{_megabytes(size):>12}  {tables.flat(name)}")
    if settings.dry_run:
        print(f"nothing is uploaded: dry_run; to {tables.flat(repo)}, private: {settings.private}")
    else:
        address = push(folder, repo, settings)
        print(f"pushed    {address}")
    return {"repo": repo, "private": settings.private, "address": address, "files": files}


def _export_folder(arm: Path) -> Path:
    if arm.parent.name != "checkpoints":
        raise ValueError(f"{arm} is not in a run: say where to write by output=DIR")
    return arm.parent.parent / "export" / arm.name


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def _write_environment(folder: Path, accelerator: Accelerator) -> None:
    """Write what the run is trained with; of a value that is another one now, both."""
    now = versions() | {
        "device": str(accelerator.device.type),
        "processes": str(accelerator.num_processes),
        "threads": str(torch.get_num_threads()),
        "mixed_precision": str(accelerator.mixed_precision),
        "accumulation": str(accelerator.gradient_accumulation_steps),
    }
    before = read_environment(folder) or now  # of another session of this run
    kept = {name: before.get(name, value) for name, value in now.items()}
    changed = {
        name: f"{kept[name]}, then {value}"
        for name, value in now.items()
        if kept[name].split(", then ")[-1] != value
    }
    if changed:
        told = "; ".join(f"{name} {values}" for name, values in changed.items())
        write(
            f"flatreg: {folder}: the run began in another environment ({told}): it continues, and "
            "its numbers are not those of a run in one"
        )
    write_json(folder / "environment.json", kept | changed)


def _announced(recipe: Recipe, splits: Splits) -> str:
    """What a run is about to do."""
    threat, arms = recipe.evaluation, list(recipe.arms())
    steps = len(splits.train) // recipe.batch_size * recipe.accumulation
    n = min(threat.samples or len(splits.test), len(splits.test))
    return (
        f"plan      train {counted(len(arms), 'arm')} ({', '.join(arms)}), "
        f"{counted(recipe.epochs, 'epoch')} of {steps} batches each; then attack {n} test images "
        f"of each ({threat.norm} eps {threat.eps:.4g}, {threat.attack})"
    )
