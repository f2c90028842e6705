"""Commands that take trained models: `flatreg evaluate` and `measure`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote

from accelerate import Accelerator

from flatreg.data.files import alone_in
from flatreg.data.images import Splits
from flatreg.data.progress import tell
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.report.card import card_text, write_card
from flatreg.report.figures.card import draw_card
from flatreg.report.figures.report import draw
from flatreg.report.gallery import Example, gallery
from flatreg.report.make import make_report, report_on
from flatreg.report.page import write_page
from flatreg.report.rows import Report
from flatreg.report.text import table, write_report
from flatreg.run.brought import as_trained, check_data, check_unseen
from flatreg.run.build import check_input, load_model
from flatreg.run.checkpoints import read_history
from flatreg.run.places import run_of
from flatreg.run.processes import check_shared, in_turn
from flatreg.run.recipe import Recipe, load_recipe
from flatreg.run.recipe_sections import EvaluationSettings
from flatreg.run.settings import parse_settings
from flatreg.run.target import load_target, measure_target, to_evaluate
from flatreg.run.train import finished, make_accelerator


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
    recipe = load_recipe(run / "recipe.yaml")
    if arm is not None and arm not in recipe.arms():
        raise ValueError(
            f"{place}: expected an arm of the run, {', '.join(recipe.arms())}, got {arm}"
        )
    arms = [arm] if arm else list(recipe.arms())
    of_data = {
        key.removeprefix("data."): value
        for key, value in parse_settings(overrides).items()
        if key.startswith("data.")
    }
    changes = _of_evaluation(overrides)
    if data is not None or "workers" in of_data:
        places = [run / "checkpoints" / name for name in arms]
        raw = as_trained(places, recipe.data, data, of_data)
        changes = [f"data={json.dumps(raw)}", *changes]
    source, recipe = recipe.data, load_recipe(run / "recipe.yaml", changes)
    check_unseen(source, recipe.data, "test")
    folder = folder or (run / "evaluation" / arm if arm else run / "evaluation")
    accelerator = make_accelerator()
    splits = in_turn(partial(to_evaluate, recipe.data))
    check_shared(folder)
    with alone_in(folder, accelerator.is_main_process):
        sized = "size" in of_data
        return evaluate_arms(recipe, splits, run, folder, accelerator, arms, sized=sized), folder


def _of_evaluation(overrides: Sequence[str]) -> list[str]:
    """Overrides of a recipe: names of the evaluation's settings may stand without `evaluation.`."""
    found = []
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
            models, attack = {target.name: target.model}, target.settings.attack
            examples = gallery(report, target.images, models, attack)
            _write(report, folder, accelerator, examples, target.splits.class_names)
    return report, folder


def evaluate_arms(
    recipe: Recipe,
    splits: Splits,
    source: Path,
    folder: Path,
    accelerator: Accelerator,
    arms: Sequence[str],
    *,
    sized: bool = False,
) -> Report:
    """Evaluate checkpoints, in float32 whatever they were trained in, and write the report.

    `sized` as in `check_data`.
    """
    models, histories = {}, {}
    for name in arms:
        place = source / "checkpoints" / name
        histories[name] = read_history(place)
        if not finished(recipe, histories[name]):
            raise ValueError(
                f"{place}: expected {recipe.epochs} epochs, found {len(histories[name])}: the run "
                f"is not complete: flatreg run {quote(str(source / 'recipe.yaml'))} "
                f"output={quote(str(source))} continues it"
            )
        check_data(place, splits, sized=sized)
        models[name] = load_model(place)
        check_input(name, models[name], splits.test.first(2))
        models[name].to(accelerator.device)
    main, kept = accelerator.is_main_process, folder / "evaluations"
    report = make_report(recipe, splits, models, histories, folder=kept, progress=main)
    if main:
        examples = gallery(report, splits.test, models, recipe.evaluation.attack)
        _write(report, folder, accelerator, examples, splits.class_names)
    return report


def _write(
    report: Report,
    folder: Path,
    accelerator: Accelerator,
    examples: Sequence[Example],
    class_names: Sequence[str] | None,
) -> None:
    """Write a report with its figures and its page, and print its table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_report(report, folder, draw(report, folder))
    write_page(folder, examples, class_names)
    print(table(report))
    processes = f"{accelerator.num_processes} x {accelerator.device.type}"
    tell(f"report    {folder / 'report.html'}, {folder / 'report.md'} ({processes})")


def measure(model: str, data: str | None, overrides: Sequence[str], folder: Path | None) -> Path:
    """Measure the geometry of a timm model or of an arm of a run, and write its card.

    The card goes into `folder`, which is returned; by default beside the checkpoints of the run, or
    into `runs/geometry`.

    Raises:
        ValueError: as `load_target`, or as `flatreg.measure`.
    """
    accelerator = make_accelerator()
    target = load_target(model, data, overrides, MeasureSettings)
    check_input(target.name, target.model, target.images.first(2))
    target.model.to(accelerator.device)
    run = Path(model).resolve().parent.parent if Path(model).is_dir() else Path("runs")
    folder = folder or run / "geometry" / Path(model).name
    with alone_in(folder, accelerator.is_main_process):
        card = measure_target(target, progress=accelerator.is_main_process)
        if accelerator.is_main_process:
            write_card(card, folder, draw_card(card, folder))
            print(card_text(card))
            tell(f"card      {folder / 'card.md'}, {folder / 'card.json'}")
    return folder
