"""The one training loop: a recipe's arm to a checkpoint and its history, with Accelerate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm

from flatreg.attacks.cascade import PRESETS
from flatreg.attacks.pgd import fgsm
from flatreg.data.images import Splits, augment
from flatreg.evaluation.findings import catastrophic_overfitting
from flatreg.evaluation.hook import AttackedAccuracy
from flatreg.evaluation.results import Evaluation
from flatreg.models.state import derived_seed
from flatreg.optimizers.passes import backward
from flatreg.run.build import (
    build_model,
    build_optimizer,
    check_batch_size,
    fit_manifolds,
    save_manifolds,
)
from flatreg.run.checkpoints import Epoch, flagged, resume, save_checkpoint
from flatreg.run.models import save_spec
from flatreg.run.recipe import Arm, Recipe
from flatreg.terms.objective import Objective
from flatreg.threat import to_unit_range

Batch = tuple[Tensor, Tensor]


class _Loop(NamedTuple):
    """What every step of a training needs."""

    recipe: Recipe
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Any
    loader: Any
    prepare: Callable[[Tensor, Tensor], Batch]
    average: ModelEmaV3 | None
    accelerator: Accelerator
    bar: Any


def make_accelerator(log_with: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Accelerator for recipes, whose batch size is that of all processes together.

    Args:
        log_with: names of Accelerate's trackers.
        folder: where trackers that write files write them.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    for name in log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"log_with: expected one of {known}, got {name!r}")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"log_with: {name} is not installed")
    return Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(log_with) or None,
        project_dir=folder,
    )


def finished(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether a training is over: by its epochs, or early by its monitor's patience."""
    patience = recipe.monitor and recipe.monitor.patience
    seen = [epoch.monitored.value for epoch in history if epoch.monitored]
    stopped = patience and seen and len(seen) - 1 - seen.index(max(seen)) >= patience
    return len(history) >= recipe.epochs or bool(stopped)


def train(
    recipe: Recipe,
    name: str,
    arm: Arm,
    splits: Splits,
    folder: Path,
    accelerator: Accelerator,
    manifolds: dict[str, Any] | None = None,
) -> list[Epoch]:
    """Train one arm, from its last checkpoint in `folder` if there is one.

    Every epoch draws its random numbers from (seed, epoch, process) alone, so a run that is cut off
    and resumed ends, on the CPU, with the weights of the run that was not. The checkpoint of an
    epoch replaces the one before only once it is complete.

    Args:
        recipe: what the arms share.
        name: of the arm, for the progress bar.
        arm: what it adds.
        splits: images.
        folder: where this arm keeps its checkpoint.
        accelerator: from `make_accelerator`.
        manifolds: fitted already, as in `fit_manifolds`.

    Returns:
        The whole history, earlier sessions included.

    Raises:
        ValueError: the batch is larger than the training split.
        FloatingPointError: the loss is no number; the last checkpoint stays.
    """
    check_batch_size(recipe, splits)
    shuffle = torch.Generator()
    spec = arm.model or recipe.model
    model = build_model(spec, splits, seed=recipe.seed)
    optimizer = build_optimizer(recipe, arm, model, splits)
    average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    loader = DataLoader(
        splits.train,
        recipe.batch_size,
        drop_last=True,
        sampler=RandomSampler(splits.train, generator=shuffle),
    )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_lr=0.0,
        warmup_epochs=recipe.optimizer.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    averaged: nn.Module | None = average.module if average else None
    history = resume(folder, model, optimizer, accelerator.device, averaged)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if average:
        average.to(accelerator.device)
    arm = fit_manifolds(arm, splits.train.images, {} if manifolds is None else manifolds, folder)
    if accelerator.is_main_process:
        save_spec(spec, splits, folder)
        save_manifolds(arm, folder)
    objective = Objective(model, arm.criterion, arm.penalties)
    monitor = _build_monitor(recipe, splits)
    steps, prepare = len(loader), augmented(recipe, splits)
    with tqdm(
        total=recipe.epochs * steps,
        initial=len(history) * steps,
        desc=f"train {name}",
        disable=not accelerator.is_main_process,
        leave=False,
    ) as bar:
        loop = _Loop(
            recipe, objective, optimizer, schedule, loader, prepare, average, accelerator, bar
        )
        while not finished(recipe, history):
            epoch = len(history)
            shuffle.manual_seed(derived_seed(recipe.seed, epoch, 0))
            set_seed(derived_seed(recipe.seed, epoch, 1 + accelerator.process_index))
            line = _train_epoch(loop, epoch)
            if not math.isfinite(line.loss):
                raise FloatingPointError(
                    f"{name}: the loss of epoch {epoch} is {line.loss}; {folder} keeps the "
                    "checkpoint of the epoch before"
                )
            watched = monitor(averaged or model, epoch) if monitor else None
            history.append(_watched(line, watched, history) if watched else line)
            bar.set_postfix_str(_progress(history[-1]))
            accelerator.log(_scalars(name, history[-1]), step=epoch)
            if accelerator.is_main_process:
                _warn_once(name, history)
                own = accelerator.unwrap_model(model)
                keep = not _is_judged(recipe, history)
                save_checkpoint(folder, own, optimizer, history, average=averaged, keep=keep)
            accelerator.wait_for_everyone()
    accelerator.free_memory()
    return history


def _is_judged(recipe: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether the weights as they are now are those to judge, for all that is known so far."""
    seen = [epoch.monitored.value for epoch in history if epoch.monitored]
    if recipe.monitor is None or recipe.monitor.keep == "last" or not seen:
        return True
    last = history[-1].monitored
    return last is not None and last.value > max(seen[:-1], default=-1.0)


def augmented(recipe: Recipe, splits: Splits) -> Callable[[Tensor, Tensor], Batch]:
    """What makes a batch in [0,1] of stored images; labels become probabilities where softened."""
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


def _train_epoch(loop: _Loop, epoch: int) -> Epoch:
    """Take every step of an epoch; mean of the loss and of its parts over steps and processes."""
    recipe, objective, optimizer = loop.recipe, loop.objective, loop.optimizer
    started, steps = time.perf_counter(), len(loop.loader)
    totals: dict[str, Tensor] = {}
    for step, stored in enumerate(loop.loader, epoch * steps):
        loop.schedule.step_update(step)
        objective.progress = step / (recipe.epochs * steps)
        inputs, labels = loop.prepare(*stored)
        with loop.accelerator.accumulate(objective.model):
            bound = objective.bind(inputs, labels)
            loss = backward(optimizer, bound, accelerator=loop.accelerator)
            if recipe.optimizer.clip_norm and loop.accelerator.sync_gradients:
                loop.accelerator.clip_grad_norm_(
                    objective.model.parameters(), recipe.optimizer.clip_norm
                )
            optimizer.step()
            optimizer.zero_grad()
        if loop.average:
            loop.average.update(loop.accelerator.unwrap_model(objective.model), step)
        for part, value in {"loss": loss.total, **loss.parts}.items():
            totals[part] = totals.get(part, torch.zeros_like(value)) + value / steps
        loop.bar.update()
    seconds = time.perf_counter() - started
    means = {part: float(loop.accelerator.reduce(t, "mean")) for part, t in totals.items()}
    lr = float(optimizer.param_groups[0]["lr"])
    return Epoch(epoch, lr, seconds, means.pop("loss"), means)


def _build_monitor(recipe: Recipe, splits: Splits) -> AttackedAccuracy | None:
    if recipe.monitor is None:
        return None
    return AttackedAccuracy(
        splits.validation,
        eps=recipe.evaluation.eps,
        norm=recipe.evaluation.norm,
        every=recipe.monitor.every,
        samples=recipe.monitor.samples,
        attack=(fgsm, *PRESETS["fast"]),
    )


def _watched(line: Epoch, watched: Evaluation, history: list[Epoch]) -> Epoch:
    """The line with what the monitor saw, judged beside the epochs before."""
    line = replace(
        line,
        monitored=watched.attacked,
        fgsm=watched.stages[0].accuracy,
        monitor_seconds=watched.seconds,
    )
    seen = [(e.fgsm.value, e.monitored.value) for e in (*history, line) if e.fgsm and e.monitored]
    fgsm, attacked = zip(*seen, strict=True)
    return replace(line, findings=[catastrophic_overfitting(fgsm, attacked, watched.n)])


def _warn_once(name: str, history: list[Epoch]) -> None:
    """Say so, in one line, in the first epoch that is flagged."""
    last, before = history[-1], {finding.name for finding in flagged(history[:-1])}
    for finding in flagged([last]):
        if finding.name not in before:
            tqdm.write(
                f"flatreg: {name}, epoch {last.epoch + 1}: {finding.name}: FGSM {last.fgsm}, "
                f"PGD {last.monitored}: {finding.meaning}",
                file=sys.stderr,
            )


def _scalars(name: str, epoch: Epoch) -> dict[str, float]:
    """What trackers are told of an epoch."""
    told = {"loss": epoch.loss, "lr": epoch.lr, "seconds": epoch.seconds, **epoch.parts}
    if epoch.monitored:
        told |= {"attacked": epoch.monitored.value, "monitor_seconds": epoch.monitor_seconds}
    return {f"{name}/{key}": value for key, value in told.items()}


def _progress(epoch: Epoch) -> str:
    share = epoch.monitor_seconds / (epoch.seconds + epoch.monitor_seconds or 1.0)
    accuracy = f"{epoch.monitored.value:.1%}" if epoch.monitored else ""
    watched = f", attacked {accuracy} ({share:.0%} of the time)" if accuracy else ""
    found = "".join(f", {finding.name}" for finding in flagged([epoch]))
    return f"loss {epoch.loss:.3f}{watched}{found}"
