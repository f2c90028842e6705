"""From a recipe to the objects of a training: model, optimizer, fitted manifolds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from flatreg.data.images import Splits
from flatreg.optimizers.methods import wrap
from flatreg.run.models import create
from flatreg.run.recipe import Arm, Model, Recipe
from flatreg.threat import to_unit_range


def build_model(spec: Model, splits: Splits, *, seed: int) -> nn.Module:
    """Create a timm model, with the normalisation inside.

    Raises:
        ValueError: timm has no such model, it refuses the arguments, or the weights cannot be had.
    """
    set_seed(seed)
    return create(spec, splits.num_classes, splits.channels, pretrained=spec.pretrained)


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


def save_manifolds(arm: Arm, folder: Path) -> None:
    """Keep the fitted manifolds of `arm` in its folder, once."""
    for n, penalty in enumerate(arm.penalties):
        manifold: Any = getattr(penalty, "manifold", None)
        if hasattr(manifold, "save") and not _manifold_file(folder, n).exists():
            folder.mkdir(parents=True, exist_ok=True)
            manifold.save(_manifold_file(folder, n))


def _manifold_file(folder: Path, penalty: int) -> Path:
    return folder / f"manifold-{penalty}.safetensors"
