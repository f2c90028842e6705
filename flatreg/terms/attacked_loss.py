"""What criteria have in common: the losses of a pass, and how images are attacked in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd_last_iterate
from flatreg.data.configuration import configuration
from flatreg.models.forward import Forward
from flatreg.models.precision import IGNORE_NOTHING, as_targets, at_least_float32
from flatreg.models.state import evaluation_mode, kept_buffers
from flatreg.terms.protocol import Eps, EpsWarmUp, Forwards, Requirement
from flatreg.threat import DenseNorm, per_sample, steepest_direction

InnerMode = Literal["train", "eval"]
TrainingLoss = Literal["cross_entropy", "brier"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy `(batch,)`, in the precision of the logits.

    Raises:
        ValueError: the labels are probabilities of other classes than the logits are.
    """
    targets = as_targets(labels, logits)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_NOTHING)


def brier_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier score ||softmax(z) - y||^2 `(batch,)`, in float32 at least; y is one-hot or a mixture.

    Raises:
        ValueError: as `cross_entropy`.
    """
    logits = at_least_float32(logits)
    targets = as_targets(labels, logits)
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    return (logits.softmax(1) - targets).square().sum(1)


LOSSES = {"cross_entropy": cross_entropy, "brier": brier_score}


def log_probabilities(at: Forward) -> Tensor:
    """Log-probabilities `(batch, classes)`, in float32 at least."""
    return at_least_float32(at.logits).log_softmax(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) `(batch,)`, differentiable in both."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def gaussian_start(inputs: Tensor) -> Tensor:
    """Inputs plus 0.001 standard normal noise: where an attack on the KL has a gradient."""
    return inputs + 0.001 * torch.randn_like(inputs)


@configuration
class AttackedLoss:
    """Loss of the attacked batch: what the criteria below have in common.

    Each adds its `kind` and `attack(model, inputs, labels)`, and with it the settings of its own.

    Args:
        norm: of the ball, `"linf"` or `"l2"`.
        eps: radius of the ball in [0,1] pixel units.
        inner_mode: mode of the model during the attack, which moves no buffer of a normalisation.
            `"train"`: the mode it is in, so dropout and batch statistics as in the step itself.
            `"eval"`: no dropout and running statistics; every module has its own mode back
            afterwards.
        schedule: lets the ball grow over the training.
        loss: `"cross_entropy"`, or `"brier"`: the squared error of the probabilities, see `Brier`,
            which bounds what a sample can weigh (Pang et al., "Robustness and Accuracy Could Be
            Reconcilable by (Proper) Definition", ICML 2022). The attack climbs the cross-entropy
            whichever is trained on.
    """

    norm: DenseNorm = "linf"
    eps: Eps
    schedule: EpsWarmUp | None = None
    inner_mode: InnerMode = "train"
    loss: TrainingLoss = "cross_entropy"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"attacked", "unit_inputs"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss of the attacked batch `(batch,)`."""
        return self.loss_at(passes["attacked"])

    def loss_at(self, at: Forward) -> Tensor:
        """What is trained on `(batch,)`, at a pass."""
        return LOSSES[self.loss](at.logits, at.labels)

    @contextmanager
    def inner_pass(self, model: nn.Module) -> Iterator[None]:
        """Run the attack within this: `model` is in `inner_mode`, its buffers do not move."""
        with (
            kept_buffers(model),
            evaluation_mode(model) if self.inner_mode == "eval" else nullcontext(),
        ):
            yield

    def noisy(self, inputs: Tensor, radius: float = 1.0) -> Tensor:
        """Inputs plus noise, uniform in the ball of `radius` in units of eps."""
        if self.norm == "linf":
            return inputs + radius * self.eps * (2 * torch.rand_like(inputs) - 1)
        direction = steepest_direction(torch.randn_like(inputs), "l2")
        # The part of a ball of dimension d within r of its centre is (r / radius)^d.
        share = torch.rand(len(inputs), dtype=inputs.dtype, device=inputs.device)
        length = share ** (1 / inputs[0].numel())
        return inputs + radius * self.eps * per_sample(length, inputs) * direction

    def last_iterate(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        start: Tensor,
        steps: int,
        step_size: float,
    ) -> Tensor:
        """Last iterate of PGD on the cross-entropy, from `start`: `steps` >= 1 of `step_size`."""
        with self.inner_pass(model):
            return pgd_last_iterate(
                model,
                inputs,
                labels,
                eps=self.eps,
                steps=steps,
                step_size=step_size,
                start=start,
                norm=self.norm,
            )
