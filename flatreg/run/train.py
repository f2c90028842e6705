"""The training loop, with Accelerate: from an arm of a recipe to a checkpoint and its history."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from flatreg.attacks.cascade import PRESETS
from flatreg.attacks.pgd import fgsm
from flatreg.data.progress import progress_bar, write
from flatreg.evaluation.evaluate import AttackedAccuracy
from flatreg.evaluation.findings import catastrophic_overfitting
from flatreg.evaluation.results import Evaluation
from flatreg.models.state import derived_seed
from flatreg.run.build import Training, save_manifolds
from flatreg.run.checkpoints import (
    Continued,
    Epoch,
    Position,
    check_same_images,
    flagged,
    resume,
    save_checkpoint,
    save_position,
    save_spec,
)
from flatreg.run.epoch import EpochSoFar, Pauses, check_weights, interrupted_at, train_epoch
from flatreg.run.interrupt import HeldSignals, Interrupted
from flatreg.run.processes import join, refuse_engines
from flatreg.run.recipe import Recipe
from flatreg.run.trackers import check_trackers, log_epoch
from flatreg.terms.memory import Memory, Remembers
from flatreg.terms.objective import Objective


def make_accelerator(
    log_with: Sequence[str] = (),
    folder: Path | None = None,
    accumulation: int = 1,
    mixed_precision: str | None = None,
) -> Accelerator:
    """Accelerator for recipes: `batch_size` of a recipe counts the images of all processes.

    `log_with` names Accelerate's trackers; those that write files write them into `folder`.
    `mixed_precision` left out is what Accelerate is configured for.

    Raises:
        ValueError: there is no such tracker, or its package is not installed; or Accelerate is
            configured to accumulate another number of micro-batches, for another precision, or for
            an engine that shards; or several processes were started that Accelerate does not join;
            or the device has no such precision.
    """
    for key, name, wanted in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulation", str(accumulation)),
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", mixed_precision),
    ):
        configured = os.environ.get(key, wanted)
        if wanted is not None and configured != wanted:
            raise ValueError(
                f"Accelerate is configured for {name} {configured} ({key}) and the recipe for "
                f"{wanted}: write {name}: {configured} in the recipe"
            )
    check_trackers(log_with)
    refuse_engines(lambda name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true")
    accelerator = join(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        gradient_accumulation_steps=accumulation,
        mixed_precision=mixed_precision,
        log_with=list(log_with) or None,
        project_dir=folder,
    )
    refuse_engines(lambda name: name == accelerator.distributed_type.value)
    return accelerator


def finished(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether a training is over: by its epochs, or early by its monitor's patience."""
    patience = recipe.monitor and recipe.monitor.patience
    attacked = [epoch.monitored.value for epoch in history if epoch.monitored]
    since_best = len(attacked) - 1 - attacked.index(max(attacked)) if attacked else 0
    return len(history) >= recipe.epochs or bool(patience and since_best >= patience)


def train(training: Training, folder: Path, accelerator: Accelerator) -> list[Epoch]:
    """Train one arm, from its last checkpoint in `folder` if there is one.

    Every epoch draws its random numbers from (seed, epoch, process) alone, the augmentation of a
    batch from (seed, epoch, process, batch), the same in all arms. A checkpoint within an epoch,
    every `checkpoint_minutes`, keeps how far the streams are. So a run that is interrupted and
    resumed ends, on the CPU, with the weights of the run that was not. A checkpoint replaces the
    one before only once it is complete. The history that is returned includes earlier sessions.

    SIGTERM and SIGINT end the training after the step that is being taken, with a checkpoint.

    Raises:
        FloatingPointError: a part of the loss, a gradient or a weight is not finite; the last
            checkpoint stays.
        Interrupted: a signal ended the training.
        ValueError: the checkpoint is damaged, or of other training images.
    """
    recipe, average, scale = training.recipe, training.average, scale_of(accelerator)
    averaged = average.module if average else None
    memory = new_memory(training, folder, accelerator)
    remembered = memory if isinstance(training.arm.criterion, Remembers) else None
    kept = Continued(training.model, training.optimizer, averaged, accelerator.scaler, remembered)
    check_same_images(folder, training.splits)
    history, position = resume(folder, kept)
    model, optimizer, loader = accelerator.prepare(
        training.model, training.optimizer, training.loader
    )
    training = replace(training, optimizer=optimizer, loader=loader)
    evaluated = averaged or model
    if training.network.compile:
        model = torch.compile(model)
    if average:
        average.to(accelerator.device)
    if accelerator.is_main_process:
        save_spec(training.network, training.model, training.splits, folder)
        save_manifolds(training.arm, folder)
    objective = Objective(model, training.arm.criterion, training.arm.penalties, memory=memory)
    monitor, main = _build_monitor(training), accelerator.is_main_process

    def save(position: Position) -> None:
        if main:
            save_position(folder, kept, position)

    def monitored(sofar: EpochSoFar) -> Evaluation | None:
        if monitor is None:
            return None
        position = sofar.position(training.model)
        try:
            with held.at_once():
                return monitor(evaluated, sofar.epoch)
        except Interrupted as error:
            with held.writing():  # also where the signal comes again, as after 8 s
                save(position)
            raise interrupted_at(error.number, position) from error

    with HeldSignals() as held, _bar(training, history, position, main=main) as bar:
        pauses = Pauses(accelerator, held, recipe.checkpoint_minutes, save)
        while not finished(recipe, history):
            epoch = len(history)
            sofar = EpochSoFar(epoch=epoch, in_a_row=history[-1].skipped_last if history else 0)
            if position is not None:
                sofar, position = EpochSoFar.at(position, training.model, accelerator), None
            _seed(training, sofar, accelerator.process_index)
            memory.start_epoch(epoch)
            line = train_epoch(training, objective, accelerator, bar, sofar, pauses)
            check_weights(training, f"after epoch {epoch + 1}")
            found = monitored(sofar)
            history.append(_monitored(line, found, history) if found else line)
            bar.set_postfix_str(_progress(history[-1]))
            log_epoch(accelerator, training.name, history[-1])
            if main:
                _save_epoch(training, folder, kept, history, held)
            pauses.saved = time.monotonic()
            accelerator.wait_for_everyone()
    memory.forget_samples()
    free(accelerator, scale)
    return history


def _seed(training: Training, sofar: EpochSoFar, process: int) -> None:
    """Seed the order of the images, and the streams of a process, for the rest of an epoch."""
    seed, epoch = training.recipe.seed, sofar.epoch
    training.shuffle.manual_seed(derived_seed(seed, epoch, 0))
    set_seed(derived_seed(seed, epoch, 1 + process, *([sofar.taken] if sofar.taken else [])))


def scale_of(accelerator: Accelerator) -> dict[str, Any]:
    """State of the scale of float16, empty without one."""
    return accelerator.scaler.state_dict() if accelerator.scaler else {}


def free(accelerator: Accelerator, scale: dict[str, Any]) -> None:
    """Let go of what was trained; the next arm begins with `scale`."""
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(scale)
    accelerator.free_memory()


def new_memory(training: Training, folder: Path, accelerator: Accelerator) -> Memory:
    """Where the criterion keeps what it must know of earlier batches."""
    return Memory(
        gather=accelerator.gather,
        samples=len(training.splits.train),
        folder=folder / f"memory-{accelerator.process_index}",
        seed=training.recipe.seed,
    )


def _save_epoch(
    training: Training, folder: Path, kept: Continued, history: list[Epoch], held: HeldSignals
) -> None:
    """Say what is flagged for the first time, and write the checkpoint of an epoch."""
    _warn_once(training.name, history)
    if kept.memory is not None and finished(training.recipe, history):
        kept.memory.forget_samples()  # a training that is over reads them no more
    with held.writing():
        save_checkpoint(folder, kept, history, keep=not _is_best(training.recipe, history))


def _bar(
    training: Training, history: Sequence[Epoch], position: Position | None, *, main: bool
) -> Any:
    """Progress bar over the batches of all epochs."""
    steps = len(training.loader)
    done = len(history) * steps + (position.taken if position else 0)
    name, arms = f"train {training.name}", list(training.recipe.arms())
    if training.name in arms:  # and not the value of a sweep
        name += f" {arms.index(training.name) + 1}/{len(arms)}"
    total = training.recipe.epochs * steps
    return progress_bar(name, total, unit="batches", done=done, shown=main)


def _is_best(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether the weights after the last epoch are, so far, those that the run is to report."""
    attacked = [epoch.monitored.value for epoch in history if epoch.monitored]
    if recipe.monitor is None or recipe.monitor.keep == "last" or not attacked:
        return True
    return bool(history[-1].monitored) and attacked[-1] > max(attacked[:-1], default=-1.0)


def _build_monitor(training: Training) -> AttackedAccuracy | None:
    monitor, threat = training.recipe.monitor, training.recipe.evaluation
    if monitor is None:
        return None
    when: dict[str, Any] = {"every": monitor.every, "samples": monitor.samples}
    stages, data = (fgsm, *PRESETS["fast"]), training.splits.validation
    return AttackedAccuracy(data, eps=threat.eps, norm=threat.norm, attack=stages, **when)


def _monitored(line: Epoch, found: Evaluation, history: list[Epoch]) -> Epoch:
    """The line with the monitor's evaluation, and a finding about all epochs so far."""
    fgsm, seconds = found.stages[0].accuracy, found.seconds
    line = replace(line, monitored=found.attacked, fgsm=fgsm, monitor_seconds=seconds)
    values = [(e.fgsm.value, e.monitored.value) for e in (*history, line) if e.fgsm and e.monitored]
    fgsms, attacked = zip(*values, strict=True)
    collapse = catastrophic_overfitting(fgsms, attacked, found.n)
    return replace(line, findings=[*line.findings, collapse])


def _warn_once(name: str, history: list[Epoch]) -> None:
    """Print one line in the first epoch that is flagged."""
    last, before = history[-1], {finding.name for finding in flagged(history[:-1])}
    for finding in flagged([last]):
        if finding.name not in before:
            about = f"{finding.name}: {finding.value:.1%} of {finding.n}"
            if finding.name == "catastrophic overfitting":
                about = f"{finding.name}: FGSM {last.fgsm}, PGD {last.monitored}"
            write(f"flatreg: {name}, epoch {last.epoch + 1}: {about}: {finding.meaning}")


def _progress(epoch: Epoch) -> str:
    text = f"loss {epoch.loss:.3f}"
    if epoch.monitored:
        fraction = epoch.monitor_seconds / (epoch.seconds + epoch.monitor_seconds or 1.0)
        text += f", attacked {epoch.monitored.value:.1%} ({fraction:.0%} of the time)"
    if epoch.waiting_seconds > 0.05 * epoch.seconds:
        text += f", waited for data {epoch.waiting_seconds / epoch.seconds:.0%} of the time"
    return text + "".join(f", {finding.name}" for finding in flagged([epoch]))
