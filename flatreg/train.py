"""The one training loop: a recipe's arm to a checkpoint and its history, with Accelerate."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm

from flatreg.attacks.cascade import PRESETS
from flatreg.attacks.fgsm import fgsm
from flatreg.checkpoints import Epoch, flagged, load_checkpoint, save_checkpoint
from flatreg.data import Splits, augment
from flatreg.evaluation.hook import AttackedAccuracy
from flatreg.evaluation.overfitting import catastrophic_overfitting
from flatreg.evaluation.results import Evaluation
from flatreg.normalize import with_normalization
from flatreg.objective import Objective
from flatreg.optimizers import backward
from flatreg.recipe import Arm, Recipe
from flatreg.seeds import derived_seed
from flatreg.threat import to_unit_range
from flatreg.wrappers import wrap


def make_accelerator() -> Accelerator:
    """Accelerator for recipes, whose batch size is that of all processes together."""
    return Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))


def build_model(recipe: Recipe, splits: Splits, *, initial: bool = True) -> nn.Module:
    """Create the recipe's timm model, with the normalisation inside.

    With `initial=False` a checkpoint follows, and pretrained weights are not fetched.

    Raises:
        ValueError: timm has no such model, or it refuses the arguments.
    """
    spec = recipe.model
    set_seed(recipe.seed)
    try:
        model = timm.create_model(
            spec.name, pretrained=spec.pretrained and initial, num_classes=splits.num_classes,
            in_chans=splits.channels, **spec.args,
        )  # fmt: skip
    except (AssertionError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"model {spec.name}: {' '.join(str(error).split())}") from error
    return with_normalization(model, spec.mean, spec.std)


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
    model = build_model(recipe, splits)
    optimizer = build_optimizer(recipe, arm, model, splits)
    loader = DataLoader(
        splits.train, recipe.batch_size, drop_last=True,
        sampler=RandomSampler(splits.train, generator=shuffle),
    )  # fmt: skip
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=recipe.epochs, warmup_lr=0.0,
        warmup_epochs=recipe.optimizer.warmup_epochs, step_on_epochs=False,
        updates_per_epoch=len(loader),
    )  # fmt: skip
    history = load_checkpoint(folder, model, optimizer, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    arm = fit_manifolds(arm, splits.train.images, {} if manifolds is None else manifolds, folder)
    if accelerator.is_main_process:
        _save_manifolds(arm, folder)
    objective = Objective(model, arm.criterion, arm.penalties)
    monitor = _build_monitor(recipe, splits)
    steps = len(loader)
    with tqdm(
        total=recipe.epochs * steps, initial=len(history) * steps, desc=f"train {name}",
        disable=not accelerator.is_main_process, leave=False,
    ) as bar:  # fmt: skip
        for epoch in range(len(history), recipe.epochs):
            shuffle.manual_seed(derived_seed(recipe.seed, epoch, 0))
            set_seed(derived_seed(recipe.seed, epoch, 1 + accelerator.process_index))
            started = time.perf_counter()
            means = _train_epoch(
                recipe, epoch, objective, optimizer, schedule, loader, accelerator, bar
            )
            seconds = time.perf_counter() - started
            loss, lr = means.pop("loss"), float(optimizer.param_groups[0]["lr"])
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{name}: the loss of epoch {epoch} is {loss}; {folder} keeps the checkpoint "
                    "of the epoch before"
                )
            line = Epoch(epoch, lr, seconds, loss, means)
            watched = monitor(model, epoch) if monitor else None
            history.append(_watched(line, watched, history) if watched else line)
            bar.set_postfix_str(_progress(history[-1]))
            if accelerator.is_main_process:
                _warn_once(name, history)
                save_checkpoint(folder, accelerator.unwrap_model(model), optimizer, history)
            accelerator.wait_for_everyone()
    accelerator.free_memory()
    return history


def fit_manifolds(
    arm: Arm, images: Tensor, known: dict[str, Any], folder: Path | None = None
) -> Arm:
    """Fit the manifolds that the penalties of `arm` carry unfitted.

    Args:
        arm: with penalties that may have a `manifold`.
        images: to fit on `(n, ...)`.
        known: fitted manifolds by their configuration; grows, so that arms share a fit.
        folder: of the arm, from which an earlier session's manifolds are read.

    Raises:
        ValueError: there are too few images for a manifold.
    """
    penalties: list[Any] = list(arm.penalties)
    for n, penalty in enumerate(penalties):
        manifold: Any = getattr(penalty, "manifold", None)
        if not hasattr(manifold, "fit") or manifold.fitted is not None:
            continue
        if repr(manifold) not in known:
            saved = folder and _manifold_file(folder, n)
            there = saved is not None and saved.exists()
            known[repr(manifold)] = manifold.load(saved) if there else manifold.fit(images)
        penalties[n] = replace(penalty, manifold=known[repr(manifold)])
    return arm.model_copy(update={"penalties": penalties})


def _save_manifolds(arm: Arm, folder: Path) -> None:
    for n, penalty in enumerate(arm.penalties):
        manifold: Any = getattr(penalty, "manifold", None)
        if hasattr(manifold, "save") and not _manifold_file(folder, n).exists():
            folder.mkdir(parents=True, exist_ok=True)
            manifold.save(_manifold_file(folder, n))


def _manifold_file(folder: Path, penalty: int) -> Path:
    return folder / f"manifold-{penalty}.safetensors"


def _train_epoch(
    recipe: Recipe,
    epoch: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    loader: Any,
    accelerator: Accelerator,
    bar: Any,
) -> dict[str, float]:
    """Take every step of an epoch; mean of the loss and of its parts over steps and processes."""
    totals: dict[str, Tensor] = {}
    for step, (images, labels) in enumerate(loader):
        schedule.step_update(epoch * len(loader) + step)
        objective.progress = (epoch * len(loader) + step) / (recipe.epochs * len(loader))
        inputs = augment(to_unit_range(images), crop=recipe.augment.crop, flip=recipe.augment.flip)
        with accelerator.accumulate(objective.model):
            loss = backward(optimizer, objective.bind(inputs, labels), accelerator=accelerator)
            if recipe.optimizer.clip_norm and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(
                    objective.model.parameters(), recipe.optimizer.clip_norm
                )
            optimizer.step()
            optimizer.zero_grad()
        for part, value in {"loss": loss.total, **loss.parts}.items():
            totals[part] = totals.get(part, torch.zeros_like(value)) + value / len(loader)
        bar.update()
    return {part: float(accelerator.reduce(total, "mean")) for part, total in totals.items()}


def check_batch_size(recipe: Recipe, splits: Splits) -> None:
    """Refuse a batch that the training split cannot fill.

    Raises:
        ValueError: it is larger.
    """
    if recipe.batch_size > len(splits.train):
        raise ValueError(
            f"batch_size: expected at most the {len(splits.train)} training images, "
            f"got {recipe.batch_size}"
        )


def build_optimizer(
    recipe: Recipe, arm: Arm, model: nn.Module, splits: Splits
) -> torch.optim.Optimizer:
    """Create the recipe's optimizer by timm's name, wrapped where the arm says so.

    Raises:
        ValueError: timm has no such optimizer, it refuses the arguments, or the wrapper's scope is
            not in the model.
    """
    spec = recipe.optimizer
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=spec.name, lr=spec.lr, weight_decay=spec.weight_decay, **spec.args
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"optimizer {spec.name}: {' '.join(str(error).split())}") from error
    if arm.wrapper is None:
        return optimizer
    inputs = to_unit_range(splits.train.images[:2])
    return wrap(arm.wrapper, optimizer, model, inputs, len(splits.train) // recipe.batch_size)


def _build_monitor(recipe: Recipe, splits: Splits) -> AttackedAccuracy | None:
    if recipe.monitor is None:
        return None
    return AttackedAccuracy(
        splits.held_back, eps=recipe.evaluation.eps, norm=recipe.evaluation.norm,
        every=recipe.monitor.every, samples=recipe.monitor.samples,
        attack=(fgsm, *PRESETS["fast"]),
    )  # fmt: skip


def _watched(line: Epoch, watched: Evaluation, history: list[Epoch]) -> Epoch:
    """The line with what the monitor saw, judged beside the epochs before."""
    line = replace(
        line, monitored=watched.attacked, fgsm=watched.stages[0].accuracy,
        monitor_seconds=watched.seconds,
    )  # fmt: skip
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


def _progress(epoch: Epoch) -> str:
    share = epoch.monitor_seconds / (epoch.seconds + epoch.monitor_seconds or 1.0)
    accuracy = f"{epoch.monitored.value:.1%}" if epoch.monitored else ""
    watched = f", attacked {accuracy} ({share:.0%} of the time)" if accuracy else ""
    found = "".join(f", {finding.name}" for finding in flagged([epoch]))
    return f"loss {epoch.loss:.3f}{watched}{found}"
