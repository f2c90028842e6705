"""Geometry along an attack: up to the flip of the label, then down into the flat valley.

Walter, Adilova, Vreeken, Kamp, "When Flatness Does (Not) Guarantee Adversarial Robustness", 2025.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.attacks.cascade import describe
from flatreg.attacks.options import Attack, AttackResult
from flatreg.attacks.pgd import pgd
from flatreg.measures.linearised_margin import margin
from flatreg.measures.relative_flatness import matching_scale, relative_flatness
from flatreg.models.forward import Forward, in_float32, run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.precision import at_least_float32, class_indices
from flatreg.threat import Norm, check_eps, check_norm, check_unit_range, distance

_STEPS = 20
_PATH_ATTACK: Attack = partial(pgd, steps=_STEPS, step_size=2 / _STEPS)  # resolves the approach


@dataclass(frozen=True, eq=False)
class AttackPath:
    """What is met where an attack looks; every array is `(looks + 1, batch)`, on the CPU.

    Row 0 is the clean image; an attack that starts there does not have it counted twice.

    Attributes:
        distance: from the clean image in the norm of the threat, in [0,1] pixel units.
        loss: cross-entropy of the true label.
        relative_flatness: kappa of the last layer; larger means sharper.
        matched_relative_flatness: the same, head and logits scaled by one factor at which the
            median confidence of the clean images is `matched`; None where that was not asked for,
            or no scale reaches it.
        confidence: largest softmax probability, whatever its class.
        margin: z_y - max_{s != y} z_s; the label flips where it turns negative.
        flip: `(batch,)`: first row with another label than the true one, -1 where there is none.
    """

    distance: Tensor
    loss: Tensor
    relative_flatness: Tensor
    matched_relative_flatness: Tensor | None
    confidence: Tensor
    margin: Tensor
    flip: Tensor


def attack_path(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    attack: Attack | None = None,
    matched: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> AttackPath:
    """Follow an attack from the clean image through and past the flip; no sample leaves.

    Of an attack with several jobs a sample (restarts, targets) the first is followed; the others
    run, and cost, for nothing. A look outside the ball, as L1-APGD takes, is on the path too.

    Args:
        model: images in [0,1] to logits, in the mode it is in; seen in float32, without wrappers.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        attack: one with `callback` and `early_stop`, as all of ours have; left out, PGD on the
            margin from the image itself, 20 steps of eps/10, which goes on after the flip.
        matched: median confidence of the clean images, between 1/classes and 1, at which kappa is
            given once more; kappa as it is moves with the scale of the logits.
        seed: of the attack.
        indices: identity of each sample; left out, its position in the batch.
        batch_size: samples at a time; left out, all.

    Raises:
        ValueError: inputs or eps outside [0,1]; no head can be found; `matched` is no confidence;
            the attack takes no `callback`, does not call it, or lets samples leave.
    """
    attack, known = attack or _PATH_ATTACK, check_norm(norm)
    check_eps(eps, known)
    if matched is not None and not 0 < matched < 1:
        raise ValueError(f"matched must be a confidence in (0, 1), got {matched:g}")
    check_unit_range(inputs)
    _check_watchable(attack)
    inputs, labels = inputs.detach(), class_indices(labels, "attack_path")
    follow: Callable[..., AttackResult] = attack
    with in_float32(model) as module:
        log = _Log(module, inputs, labels, known, find_head(module, inputs))
        log.begin(matched, batch_size)
        follow(
            module,
            inputs,
            labels,
            eps=eps,
            norm=norm,
            seed=seed,
            indices=indices,
            batch_size=batch_size,
            callback=log.look,
            early_stop=False,
        )
    if len(set(log.heard)) > 1 or not all(log.heard):
        few, many = min(log.heard), max(log.heard)
        raise ValueError(
            "expected an attack that calls callback after every look and keeps all samples with "
            f"early_stop=False, got {few} to {many} looks a sample from {describe(attack)}"
        )
    return log.path()


def _check_watchable(attack: Attack) -> None:
    takes = inspect.signature(attack).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    if not anything and not {"callback", "early_stop"} <= set(takes):
        raise ValueError(
            "expected an attack that takes callback and early_stop, "
            f"got {describe(attack)}, which does not"
        )


class _Log:
    """Measures the images an attack looks at, as it looks: the images themselves are not kept."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, norm: Norm, head: Head
    ) -> None:
        self.model, self.inputs, self.labels = model, inputs, labels
        self.norm, self.head = norm, head
        self.scale: float | None = None  # of the head, for kappa at matched confidence
        self.heard = [0] * len(inputs)  # looks of each sample so far
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, matched: float | None, batch_size: int | None) -> None:
        """Measure the clean images, once the scale that gives them the confidence is known."""
        everyone = torch.arange(len(self.inputs), device=self.labels.device)
        parts = torch.split(everyone, batch_size or len(everyone))
        passes = [self._pass(rows, self.inputs[rows]) for rows in parts]
        if matched is not None:
            self.scale = matching_scale(torch.cat([at.logits for at in passes]), matched)
        for rows, at in zip(parts, passes, strict=True):
            self._measure(torch.zeros_like(rows), rows, at)

    def look(self, rows: Tensor, steps: Tensor, x: Tensor, left: int) -> None:
        """Take in a look, as a `Callback`.

        A sample's first job comes to a step before the others, or stands before them in the batch.
        """
        first: dict[int, int] = {}
        for position, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            if step == self.heard[row]:
                first.setdefault(row, position)
        if not first:
            return
        kept = list(first.values())
        self._measure(steps[kept] + 1, rows[kept], self._pass(rows[kept], x[kept]))
        for row in first:
            self.heard[row] += 1

    def path(self) -> AttackPath:
        """Everything measured, by row of the path and sample."""
        lines, samples, values = (
            torch.cat(column, -1) for column in zip(*self._entries, strict=True)
        )
        table = values.new_empty(len(values), int(lines.max()) + 1, len(self.inputs))
        table[:, lines, samples] = values
        if len(table[0]) > 1 and not bool(table[0, 1].any()):  # it starts at the image itself
            table = torch.cat([table[:, :1], table[:, 2:]], 1)
        length, loss, kappa, confidence, margins, *matched = table
        flipped = margins < 0
        flip = torch.where(flipped.any(0), flipped.int().argmax(0), -1)
        return AttackPath(
            length, loss, kappa, matched[0] if matched else None, confidence, margins, flip
        )

    def _pass(self, rows: Tensor, x: Tensor) -> Forward:
        with torch.no_grad():
            return run_forward(self.model, x, self.labels[rows], self.head)

    def _measure(self, lines: Tensor, rows: Tensor, at: Forward) -> None:
        phi, z, weight = at.features, at_least_float32(at.logits), at.weight.detach()
        values = [
            distance(at.inputs, self.inputs[rows], self.norm),
            F.cross_entropy(z, at.labels, reduction="none"),
            relative_flatness(phi, z, weight),
            F.softmax(z, 1).amax(1),
            margin(z, at.labels),
        ]
        if self.scale is not None:
            values.append(relative_flatness(phi, self.scale * z, self.scale * weight))
        table = torch.stack([value.double() for value in values])
        self._entries.append((lines.cpu(), rows.cpu(), table.cpu()))


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
