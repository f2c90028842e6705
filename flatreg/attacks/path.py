"""Geometry along an attack: up to the flip of the label, then down into the flat valley.

Walter, Adilova, Vreeken, Kamp, "When Flatness Does (Not) Guarantee Adversarial Robustness", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.pgd import pgd_iterates
from flatreg.forward import run_forward
from flatreg.heads import find_head
from flatreg.measures.linearised_margin import margin
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.threat import check_eps, check_unit_range


@dataclass(frozen=True, eq=False)
class AttackPath:
    """What is met along the iterates; every array is `(steps + 1, batch)`, row 0 the clean image.

    Attributes:
        distance: Linf distance from the clean image, in [0,1] pixel units.
        loss: cross-entropy of the true label.
        relative_flatness: kappa of the last layer; larger means sharper.
        confidence: largest softmax probability, whatever its class.
        margin: z_y - max_{s != y} z_s; the label flips where it turns negative.
        flip: `(batch,)`: first step with another label than the true one, -1 where there is none.
    """

    distance: Tensor
    loss: Tensor
    relative_flatness: Tensor
    confidence: Tensor
    margin: Tensor
    flip: Tensor


def attack_path(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    loss: LossName = "margin",
) -> AttackPath:
    """Follow PGD from the clean image through and past the flip; no sample leaves.

    Args:
        model: images in [0,1] to logits, in the mode it is in.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units.
        steps: gradient steps.
        step_size: as a share of eps; left out 2/steps, so that the path resolves the approach.
        loss: what the path climbs; the margin goes on falling after the flip.

    Raises:
        ValueError: inputs or eps outside [0,1]; no head can be found.
    """
    check_eps(eps)
    check_unit_range(inputs)
    head = find_head(model, inputs)
    iterates = pgd_iterates(
        model, inputs, labels, eps=eps, steps=steps,
        step_size=2 / steps if step_size is None else step_size, start=inputs, loss=loss,
    )  # fmt: skip
    rows: list[tuple[Tensor, ...]] = []
    for x in iterates:
        with torch.no_grad():
            at = run_forward(model, x, labels, head)
            rows.append((
                (x - inputs).abs().flatten(1).amax(1),
                F.cross_entropy(at.logits, labels, reduction="none"),
                relative_flatness(at.features, at.logits, at.weight),
                F.softmax(at.logits, 1).amax(1),
                margin(at.logits, labels),
            ))  # fmt: skip
    distance, losses, kappa, confidence, margins = (
        torch.stack(column).cpu() for column in zip(*rows, strict=True)
    )
    flipped = margins < 0
    flip = torch.where(flipped.any(0), flipped.int().argmax(0), -1)
    return AttackPath(distance, losses, kappa, confidence, margins, flip)
