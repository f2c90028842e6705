"""Attack paths side by side: quartiles over samples, aligned by step or at the flip of the label.

Samples flip at different steps, so that a peak at the flip is smeared out by step; aligned at the
flip it is not, but then only the samples that flip are seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatreg.attacks.path import AttackPath


@dataclass(frozen=True)
class Band:
    """Quartiles over samples at each offset from the clean image, or from the flip of the label."""

    offsets: list[int]
    lower: list[float]
    median: list[float]
    upper: list[float]


@dataclass(frozen=True)
class AlignedBands:
    """Bands of "kappa", "matched kappa" (where it was measured), "confidence" and "loss".

    Attributes:
        by_step: over the samples classified right when clean; empty where none is.
        by_flip: over those whose label flips on the way; empty where none does.
        flipped: how many these are.
    """

    by_step: dict[str, Band]
    by_flip: dict[str, Band]
    flipped: int


def aligned_bands(path: AttackPath, window: int) -> AlignedBands:
    """Align what is drawn of a path both ways; `window` as in `bands_by_flip`."""
    arrays = {
        "kappa": path.relative_flatness,
        "matched kappa": path.matched_relative_flatness,
        "confidence": path.confidence,
        "loss": path.loss,
    }
    known = {name: values for name, values in arrays.items() if values is not None}
    right, flipped = bool((path.flip != 0).any()), int((path.flip > 0).sum())
    return AlignedBands(
        {name: bands_by_step(path, values) for name, values in known.items()} if right else {},
        {n: bands_by_flip(path, v, window) for n, v in known.items()} if flipped else {},
        flipped,
    )


def bands_by_step(path: AttackPath, values: Tensor) -> Band:
    """Quartiles at each row of the path, over the samples classified right when clean.

    Args:
        path: of an attack.
        values: `(looks + 1, batch)`, one of its arrays.

    Raises:
        ValueError: none is classified right.
    """
    right = path.flip != 0
    if not bool(right.any()):
        raise ValueError(f"expected paths that begin right, none of {len(right)} does")
    return _band(enumerate(values[:, right]))


def bands_by_flip(path: AttackPath, values: Tensor, window: int) -> Band:
    """Quartiles at each offset from the flip, over the samples whose label flips on the way.

    Args:
        path: of an attack.
        values: `(looks + 1, batch)`, one of its arrays.
        window: largest offset; those that fewer than half of the flipped paths reach are left out.

    Raises:
        ValueError: no label flips on the way.
    """
    flipped = (path.flip > 0).nonzero().flatten()
    if not len(flipped):
        raise ValueError(f"expected paths that flip the label, none of {len(path.flip)} does")
    reached: list[tuple[int, Tensor]] = []
    for offset in range(-window, window + 1):
        rows = path.flip[flipped] + offset
        inside = (rows >= 0) & (rows < len(values))
        if 2 * int(inside.sum()) >= len(flipped):
            reached.append((offset, values[rows[inside], flipped[inside]]))
    return _band(reached)


def _band(samples: Iterable[tuple[int, Tensor]]) -> Band:
    """Quartiles of the samples at each offset."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = {offset: at.double().quantile(levels).tolist() for offset, at in samples}
    lower, median, upper = (list(q) for q in zip(*quartiles.values(), strict=True))
    return Band(list(quartiles), lower, median, upper)
