"""The training loop, with Accelerate: from an arm of a recipe to a checkpoint and its history."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

from flatreg.attacks.cascade import PRESETS
from flatreg.attacks.pgd import fgsm
from flatreg.data.images import Splits, augment
from flatreg.evaluation.evaluate import AttackedAccuracy
from flatreg.evaluation.findings import catastrophic_overfitting
from flatreg.evaluation.results import Evaluation
from flatreg.models.entrance import non_finite_buffer, non_finite_weight
from flatreg.models.state import derived_seed, record_buffers
from flatreg.optimizers.passes import backward
from flatreg.run.build import Training, save_manifolds, save_spec
from flatreg.run.checkpoints import Epoch, flagged, resume, save_checkpoint
from flatreg.run.finite import FiniteWatch
from flatreg.run.recipe import Recipe
from flatreg.run.settings import did_you_mean
from flatreg.terms.objective import Objective
from flatreg.threat import to_unit_range

Batch = tuple[Tensor, Tensor]


def make_accelerator(
    log_with: Sequence[str] = (), folder: Path | None = None, accumulation: int = 1
) -> Accelerator:
    """Accelerator for recipes: `batch_size` of a recipe counts the images of all processes.

    `log_with` names Accelerate's trackers; those that write files write them into `folder`.

    Raises:
        ValueError: there is no such tracker, or its package is not installed; or Accelerate is
            configured to accumulate another number of micro-batches, or for an engine that shards.
    """
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    if configured != str(accumulation):
        raise ValueError(
            f"Accelerate is configured to accumulate {configured} micro-batches and the recipe "
            f"{accumulation}: write accumulation: {configured} in the recipe"
        )
    for name in log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            near = did_you_mean(name, known)
            raise ValueError(
                f"log_with: expected one of {', '.join(known)}, got {name!r:.80}{near}"
            )
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"log_with: {name} is not installed")
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        gradient_accumulation_steps=accumulation,
        log_with=list(log_with) or None,
        project_dir=folder,
    )
    engine = accelerator.distributed_type.value
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(
            f"recipes train in one process or under DDP, Accelerate is configured for {engine}: "
            "choose MULTI_GPU or MULTI_CPU, or use flatreg in a loop of your own"
        )
    return accelerator


def finished(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether a training is over: by its epochs, or early by its monitor's patience."""
    patience = recipe.monitor and recipe.monitor.patience
    attacked = [epoch.monitored.value for epoch in history if epoch.monitored]
    since_best = len(attacked) - 1 - attacked.index(max(attacked)) if attacked else 0
    return len(history) >= recipe.epochs or bool(patience and since_best >= patience)


def train(training: Training, folder: Path, accelerator: Accelerator) -> list[Epoch]:
    """Train one arm, from its last checkpoint in `folder` if there is one.

    Every epoch draws its random numbers from (seed, epoch, process) alone. So a run that is
    interrupted and resumed ends, on the CPU, with the weights of the run that was not. The
    checkpoint of an epoch replaces the one before only once it is complete. The history that is
    returned includes earlier sessions.

    Raises:
        FloatingPointError: a part of the loss, a gradient or a weight is not finite; the last
            checkpoint stays.
    """
    recipe, average = training.recipe, training.average
    averaged = average.module if average else None
    history = resume(folder, training.model, training.optimizer, averaged)
    model, optimizer, loader = accelerator.prepare(
        training.model, training.optimizer, training.loader
    )
    training = replace(training, model=model, optimizer=optimizer, loader=loader)
    if average:
        average.to(accelerator.device)
    if accelerator.is_main_process:
        save_spec(training.arm.model or recipe.model, training.splits, folder)
        save_manifolds(training.arm, folder)
    objective = Objective(model, training.arm.criterion, training.arm.penalties)
    monitor, steps = _build_monitor(training), len(loader)
    with tqdm(
        total=recipe.epochs * steps,
        initial=len(history) * steps,
        desc=f"train {training.name}",
        disable=not accelerator.is_main_process,
        leave=False,
    ) as bar:
        while not finished(recipe, history):
            epoch = len(history)
            training.shuffle.manual_seed(derived_seed(recipe.seed, epoch, 0))
            set_seed(derived_seed(recipe.seed, epoch, 1 + accelerator.process_index))
            line = _train_epoch(training, objective, accelerator, bar, epoch)
            for weights in (model, averaged):
                broken = weights and (non_finite_weight(weights) or non_finite_buffer(weights))
                if broken:
                    _stop(training.name, f"{broken} is not finite after epoch {epoch + 1}")
            evaluated = monitor(averaged or model, epoch) if monitor else None
            history.append(_monitored(line, evaluated, history) if evaluated else line)
            bar.set_postfix_str(_progress(history[-1]))
            accelerator.log(_scalars(training.name, history[-1]), step=epoch)
            if accelerator.is_main_process:
                _warn_once(training.name, history)
                own = accelerator.unwrap_model(model)
                keep = not _is_best(recipe, history)
                save_checkpoint(folder, own, optimizer, history, average=averaged, keep=keep)
            accelerator.wait_for_everyone()
    accelerator.free_memory()
    return history


def _is_best(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether the weights after the last epoch are, so far, those that the run is to report."""
    attacked = [epoch.monitored.value for epoch in history if epoch.monitored]
    if recipe.monitor is None or recipe.monitor.keep == "last" or not attacked:
        return True
    last = history[-1].monitored
    return last is not None and last.value > max(attacked[:-1], default=-1.0)


def augmented(recipe: Recipe, splits: Splits) -> Callable[[Tensor, Tensor], Batch]:
    """Function from stored images and labels to a batch in [0,1]; soft labels are probabilities."""
    spec, num_classes = recipe.augment, splits.num_classes
    smoothing = spec.label_smoothing
    mix = Mixup(spec.mixup, spec.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def batch(images: Tensor, labels: Tensor) -> Batch:
        inputs = augment(to_unit_range(images), crop=spec.crop, flip=spec.flip)
        if spec.mixes:
            inputs, labels = mix(inputs, labels)
            return inputs, labels
        return inputs, mixup_target(labels, num_classes, 1.0, smoothing) if smoothing else labels

    return batch


def _train_epoch(
    training: Training, objective: Objective, accelerator: Accelerator, bar: Any, epoch: int
) -> Epoch:
    """Take every step of an epoch; mean of the loss and of its parts over steps and processes."""
    recipe, optimizer = training.recipe, training.optimizer
    prepare, watch = augmented(recipe, training.splits), FiniteWatch()
    started, count = time.perf_counter(), len(training.loader)
    look_every = 1 if accelerator.device.type == "cpu" and accelerator.num_processes == 1 else 50
    totals: dict[str, Tensor] = {}
    taken: list[dict[str, Tensor]] = []  # of the micro-batches of this update
    skipped = in_a_row = 0
    for step, stored in enumerate(training.loader, epoch * count):
        update = step // recipe.accumulation
        training.schedule.step_update(update)
        objective.progress = step / (recipe.epochs * count)
        inputs, labels = prepare(*stored)
        if recipe.skip_nonfinite and not taken:
            put_back = record_buffers(objective.model)
        with accelerator.accumulate(objective.model):
            loss = backward(optimizer, objective.bind(inputs, labels), accelerator=accelerator)
            taken.append({"loss": loss.total, **loss.parts})
            norm = _clipped_norm(training, accelerator)
            finite = not recipe.skip_nonfinite or bool(norm.isfinite())
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        bar.update()
        if not accelerator.sync_gradients:
            continue
        if not finite:
            put_back()
            taken.clear()
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row > recipe.skip_nonfinite:
                what = f"the gradients of {in_a_row} steps in a row are not finite"
                _stop(training.name, f"{what}, the last at step {update}")
            continue
        in_a_row = 0
        if training.average:
            training.average.update(accelerator.unwrap_model(objective.model), update)
        for numbers in taken:
            # The sums stay on the device: reading a number in every step would wait for it.
            for part, value in numbers.items():
                totals[part] = totals.get(part, torch.zeros_like(value)) + value
            numbers.pop("loss")  # that of the parts, which have names
            # A GradScaler looks for infinite gradients, skips their steps and lowers its scale.
            watched = numbers if accelerator.scaler else {**numbers, "the gradient": norm}
            watch.see(update, watched)
        taken.clear()
        if update % look_every == 0:
            _stop_at_first(training.name, watch, accelerator)
    _stop_at_first(training.name, watch, accelerator)
    seconds, steps = time.perf_counter() - started, count - skipped * recipe.accumulation
    means = {part: float(accelerator.reduce(t / steps, "mean")) for part, t in totals.items()}
    lr = float(optimizer.param_groups[0]["lr"])
    return Epoch(epoch, lr, seconds, means.pop("loss", math.nan), means, skipped=skipped)


def _clipped_norm(training: Training, accelerator: Accelerator) -> Tensor:
    """Norm of the gradient that is about to be stepped on, which is clipped; 0 in between."""
    if not accelerator.sync_gradients:
        return torch.zeros((), device=accelerator.device)
    parameters, clip = list(training.model.parameters()), training.recipe.optimizer.clip_norm
    if clip:
        norm = accelerator.clip_grad_norm_(parameters, clip)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole


def _stop_at_first(name: str, watch: FiniteWatch, accelerator: Accelerator) -> None:
    found = watch.first(accelerator.gather)
    if found is not None:
        _stop(name, f"{found.name} is {found.value} at step {found.step}")


def _stop(name: str, what: str) -> NoReturn:
    raise FloatingPointError(f"{name}: {what}; the checkpoint of the epoch before stays")


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
    return replace(line, findings=[catastrophic_overfitting(fgsms, attacked, found.n)])


def _warn_once(name: str, history: list[Epoch]) -> None:
    """Print one line in the first epoch that is flagged."""
    last, before = history[-1], {finding.name for finding in flagged(history[:-1])}
    for finding in flagged([last]):
        if finding.name not in before:
            tqdm.write(
                f"flatreg: {name}, epoch {last.epoch + 1}: {finding.name}: FGSM {last.fgsm}, "
                f"PGD {last.monitored}: {finding.meaning}",
                file=sys.stderr,
            )


def _scalars(name: str, epoch: Epoch) -> dict[str, float]:
    """Numbers of an epoch for the trackers."""
    scalars = {"loss": epoch.loss, "lr": epoch.lr, "seconds": epoch.seconds, **epoch.parts}
    if epoch.monitored:
        scalars |= {"attacked": epoch.monitored.value, "monitor_seconds": epoch.monitor_seconds}
    return {f"{name}/{key}": value for key, value in scalars.items()}


def _progress(epoch: Epoch) -> str:
    text = f"loss {epoch.loss:.3f}"
    if epoch.monitored:
        fraction = epoch.monitor_seconds / (epoch.seconds + epoch.monitor_seconds or 1.0)
        text += f", attacked {epoch.monitored.value:.1%} ({fraction:.0%} of the time)"
    return text + "".join(f", {finding.name}" for finding in flagged([epoch]))
