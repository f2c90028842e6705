"""FGSM-PGI: an attack that begins where that of the last epoch on the same image ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flatreg.attacks.query import loss_and_gradient
from flatreg.data.configuration import configuration
from flatreg.models.precision import at_least_float32
from flatreg.terms.fast_criteria import RememberingLoss
from flatreg.terms.memory import Memory, Moved
from flatreg.terms.protocol import Amount, Count, Forwards, Number, Positive, Requirement

_LEVELS = 127  # of a stored perturbation, from 0 to eps: -eps, 0 and eps are exact
_LARGEST = 60_000.0  # of a stored momentum, in float16
_AT_ONCE = 2**24  # pixels drawn at a time


@configuration
class FGSMPGI(RememberingLoss):
    """l(x') + beta ||z' - z_0||^2 / classes, x' one step from the stored perturbation of the image.

    x_0 = `clip_[0,1](x + d)`, z_0 and z' the logits at x_0 and x'; x' = x + P(d + a eps sign g), g
    the gradient of the cross-entropy at x_0, P onto ball and box. Then d becomes P(d + a eps sign
    m), with the stored momentum m <- g / ||g||_1 + mu m, the L1 norm being of the batch. Every
    `reset` epochs the entries of d are drawn at random from -eps and eps, and m is 0. Costs one
    pass forward and backward and one more of each on top of a plain step. Jia et al.,
    "Prior-Guided Adversarial Initialization for Fast Adversarial Training", ECCV 2022, their
    FGSM-MEP; with `momentum=0`, which stores no m, their FGSM-EP.

    `Memory(samples=)` stores d (int8, in steps of eps / 127) and m (float16) of each training
    image; `Objective.bind(inputs, labels, indices)` says which are in the batch, and
    `memory.start_epoch` is called. All processes store the same, by `Memory.gather`. As in the
    authors' code, d is not moved with the crop and the flip of an image. The class of a sample must
    stay the same: other data and mixed images are refused where it changes.

    Args:
        beta: weight of the squared difference; lambda in the paper.
        momentum: mu.
        reset: in epochs.
        step_size: a.
        eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    norm: Literal["linf"] = "linf"
    beta: Amount = 10.0
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.3
    reset: Count = 40
    step_size: Positive = 1.0
    kind: Literal["FGSMPGI"] = "FGSMPGI"
    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {"attacked", "start", "unit_inputs", "indices"}
    )

    @property
    def bytes_per_pixel(self) -> int:
        """What is stored of each training image."""
        return 3 if self.momentum else 1

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """One step from the stored perturbation, which then moves on.

        Raises:
            ValueError: epochs, samples or indices are not known, or the samples are others.
        """
        if not (memory.writes or memory.stored):  # of an evaluation before the training
            memory = replace(memory, samples=len(inputs), folder=None)
            memory.start_epoch(0)
            indices = torch.arange(len(inputs))
        self._make_ready(memory, tuple(inputs.shape[1:]))
        rows, classes = _checked(indices, labels, memory)
        change = memory.stored["perturbation"][rows].to(inputs) * (self.eps / _LEVELS)
        start = (inputs + change).clamp(0, 1)
        with self.inner_pass(model):
            _, gradient, _ = loss_and_gradient(model, start, labels, "cross_entropy")
        _keep(memory, "class", rows, classes.to(labels.device))
        gradient = gradient.nan_to_num(0, 0, 0)  # a step that is skipped leaves no trace
        momentum = gradient
        if self.momentum:
            before = memory.stored["momentum"][rows].to(inputs)
            size = memory.mean(gradient.abs().mean()).clamp_min(torch.finfo(inputs.dtype).tiny)
            momentum = gradient / size + self.momentum * before
            _keep(memory, "momentum", rows, momentum.clamp(-_LARGEST, _LARGEST))
        moved = [
            self.in_ball(inputs + change + self.step_size * self.eps * by.sign(), inputs)
            for by in (gradient, momentum)
        ]
        steps = ((moved[1] - inputs) * (_LEVELS / self.eps)).round()
        _keep(memory, "perturbation", rows, steps.clamp(-_LEVELS, _LEVELS))
        return Moved(moved[0], start)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes."""
        start, attacked = (at_least_float32(passes[at].logits) for at in ("start", "attacked"))
        return self.loss_at(passes["attacked"]) + self.beta * (attacked - start).square().mean(1)

    def _make_ready(self, memory: Memory, shape: tuple[int, ...]) -> None:
        """Draw the stored perturbations anew, at the start and every `reset` epochs."""
        turn = memory.epoch_for("FGSMPGI") // self.reset
        there = memory.stored.get("perturbation")
        if there is not None and tuple(there.shape[1:]) != shape:
            raise ValueError(
                f"FGSMPGI stores images of shape {tuple(there.shape[1:])}, got {shape}: give all "
                "images one size"
            )
        needed = {"class", "perturbation", *(("momentum",) if self.momentum else ())}
        if there is not None and (lost := needed - memory.stored.keys()):
            raise ValueError(
                f"FGSMPGI: expected a memory with the {' and '.join(sorted(lost))} of each image, "
                "got one of other settings: start anew with a new flatreg.Memory()"
            )
        if memory.kept.get("turn") == turn or (there is not None and not memory.writes):
            return
        if there is None:
            memory.store("class", (), torch.int64).fill_(-1)
            there = memory.store("perturbation", shape, torch.int8)
            if self.momentum:
                memory.store("momentum", shape, torch.float16)
        if self.momentum:
            memory.stored["momentum"].zero_()
        generator, flat = np.random.default_rng([memory.seed, turn]), there.reshape(-1)
        for part in torch.split(flat, _AT_ONCE):
            bits = torch.from_numpy(generator.integers(0, 2, len(part), dtype=np.int8))
            part.copy_((2 * bits - 1) * _LEVELS)
        memory.kept["turn"] = turn


def _checked(indices: Tensor | None, labels: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """Indices and classes on the host, of samples that are of the class that they were before."""
    if indices is None:
        raise ValueError(
            "FGSMPGI needs to know which samples a batch holds: give objective.bind(inputs, "
            "labels, indices), from a data set that returns (image, label, index)"
        )
    count = len(memory.stored["class"])
    rows = torch.as_tensor(indices).cpu()
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    if rows.shape != (len(labels),) or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"indices: expected integers ({len(labels)},), got {rows.dtype} {tuple(rows.shape)}"
        )
    rows, classes = rows.long(), classes.cpu().long()
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(
            f"indices: expected 0 to {count - 1}, the places of {count} samples, got "
            f"{int(rows.min())} to {int(rows.max())}"
        )
    before = memory.stored["class"][rows]
    _, first, place = np.unique(rows.numpy(), return_index=True, return_inverse=True)
    before = torch.where(before >= 0, before, classes[first[place]])  # an index may come twice
    others = before != classes
    if bool(others.any()):
        at = int(others.nonzero()[0])
        raise ValueError(
            f"indices: sample {int(rows[at])} was of class {int(before[at])} before and is "
            f"of class {int(classes[at])} now: indices name one image each, and images are not "
            "mixed"
        )
    return rows, classes


def _keep(memory: Memory, name: str, rows: Tensor, values: Tensor) -> None:
    """Store the values of this batch, of all processes, under their places."""
    if not memory.writes:
        return
    store, places = memory.stored[name], memory.gathered(rows.to(values.device))
    store[places.cpu()] = memory.gathered(values).to(store)
