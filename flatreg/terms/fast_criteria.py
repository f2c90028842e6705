"""Single-step criteria that compare the attacked batch with where the attack began."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flatreg.attacks.losses import cross_entropy
from flatreg.attacks.query import QueriedModel, loss_and_gradient
from flatreg.data.configuration import configuration
from flatreg.models.entrance import as_labels
from flatreg.models.precision import at_least_float32
from flatreg.models.state import evaluation_mode, kept_buffers
from flatreg.terms.attacked_loss import (
    LOSSES,
    AttackedLoss,
    InnerMode,
    divergence,
    log_probabilities,
)
from flatreg.terms.memory import Memory, Moved
from flatreg.terms.protocol import Amount, Count, Forwards, Number, Positive, Requirement
from flatreg.threat import per_sample, project, steepest_direction

_Part = Annotated[Number, Field(ge=0, le=1)]


@configuration
class RememberingLoss(AttackedLoss):
    """Loss of a batch whose attack or loss depends on earlier batches, in a `Memory`.

    Each adds `move`; `attack` is that of a first batch.
    """

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """Attack a batch: see `flatreg.terms.memory.Remembers`."""
        raise NotImplementedError

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attacked images `(batch, ...)` of a first batch."""
        memory = Memory(samples=len(inputs))
        memory.start_epoch(0)
        return self.move(model, inputs, labels, memory, torch.arange(len(inputs))).attacked

    def stepped(self, start: Tensor, gradient: Tensor, size: float) -> Tensor:
        """One step from `start`, of `size` in units of eps, cut to the box alone."""
        step = size * self.eps * steepest_direction(gradient, self.norm)
        return (start + step).clamp(0, 1)

    def in_ball(self, moved: Tensor, inputs: Tensor) -> Tensor:
        """Nearest points of ball and box."""
        return project(moved, inputs, per_sample(self.eps, inputs), self.norm)


def nuclear_shares(rows: Tensor, whole: Tensor | None = None) -> Tensor:
    """Shares `(batch,)` of the rows of D `(batch, classes)` in its nuclear norm; they add up to it.

    ||D||_* = tr(D^T W), W = U V^T for D = U S V^T without singular values of 0: a row d has the
    share <d, w>. W is the gradient of the norm, and of D = 0 it is 0. So it is taken without a
    graph, and is finite where singular values repeat or vanish. In float32 at least.

    Args:
        rows: those of this process.
        whole: those of all processes, if there are others.
    """
    rows = at_least_float32(rows)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        whole = at_least_float32(rows if whole is None else whole).nan_to_num(0, 0, 0)
        _, lengths, turned = torch.linalg.svd(whole, full_matrices=False)
        least = max(whole.shape) * torch.finfo(lengths.dtype).eps * lengths.amax()
        inverse = torch.where(lengths > least, 1 / lengths, 0)
        polar = (rows.nan_to_num(0, 0, 0) @ turned.mT * inverse) @ turned
    shares: Tensor = (rows * polar).sum(1)
    return shares


@configuration
class NUAT(RememberingLoss):
    """l(p(x), y) + beta ||D||_* / B, D the attacked minus the clean logits of a batch of B.

    The norm is nuclear: the sum of the singular values of D `(B, classes)`. x' = P(x_0 + a sign g),
    x_0 = `clip_[0,1](x + n)`, every entry of n at random -k eps or k eps, P onto ball and box. g is
    the gradient of the cross-entropy, in every second batch plus beta ||D||_*. Costs two passes
    forward and backward, and one forward in every second batch, on top of a plain step.
    Sriramanan et al., "Towards Efficient and Effective Adversarial Training", NeurIPS 2021.

    A batch is what `Objective.bind` takes, of all processes together (`Memory.gather`). Of D in
    parts the norms add up to more: `micro_batches` is refused, and a recipe that accumulates. The
    norm divided by B shrinks as B grows; the authors trained with B = 64. Labels of any form: D
    reads none.

    Args:
        beta: weight of the norm; lambda in the paper.
        ramp: beta grows in proportion to the progress of the training, from 0; a loop that sets no
            `progress` has all of it from the start. The authors' code grows it once an epoch.
        noise: k, in units of eps.
        step_size: a, in units of eps.
        inner_mode: as in `AttackedLoss`; the authors' code attacks in eval mode.
        eps, schedule, loss: as in `AttackedLoss`; `loss` is l of the clean batch.
    """

    norm: Literal["linf"] = "linf"
    beta: Amount = 4.0
    ramp: bool = True
    noise: Amount = 0.5
    step_size: Positive = 1.0
    inner_mode: InnerMode = "eval"
    kind: Literal["NUAT"] = "NUAT"
    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {"clean", "attacked", "unit_inputs", "whole_batch"}
    )

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """Noise, then one step from there."""
        signs = torch.randint_like(inputs, 2) * 2 - 1
        start = (inputs + self.noise * self.eps * signs).clamp(0, 1)
        with self.inner_pass(model):
            clean = QueriedModel(model).logits(inputs) if memory.batches % 2 else None

            def climbed(logits: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
                value = cross_entropy(logits, labels)
                if clean is None:
                    return value
                return value + self.beta * _shares(logits - clean, memory)

            _, gradient, _ = loss_and_gradient(model, start, labels, climbed)
        attacked = self.in_ball(self.stepped(start, gradient, self.step_size), inputs)
        return Moved(attacked, loss=partial(self._loss, memory=memory))

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, whose mean is the loss of this process's batch."""
        return self._loss(passes, Memory())

    def _loss(self, passes: Forwards, memory: Memory) -> Tensor:
        clean, attacked = (at_least_float32(passes[at].logits) for at in ("clean", "attacked"))
        shares = _shares(attacked - clean, memory)
        return self.loss_at(passes["clean"]) + self.beta * shares


def _shares(rows: Tensor, memory: Memory) -> Tensor:
    return nuclear_shares(rows, memory.gathered(rows))


@configuration
class FGSMRSCS(RememberingLoss):
    """l(x') + w s l(x_0): FGSM-RS whose loss may change only so fast from epoch to epoch.

    x_0 = `clip_[0,1](x + n)`, n uniform in the ball, x' = `clip_[0,1](x_0 + a d(x_0))`, d the sign
    of the gradient or, in L2, the unit gradient; x' may leave the ball. With L the mean of l(x_0)
    over the batch and L_t that over epoch t: s is 1 where L > L_{t-1} + gamma, -1 where
    L < L_{t-1} - gamma, else 0; gamma = min(max(L_{t-1} - L_{t-2}, gamma_min), gamma_max). s is 0
    up to and in the epoch `stride`, counted from 0, and within `stride` epochs of a decay. Costs
    one pass forward and backward and one more of each on top of a plain step. Zhao et al., "Fast
    Adversarial Training with Smooth Convergence", ICCV 2023, the authors' FGSM_RS_CS.

    Loops call `memory.start_epoch` (see `flatreg.Memory`). L is of all processes together; s is the
    same in all parts of a batch.

    Args:
        step_size: a, in units of eps.
        weight: w; w_2 in the paper.
        gamma_min, gamma_max: in units of l; 0.03 in the authors' code.
        stride: epochs without s at the start and at each decay.
        decays: epochs at which the learning rate falls at once; the authors add the last epoch + 1.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    step_size: Positive = 1.0
    weight: Amount = 1.0
    gamma_min: Amount = 0.03
    gamma_max: Amount = 0.03
    stride: Count = 1
    decays: tuple[Count, ...] = ()
    kind: Literal["FGSMRSCS"] = "FGSMRSCS"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"attacked", "start", "unit_inputs"})

    def __post_init__(self) -> None:
        if self.gamma_min > self.gamma_max:
            raise ValueError(
                f"gamma_min: expected at most gamma_max={self.gamma_max:g}, got {self.gamma_min:g}"
            )

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """A point of the ball, then one step from there."""
        start, found = self.noisy(inputs).clamp(0, 1), list[Tensor]()

        def climbed(logits: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
            found.append(LOSSES[self.loss](logits.detach(), labels).mean())
            return cross_entropy(logits, labels)

        with self.inner_pass(model):
            _, gradient, _ = loss_and_gradient(model, start, labels, climbed)
        sign = self._sign(memory, memory.mean(found[-1]), len(inputs))
        return Moved(
            self.stepped(start, gradient, self.step_size), start, partial(self._loss, sign=sign)
        )

    def _loss(self, passes: Forwards, sign: Tensor) -> Tensor:
        return self(passes) + self.weight * sign * self.loss_at(passes["start"])

    def _sign(self, memory: Memory, value: Tensor, size: int) -> Tensor:
        """S of a batch; its loss goes into the mean of the epoch."""
        epoch, kept = memory.epoch_for("FGSMRSCS"), memory.kept
        if kept.get("epoch") != epoch:
            samples = float(kept.get("samples", 0))
            ended = float(kept["sum"]) / samples if samples else None
            change = 0.0 if ended is None else ended - (kept["mean"] or 0.0)
            kept |= {"epoch": epoch, "mean": ended, "change": change}
            kept |= {"sum": torch.zeros_like(value), "samples": torch.zeros_like(value)}
        finite = value.isfinite()
        kept["sum"] = kept["sum"].to(value) + torch.where(finite, value, 0) * size
        kept["samples"] = kept["samples"].to(value) + finite * size
        quiet = epoch <= self.stride or any(abs(epoch - d) <= self.stride for d in self.decays)
        if quiet or kept["mean"] is None:
            return torch.zeros_like(value)
        gamma = min(max(kept["change"], self.gamma_min), self.gamma_max)
        moved = value - kept["mean"]
        return torch.where(moved.abs() > gamma, moved.sign(), 0)


@configuration
class LIET(RememberingLoss):
    """l(x') + beta JS(p(x_0), p(x')), x_0 moved along a direction of its class, most of it masked.

    JS is the Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. The
    direction of class y is eps sign grad l(c, y) at the grey image c = 1/2, in eval mode, anew in
    every `every`-th batch of an epoch. With probability r an entry of it is replaced by noise,
    uniform in [-k eps, k eps]; r is drawn for a batch, uniform in `mask`. x_0 is x plus or, in half
    of the batches, minus the result, cut to the box; x' = P(x_0 + a eps sign grad l(x_0)). Costs
    one pass forward and backward and one more of each on top of a plain step, and every `every`
    batches one of a grey image of each class. Pan and Yao, "Mitigating Catastrophic Overfitting in
    Fast Adversarial Training via Label Information Elimination", ICCV 2025, the authors' code.

    That code smooths labels at random in l; here labels are those of the loop. A mixture counts as
    its likeliest class.

    Args:
        beta: weight of the divergence; lambda in the paper.
        ramp: beta grows in proportion to the progress of the training, from 0; a loop that sets no
            `progress` has all of it from the start. The authors' code grows it once an epoch.
        noise: k. The authors take 1 for eps up to 8/255, and 2 above.
        clip: P is onto ball and box, as the authors do for eps up to 8/255; else onto the box.
        mask: least and largest r.
        every: in batches.
        step_size: a.
        eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    norm: Literal["linf"] = "linf"
    beta: Amount = 100.0
    ramp: bool = True
    noise: Amount = 1.0
    clip: bool = True
    mask: tuple[_Part, _Part] = (0.1, 0.5)
    every: Count = 20
    step_size: Positive = 1.0
    kind: Literal["LIET"] = "LIET"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"attacked", "start", "unit_inputs"})

    def __post_init__(self) -> None:
        if self.mask[0] > self.mask[1]:
            raise ValueError(f"mask: expected [least, largest], got {list(self.mask)}")

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """A masked step along the direction of the class, then one step from there."""
        signs = memory.kept.get("class signs")
        if memory.batches % self.every == 0 or signs is None or signs.shape[1:] != inputs.shape[1:]:
            signs = memory.kept["class signs"] = _class_signs(model, inputs)
        classes = labels.argmax(1) if labels.is_floating_point() else labels
        as_labels(classes, len(inputs), len(signs), read=classes.device.type == "cpu")
        change = self.eps * signs.to(inputs.device)[classes].to(inputs)
        least, largest = self.mask
        masked = torch.rand_like(inputs) < least + (largest - least) * torch.rand(())
        noise = self.noise * self.eps * (2 * torch.rand_like(inputs) - 1)
        change = torch.where(masked, noise, change) * (1 if torch.rand(()) < 0.5 else -1)
        start = (inputs + change).clamp(0, 1)
        with self.inner_pass(model):
            _, gradient, _ = loss_and_gradient(model, start, labels, "cross_entropy")
        moved = self.stepped(start, gradient, self.step_size)
        return Moved(self.in_ball(moved, inputs) if self.clip else moved, start)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes."""
        start, attacked = (log_probabilities(passes[at]) for at in ("start", "attacked"))
        mean = torch.logaddexp(start, attacked) - math.log(2)
        apart = (divergence(start, mean) + divergence(attacked, mean)) / 2
        return self.loss_at(passes["attacked"]) + self.beta * apart


def _class_signs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Signs `(classes, ...)`, int8, of the gradient of the loss of each class at a grey image."""
    with kept_buffers(model), evaluation_mode(model):
        grey = torch.full_like(inputs[:1], 0.5)
        classes = torch.arange(QueriedModel(model).logits(grey).shape[1], device=inputs.device)
        signs = []
        for part in torch.split(classes, len(inputs)):  # as many at once as the model passes anyway
            images = grey.expand(len(part), *grey.shape[1:])
            _, gradient, _ = loss_and_gradient(model, images, part, "cross_entropy")
            signs.append(gradient.sign().to(torch.int8))
    return torch.cat(signs)
