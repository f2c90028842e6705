"""What a run needs, tried before it trains: arms, their evaluation, trackers, room on the disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatreg.attacks.pgd import fgsm
from flatreg.data.images import ImageArrays, Splits
from flatreg.data.sharing import rank_and_world
from flatreg.data.streamed import AugmentedImages
from flatreg.evaluation.evaluate import evaluate
from flatreg.models.state import kept_buffers
from flatreg.run.build import Training, build_training, check_input, fit_manifolds, try_optimizer
from flatreg.run.epoch import augmented
from flatreg.run.recipe import Recipe
from flatreg.run.settings import RecipeError, told
from flatreg.run.trackers import try_tracker
from flatreg.terms.memory import Memory
from flatreg.terms.objective import Objective
from flatreg.terms.stored_start import FGSMPGI

_TRIED_IMAGES = 4096  # a manifold is fitted to so many to try it out: more than any rank in use
Mistakes = list[tuple[str, str, Exception]]  # what it is about, in one line what is wrong


@contextmanager
def noted(mistakes: Mistakes, about: str = "") -> Iterator[None]:
    """Note an error and go on."""
    try:
        yield
    except Exception as error:
        mistakes.append((about, told(error), error))


def refuse(mistakes: Mistakes, name: str = "recipe") -> None:
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


def build_all(recipe: Recipe, splits: Splits, folder: Path) -> dict[Path, Training]:
    """Build and try out every arm before the first is trained; by the folder of its checkpoints.

    Raises:
        RecipeError: every mistake that was found, one a line.
    """
    place, mistakes = folder / "checkpoints", _mistakes_in_settings(recipe, splits)
    arms = {f"arm {arm}: ": (recipe, arm) for arm in recipe.arms()}
    tried = _tried(arms, splits, splits.to_fit, mistakes, place)
    trainings = {place / training.name: training for training in tried}
    if len(trainings) == len(arms):
        with noted(mistakes):
            check_disk(folder, [_checkpoint_bytes(one) for one in trainings.values()])
    refuse(mistakes)
    return trainings


def try_out_all(
    arms: Mapping[str, tuple[Recipe, str]], splits: Splits, folder: Path
) -> tuple[Mistakes, int]:
    """Try out arms, each by a name for messages, one after the other.

    Returns:
        The mistakes, and the parameters of the last model.
    """
    mistakes: Mistakes = []
    for recipe in {id(recipe): recipe for recipe, _ in arms.values()}.values():
        mistakes += _mistakes_in_settings(recipe, splits)
    sizes, parameters = list[int](), 0
    for training in _tried(arms, splits, lambda: splits.to_fit()[:_TRIED_IMAGES], mistakes):
        sizes.append(_checkpoint_bytes(training))
        parameters = sum(p.numel() for p in training.model.parameters())
    with noted(mistakes):
        check_disk(folder, sizes)
    return mistakes, parameters


def _tried(
    arms: Mapping[str, tuple[Recipe, str]],
    splits: Splits,
    images: Callable[[], Tensor],
    mistakes: Mistakes,
    place: Path | None = None,
) -> Iterator[Training]:
    """The arms that can be built and tried out, their manifolds fitted; mistakes are noted."""
    fits = dict[str, Any]()
    for about, (recipe, name) in arms.items():
        with noted(mistakes, about):
            arm = fit_manifolds(recipe.arms()[name], images, fits, place and place / name)
            _try_out(training := build_training(recipe, name, arm, splits))
            yield training


def _mistakes_in_settings(recipe: Recipe, splits: Splits) -> Mistakes:
    """What is the same for every arm: crop, monitor, optimizer, trackers; and that arms differ."""
    mistakes: Mistakes = []
    with noted(mistakes):
        _check_crop(recipe, splits)
    with noted(mistakes):
        _check_variants(recipe)
    with noted(mistakes):
        if recipe.monitor and not len(splits.validation):
            raise ValueError("monitor: expected validation images, data.validation leaves none")
    with noted(mistakes):
        try_optimizer(recipe.optimizer)
    for name in recipe.log_with:
        with noted(mistakes, f"log_with {name}: "):
            try_tracker(name)
    return mistakes


def _check_variants(recipe: Recipe) -> None:
    arms = recipe.arms()
    for one in recipe.variants:
        if same := [other for other in arms if other != one and arms[other] == arms[one]]:
            raise ValueError(
                f"variants.{one}: the same training as the arm {same[0]}: a variant is the plain "
                "arm with the criterion, penalties, wrapper or model that it names"
            )


def _check_crop(recipe: Recipe, splits: Splits) -> None:
    crop, pixels = recipe.augment.crop, min(splits.train.shape[1:])
    if crop > pixels:
        raise ValueError(f"augment.crop: expected at most the {pixels} pixels, got {crop}")


def _try_out(training: Training) -> None:
    """Take an arm's loss and its gradient on up to four images, and attack two of the test split.

    No arm shall fail after an hour. Neither weights nor buffers of its model change, and an epoch
    seeds the random streams itself: so the same training may then start.
    """
    splits, arm, model = training.splits, training.arm, training.model
    _check_crop(training.recipe, splits)  # the batch would be padded by it
    prepare = augmented(training.recipe, splits)
    each = training.recipe.batch_size // training.recipe.accumulation // rank_and_world()[1]
    # Not every network takes one image.
    images, data = splits.train.first(1 if each == 1 else 4), training.loader.dataset
    if isinstance(data, AugmentedImages):
        images = torch.stack([data[index, 0][0] for index in range(len(images))])
    batch = prepare(images, splits.train.labels[: len(images)], 0)
    trained: Any = model
    untraced: AbstractContextManager[Any] = nullcontext()
    if training.network.compile:  # some penalties refuse it; tracing would take minutes
        trained, untraced = torch.compile(model), torch.compiler.set_stance("force_eager")
    with kept_buffers(model), untraced:
        # Each process tries the arm by itself.
        memory = Memory(samples=len(images), gather=lambda rows: rows)
        memory.start_epoch(0)
        objective = Objective(trained, arm.criterion, arm.penalties, memory=memory)
        try:
            loss = objective.bind(*batch, torch.arange(len(images)))()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "BatchNorm needs more than one image in a micro-batch of a process: expected a "
                "larger batch_size, or a smaller accumulation"
            ) from error
        torch.autograd.backward(loss.total)
    named = loss.parts | {f"the gradient of {n}": p.grad for n, p in model.named_parameters()}
    for name, value in named.items():
        if value is not None and not bool(value.isfinite().all()):
            raise ValueError(f"{name} is not finite on the first images")
    model.zero_grad()
    few = ImageArrays(splits.test.first(2), splits.test.labels[:2])
    check_input((arm.model or training.recipe.model).name, model, few.images)
    how = training.recipe.evaluation.settings() | {"attack": (fgsm,), "samples": None, "curve": ()}
    how |= {"other_threats": {}, "diagnose": False, "progress": False}
    evaluate(model, few, **how)


def _checkpoint_bytes(training: Training) -> int:
    """Bytes of a checkpoint, where the optimizer keeps two numbers a weight."""
    criterion, train = training.arm.criterion, training.splits.train
    per_pixel = criterion.bytes_per_pixel if isinstance(criterion, FGSMPGI) else 0
    stored = per_pixel * len(train) * math.prod(train.shape)
    weights: int = sum(t.numel() * t.element_size() for t in training.model.state_dict().values())
    return (
        weights * (3 + (training.average is not None) + (training.recipe.monitor is not None))
        + stored
    )


def check_disk(folder: Path, sizes: Sequence[int]) -> None:
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
