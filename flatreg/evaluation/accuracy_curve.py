"""Attacked accuracy over a grid of eps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from flatreg.attacks.options import Attack
from flatreg.evaluation.evaluate import POLISH, evaluate
from flatreg.evaluation.results import CurvePoint


def accuracy_curve(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: Sequence[float],
    norm: str = "linf",
    attack: str | Attack | Sequence[Attack] = POLISH,
    **options: Any,
) -> list[CurvePoint]:
    """Attacked accuracy at each eps of a grid; monotone by construction.

    One minimal-norm pass tells at which distance each sample falls; `attack` then tries, at each
    eps, the samples for which that leaves it open. See `flatreg.evaluation.eps_curve`.

    Args:
        model: as in `evaluate`.
        data: as in `evaluate`.
        eps: the grid, in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        attack: for the borderline samples; left out, APGD-50 on two losses. "standard" makes every
            point as strong a bound as `evaluate` gives, at its price.
        **options: as in `evaluate`.

    Raises:
        ValueError: no eps; otherwise as in `evaluate`.
    """
    if not len(eps):
        raise ValueError("eps must have at least one radius, got none")
    return evaluate(
        model,
        data,
        eps=max(eps),
        norm=norm,
        attack=attack,
        polish=attack,
        curve=eps,
        diagnose=False,
        **options,
    ).curve
