"""Geometry along an attack: up to the flip of the label, then down into the flat valley.

Walter, Adilova, Vreeken, Kamp, "When Flatness Does (Not) Guarantee Adversarial Robustness", 2025.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.attacks.cascade import describe
from flatreg.attacks.options import Attack
from flatreg.attacks.pgd import pgd
from flatreg.data.configuration import number
from flatreg.data.progress import progress_bar
from flatreg.measures.at_head import AtHead
from flatreg.measures.estimate import QuantileBand
from flatreg.measures.linearised_margin import margin
from flatreg.measures.relative_flatness import matching_scale
from flatreg.models.entrance import check_classifier, check_weights
from flatreg.models.forward import Forward, in_float32, run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.precision import at_least_float32, class_indices, cross_entropy
from flatreg.threat import Norm, check_eps, check_norm, check_unit_range, distance

_STEPS = 20
_PATH_ATTACK: Attack = partial(pgd, steps=_STEPS, step_size=2 / _STEPS)  # resolves the approach


@dataclass(frozen=True, eq=False)
class AttackPath:
    """Quantities at the points an attack evaluates; arrays are `(steps + 1, batch)`, on the CPU.

    Row 0 is the clean image; of an attack that starts there it is counted once.

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
    progress: bool = False,
) -> AttackPath:
    """Follow an attack from the clean image to the flip of the label and beyond, for every sample.

    Of an attack with several runs a sample (restarts, targets) the first is followed; the others
    are made, and cost, for nothing. A point outside the ball, as L1-APGD evaluates, is on the path
    too.

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
        progress: show a bar.

    Raises:
        ValueError: inputs or eps outside [0,1]; no head can be found; `matched` is no confidence;
            the attack takes no `callback`, does not call it at every step, or stops early.
    """
    attack, known = attack or _PATH_ATTACK, check_norm(norm)
    check_eps(eps, known)
    matched = None if matched is None else number("matched", matched, "(0, 1)")
    check_unit_range(inputs)
    takes = inspect.signature(attack).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    if not anything and not {"callback", "early_stop"} <= set(takes):
        raise ValueError(
            "expected an attack that takes callback and early_stop, "
            f"got {describe(attack)}, which does not"
        )
    inputs, labels = inputs.detach(), class_indices(labels, "attack_path", len(inputs))
    bar = progress_bar("attack path", len(inputs), counts=False, shown=progress)
    with torch.inference_mode(False), in_float32(model) as module, bar:
        check_weights(module)
        check_classifier(module, inputs)
        recorder = _Recorder(module, inputs, labels, known, find_head(module, inputs))
        recorder.record_clean(matched, batch_size)

        def record(samples: Tensor, steps: Tensor, x: Tensor, left: int) -> None:
            bar.total = bar.n + len(samples) + left
            bar.update(len(samples))
            recorder.record_step(samples, steps, x, left)

        attack(
            module,
            inputs,
            labels,
            eps=eps,
            norm=norm,
            seed=seed,
            indices=indices,
            batch_size=batch_size,
            callback=record,
            early_stop=False,
        )
    few, many = min(recorder.steps), max(recorder.steps)
    if few != many or not few:
        raise ValueError(
            "expected an attack that calls callback at every step and keeps all samples with "
            f"early_stop=False, got {few} to {many} steps a sample from {describe(attack)}"
        )
    return recorder.path()


class _Recorder:
    """Measures the points an attack evaluates, as it does: the images themselves are not kept."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, norm: Norm, head: Head
    ) -> None:
        self.model, self.inputs, self.labels = model, inputs, labels
        self.norm, self.head = norm, head
        self.scale: float | None = None  # of the head, for kappa at matched confidence
        self.steps = [0] * len(inputs)  # recorded so far, by sample
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []

    def record_clean(self, matched: float | None, batch_size: int | None) -> None:
        """Measure the clean images, once the scale that gives them the confidence is known."""
        everyone = torch.arange(len(self.inputs), device=self.labels.device)
        parts = torch.split(everyone, batch_size or len(everyone))
        passes = [self._pass(samples, self.inputs[samples]) for samples in parts]
        if matched is not None:
            self.scale = matching_scale(torch.cat([at.logits for at in passes]), matched)
        for samples, at in zip(parts, passes, strict=True):
            self._measure(torch.zeros_like(samples), samples, at)

    def record_step(self, samples: Tensor, steps: Tensor, x: Tensor, left: int) -> None:
        """Measure the points of a step, as a `Callback`.

        Of several runs of a sample the first comes to a step before the others, or stands before
        them in the batch: it is the one whose step is the next of that sample.
        """
        first: dict[int, int] = {}
        for position, (row, step) in enumerate(zip(samples.tolist(), steps.tolist(), strict=True)):
            if step == self.steps[row]:
                first.setdefault(row, position)
        if not first:
            return
        kept = list(first.values())
        self._measure(steps[kept] + 1, samples[kept], self._pass(samples[kept], x[kept]))
        for row in first:
            self.steps[row] += 1

    def path(self) -> AttackPath:
        """Everything measured, by row of the path and sample."""
        rows, samples, values = (
            torch.cat(column, -1) for column in zip(*self._entries, strict=True)
        )
        table = values.new_empty(len(values), int(rows.max()) + 1, len(self.inputs))
        table[:, rows, samples] = values
        if len(table[0]) > 1 and not bool(table[0, 1].any()):  # it starts at the image itself
            table = torch.cat([table[:, :1], table[:, 2:]], 1)
        length, loss, kappa, confidence, margins, *matched = table
        flipped = margins < 0
        flip = torch.where(flipped.any(0), flipped.int().argmax(0), -1)
        return AttackPath(
            length, loss, kappa, matched[0] if matched else None, confidence, margins, flip
        )

    def _pass(self, samples: Tensor, x: Tensor) -> Forward:
        with torch.no_grad():
            return run_forward(self.model, x, self.labels[samples], self.head)

    def _measure(self, rows: Tensor, samples: Tensor, forward: Forward) -> None:
        z = at_least_float32(forward.logits)
        at = replace(AtHead.of(forward), logits=z, weight=forward.weight.detach())
        values = [
            distance(forward.inputs, self.inputs[samples], self.norm),
            cross_entropy(z, at.labels),
            at.kappa(),
            F.softmax(z, 1).amax(1),
            margin(z, at.labels),
        ]
        if self.scale is not None:
            values.append(at.kappa(self.scale))
        table = torch.stack([value.double() for value in values])
        self._entries.append((rows.cpu(), samples.cpu(), table.cpu()))


@dataclass(frozen=True)
class AlignedBands:
    """Bands of "kappa", "matched kappa" (where it was measured), "confidence" and "loss".

    Attributes:
        by_step: over the samples classified right when clean; empty where none is.
        by_flip: over those whose label flips on the way; empty where none does.
        flipped: how many these are.
    """

    by_step: dict[str, QuantileBand]
    by_flip: dict[str, QuantileBand]
    flipped: int


def aligned_bands(path: AttackPath, window: int = 12) -> AlignedBands:
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


def bands_by_step(path: AttackPath, values: Tensor) -> QuantileBand:
    """Quartiles at each row of the path, over the samples classified right when clean: some are.

    Args:
        path: of an attack.
        values: `(steps + 1, batch)`, one of its arrays.
    """
    return QuantileBand.of(enumerate(values[:, path.flip != 0]))


def bands_by_flip(path: AttackPath, values: Tensor, window: int) -> QuantileBand:
    """Quartiles at each offset from the flip, over the samples whose label flips on the way.

    Args:
        path: of an attack; of some samples the label flips.
        values: `(steps + 1, batch)`, one of its arrays.
        window: largest offset; those that fewer than half of the flipped paths reach are left out.
    """
    flipped = (path.flip > 0).nonzero().flatten()
    reached: list[tuple[int, Tensor]] = []
    for offset in range(-window, window + 1):
        rows = path.flip[flipped] + offset
        inside = (rows >= 0) & (rows < len(values))
        if 2 * int(inside.sum()) >= len(flipped):
            reached.append((offset, values[rows[inside], flipped[inside]]))
    return QuantileBand.of(reached)
