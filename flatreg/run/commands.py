"""What the command line does: each command writes into one folder and can be called again."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from pydantic import TypeAdapter

import flatreg.report.tables as tables
from flatreg.attacks.pgd import fgsm
from flatreg.data.files import alone_in, read_json, sweep_partials, write_json, write_whole
from flatreg.data.images import ImageArrays, Splits
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.results import versions
from flatreg.models.state import kept_buffers
from flatreg.report.card import card_text, write_card
from flatreg.report.figures.card import draw_card
from flatreg.report.figures.pareto import pareto
from flatreg.report.figures.report import draw, sweep_curve
from flatreg.report.figures.style import save
from flatreg.report.make import make_report
from flatreg.report.rows import Report, keep_results, read_runs, sections
from flatreg.report.text import insert_table, sections_text, sweep_table, table, write_report
from flatreg.run.build import (
    Training,
    build_training,
    check_input,
    fit_manifolds,
    load_model,
    try_optimizer,
)
from flatreg.run.checkpoints import read_history
from flatreg.run.epoch import augmented
from flatreg.run.recipe import Recipe, dump_recipe, holds_another, load_recipe
from flatreg.run.settings import RecipeError, parse_settings, told
from flatreg.run.sweep import Sweep, recipes_over, run_sweep, trained_arm
from flatreg.run.target import load_target, measure_target
from flatreg.run.train import finished, make_accelerator, train
from flatreg.terms.objective import Objective

_ENVIRONMENT = TypeAdapter(dict[str, str])
_TRIED_IMAGES = 4096  # a manifold is fitted to so many to try it out: more than any rank in use


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
    _check_disk(folder, [])
    accelerator = make_accelerator(recipe.log_with, folder, recipe.accumulation)
    _warn_of_lost_processes(accelerator)
    _refuse_another(folder, recipe)
    accelerator.wait_for_everyone()
    splits, fits, trainings = recipe.data.load(), dict[str, Any](), dict[Path, Training]()
    mistakes = _mistakes_in_settings(recipe, splits)
    for name, arm in recipe.arms().items():  # all are tried out before the first is trained
        with _noted(mistakes, f"arm {name}: "):
            place = folder / "checkpoints" / name
            fitted = fit_manifolds(arm, splits.train.images, fits, place)
            trainings[place] = build_training(recipe, name, fitted, splits)
            _try_out(trainings[place])
    if len(trainings) == len(recipe.arms()):
        with _noted(mistakes):
            _check_disk(folder, [_checkpoint_bytes(one) for one in trainings.values()])
    _refuse(mistakes)
    resolved = dump_recipe(recipe)
    with alone_in(folder, accelerator.is_main_process):
        if accelerator.is_main_process:
            _refuse_another(folder, recipe)  # one may have begun since
            sweep_partials(folder)
            write_whole(folder / "recipe.yaml", resolved)
            _write_environment(folder, accelerator)
        if recipe.log_with:
            accelerator.init_trackers("flatreg", {"recipe": resolved})
        while trainings:  # one that is over is not kept in memory
            place = next(iter(trainings))
            train(trainings.pop(place), place, accelerator)
        report = _evaluate_arms(recipe, splits, folder, folder, accelerator)
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
    _check_disk(folder, [])
    accelerator = make_accelerator(accumulation=recipe.accumulation)
    _warn_of_lost_processes(accelerator)
    recipes, splits = recipes_over(recipe, key, values), recipe.data.load()
    arms = {f"{key}={name}: ": (one, trained_arm(key)) for name, one in recipes.items()}
    _refuse(_try_out_all(arms, splits, folder)[0])
    with alone_in(folder, accelerator.is_main_process):
        result = run_sweep(recipe, key, values, folder, accelerator)
    if accelerator.is_main_process:
        _write_environment(folder, accelerator)
        save(sweep_curve(result), folder / "sweep.png")
        print(sweep_table(result))
        print(f"sweep     {folder / 'sweep.json'}, {folder / 'sweep.png'}")
    return result


def check(recipe: Recipe, name: str, folder: Path) -> None:
    """Try what `run_recipe` needs, leave nothing behind, and print that it is all there.

    Data and trackers, every arm's model, objective and optimizer, its evaluation on test images,
    and room for its checkpoints on the disk of `folder`.

    Raises:
        RecipeError: every mistake that was found, one a line.
    """
    mistakes: _Mistakes = []
    with _noted(mistakes):
        make_accelerator(recipe.log_with, Path(), recipe.accumulation)
    with _noted(mistakes):
        splits = recipe.data.load()
    if any(about == "" for about, _, _ in mistakes):  # the data are missing, or a tracker is
        _refuse(mistakes, name)
    arms = recipe.arms()
    found, parameters = _try_out_all(
        {f"arm {arm}: ": (recipe, arm) for arm in arms}, splits, folder
    )
    _refuse(found, name)
    print(
        f"{name}: ok: {recipe.model.name} ({parameters:,} parameters), "
        f"{len(splits.train)} training and {len(splits.test)} test images, "
        f"arms: {', '.join(recipe.arms())}"
    )


_Mistakes = list[tuple[str, str, Exception]]  # what it is about, in one line what is wrong


@contextmanager
def _noted(mistakes: _Mistakes, about: str = "") -> Iterator[None]:
    """Note an error and go on."""
    try:
        yield
    except Exception as error:
        mistakes.append((about, told(error), error))


def _refuse(mistakes: _Mistakes, name: str = "recipe") -> None:
    """Raise all mistakes; one that several arms share is told once.

    Raises:
        RecipeError: there are any.
    """
    lines: dict[str, str] = {}
    for about, what, _ in mistakes:
        lines[what] = "" if what in lines else about
    if lines:
        text = "\n".join(f"{name}: {about}{what}" for what, about in lines.items())
        raise RecipeError(text) from mistakes[0][2]


def _try_out_all(
    arms: Mapping[str, tuple[Recipe, str]], splits: Splits, folder: Path
) -> tuple[_Mistakes, int]:
    """Try out arms, each by a name for messages, one after the other.

    Returns:
        The mistakes, and the parameters of the last model.
    """
    fits, images = dict[str, Any](), splits.train.images[:_TRIED_IMAGES]
    mistakes: _Mistakes = []
    for recipe in {id(recipe): recipe for recipe, _ in arms.values()}.values():
        mistakes += _mistakes_in_settings(recipe, splits)
    sizes, parameters = list[int](), 0
    for about, (recipe, name) in arms.items():
        with _noted(mistakes, about):
            arm = fit_manifolds(recipe.arms()[name], images, fits)
            _try_out(training := build_training(recipe, name, arm, splits))
            sizes.append(_checkpoint_bytes(training))
            parameters = sum(p.numel() for p in training.model.parameters())
    with _noted(mistakes):
        _check_disk(folder, sizes)
    return mistakes, parameters


def _mistakes_in_settings(recipe: Recipe, splits: Splits) -> _Mistakes:
    """What is the same for every arm: crop, the monitor's images, the optimizer, the trackers."""
    mistakes: _Mistakes = []
    with _noted(mistakes):
        _check_crop(recipe, splits)
    with _noted(mistakes):
        if recipe.monitor and not len(splits.validation):
            raise ValueError("monitor: expected validation images, data.validation leaves none")
    with _noted(mistakes):
        try_optimizer(recipe.optimizer)
    for name in recipe.log_with:
        with _noted(mistakes, f"log_with {name}: "):
            _try_tracker(name)
    return mistakes


def _check_crop(recipe: Recipe, splits: Splits) -> None:
    crop, pixels = recipe.augment.crop, min(splits.train.images.shape[2:])
    if crop > pixels:
        raise ValueError(f"augment.crop: expected at most the {pixels} pixels, got {crop}")


def _try_out(training: Training) -> None:
    """Take an arm's loss and its gradient on four images, and attack two of the test split.

    No arm shall fail after an hour. Neither weights nor buffers of its model change, and an epoch
    seeds the random streams itself: so the same training may then start.
    """
    splits, arm, model = training.splits, training.arm, training.model
    _check_crop(training.recipe, splits)  # the batch would be padded by it
    prepare = augmented(training.recipe, splits)
    batch = prepare(splits.train.images[:4], splits.train.labels[:4])
    with kept_buffers(model):
        loss = Objective(model, arm.criterion, arm.penalties)(*batch)
        torch.autograd.backward(loss.total)
    model.zero_grad()
    few = ImageArrays(splits.test.images[:2], splits.test.labels[:2])
    check_input((arm.model or training.recipe.model).name, model, few.images)
    how = training.recipe.evaluation.settings() | {"attack": (fgsm,), "samples": None, "curve": ()}
    how |= {"other_threats": {}, "diagnose": False, "progress": False}
    evaluate(model, few, **how)


def _try_tracker(name: str) -> None:
    """Start a tracker that writes files, in a folder that is then removed; import any other."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        with TemporaryDirectory() as folder:
            tracker = kind("flatreg", folder)
            tracker.start()
            tracker.store_init_configuration({"recipe": ""})
            tracker.finish()
    else:
        import_module(name)


def _checkpoint_bytes(training: Training) -> int:
    """Bytes of a checkpoint, where the optimizer keeps two numbers a weight."""
    weights: int = sum(t.numel() * t.element_size() for t in training.model.state_dict().values())
    return weights * (3 + (training.average is not None) + (training.recipe.monitor is not None))


def _check_disk(folder: Path, sizes: Sequence[int]) -> None:
    """Refuse a folder that cannot be written, or whose disk has no room for checkpoints.

    Each arm keeps one; the arm that trains has two more while the next is written.

    Raises:
        OSError: it cannot.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"output: expected a folder, {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"output: {place} cannot be written: choose a folder by output=DIR")
    there = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    needed, free = sum(sizes) + 2 * max(sizes, default=0) - there, shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"output: the checkpoints take {needed / 2**30:.1f} GiB, {place} has "
            f"{free / 2**30:.1f} free: choose another folder by output=DIR"
        )


def evaluate_run(source: Path, overrides: Sequence[str], folder: Path) -> Report:
    """Evaluate the models of the run in `source` again; the new report goes into `folder`.

    The report of the run stays. Overrides are `evaluation.*`, and `data.path` or `data.root`: where
    the data is.

    Raises:
        ValueError: the run is not complete, or an override changes more than the evaluation.
    """
    for key in parse_settings(overrides):
        if not (key.startswith("evaluation.") or key in ("data.path", "data.root")):
            raise ValueError(
                f"evaluate takes evaluation.*, data.path and data.root overrides, got {key!r}"
            )
    recipe = load_recipe(source / "recipe.yaml", overrides)
    accelerator, splits = make_accelerator(), recipe.data.load()
    with alone_in(folder, accelerator.is_main_process):
        return _evaluate_arms(recipe, splits, source, folder, accelerator)


def tabulate(paths: Sequence[str], file: Path | None, kept: Path | None) -> str:
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
    check_input(target.name, target.model, target.splits.train.images[:2])
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


def _write_environment(folder: Path, accelerator: Accelerator) -> None:
    file, now = folder / "environment.json", str(accelerator.num_processes)
    before = read_json(file, _ENVIRONMENT, what="an environment") if file.exists() else {}
    processes = before.get("processes", now)
    if processes.split(", then ")[-1] != now:  # of another session of this run
        processes += f", then {now}"
        print(
            f"flatreg: {folder}: the run began with another number of processes ({processes}): it "
            "continues, and its numbers are not those of a run with one number",
            file=sys.stderr,
        )
    environment = versions() | {
        "device": str(accelerator.device),
        "processes": processes,
        "threads": str(torch.get_num_threads()),
        "mixed_precision": accelerator.mixed_precision,
        "accumulation": str(accelerator.gradient_accumulation_steps),
    }
    write_json(file, environment)


def _warn_of_lost_processes(accelerator: Accelerator) -> None:
    """Warn where `accelerate launch --cpu --num_processes N` started one process without a word.

    Without an MPI hostfile it does (accelerate 1.15), and sets a port that nothing then uses.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_PORT" in os.environ and accelerator.num_processes == 1:
        print(
            "flatreg: accelerate started one process only; for several on the CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m flatreg run ...",
            file=sys.stderr,
        )


def _evaluate_arms(
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
    main, kept = accelerator.is_main_process, folder / "evaluations"
    report = make_report(recipe, splits, models, histories, folder=kept, progress=main)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(report, folder, draw(report, folder))
        print(table(report))
        processes = f"{accelerator.num_processes} x {accelerator.device.type}"
        print(f"report    {folder / 'report.md'} ({processes})")
    return report
