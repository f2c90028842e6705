"""Criteria: what a model is trained on, a loss per sample of the clean and the attacked pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd_maximum
from flatreg.attacks.query import QueriedModel, loss_and_gradient
from flatreg.data.configuration import configuration
from flatreg.measures.linearised_margin import runner_up
from flatreg.models.forward import Forward
from flatreg.models.pass_start import PassStart, is_second_pass
from flatreg.models.precision import class_indices
from flatreg.models.state import kept_buffers
from flatreg.terms.attacked_loss import (
    AttackedLoss,
    InnerMode,
    brier_score,
    cross_entropy,
    divergence,
    gaussian_start,
    log_probabilities,
)
from flatreg.terms.protocol import Amount, Count, Forwards, Positive, Requirement, Term
from flatreg.threat import steepest_direction


@configuration
class CrossEntropy:
    """Cross-entropy of the clean batch."""

    kind: Literal["CrossEntropy"] = "CrossEntropy"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`."""
        return cross_entropy(passes["clean"].logits, passes["clean"].labels)


@configuration
class Brier:
    """Brier score of the clean batch: ||softmax(z) - y||^2, in [0, 2].

    It is bounded and proper. Its gradient in the logits is 2 (diag(p) - p p^T) (p - y), which
    vanishes where the model is sure, rightly or wrongly. Brier, "Verification of forecasts
    expressed in terms of probability", 1950.
    """

    kind: Literal["Brier"] = "Brier"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`."""
        return brier_score(passes["clean"].logits, passes["clean"].labels)


class LossOfTorch:
    """A loss module of torch's kind as a criterion: its value at the clean logits and labels.

    Args:
        loss: maps logits and labels to a loss, of the batch or per sample.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss
        self._start = PassStart(loss)
        self._lone: tuple[Tensor, Tensor] | None = None

    @property
    def is_mean_of_samples(self) -> bool:
        """Whether the losses of parts of a batch, by their sizes, add up to that of the batch."""
        ignores = getattr(self.loss, "ignore_index", None)
        # Those that can ignore a label divide by the weights of the labels that they found.
        divides = ignores is not None and (self.loss.weight is not None or ignores >= 0)
        # One that does not say how it reduces is tried on the first batches: `check_parts`.
        reduction = getattr(self.loss, "reduction", "mean")
        return reduction == "none" or (reduction in ("mean", "batchmean") and not divides)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss of the batch 0-d, or per sample `(batch,)`, as the module reduces it."""
        clean = passes["clean"]
        if is_second_pass.get():  # what the loss counts, as a running mean, counts a batch once
            with kept_buffers(self.loss, self._start.buffers):
                value: Tensor = self.loss(clean.logits, clean.labels)
        else:
            self._start = PassStart(self.loss)
            value = self.loss(clean.logits, clean.labels)
        return value

    def check_parts(self, at: Forward) -> None:
        """Refuse a loss of two samples or more that is not the mean of those of two parts of them.

        Raises:
            ValueError: it is not, as where it picks the hardest samples.
        """
        if getattr(self.loss, "reduction", "") == "none":
            return
        logits, labels = at.logits.detach(), at.labels
        if len(logits) == 1:  # beside the lone sample before
            before, self._lone = self._lone, (logits, labels)
            if before is None or before[0].shape != logits.shape:  # of another head
                before = (logits[:0], labels[:0])
            logits, labels = torch.cat([before[0], logits]), torch.cat([before[1], labels])
        size = len(logits)
        rows = [slice(0, size // 2), slice(size // 2, size)] if size > 1 else [slice(0, 1)]
        try:
            with torch.no_grad(), kept_buffers(self.loss):
                whole = self.loss(logits, labels).mean()
                parts = [self.loss(logits[r], labels[r]).mean() * len(labels[r]) for r in rows]
        except Exception as error:  # as that of a loss which takes two views of each image
            raise ValueError(self.no_mean) from error
        rounding = max(1e-3, 16 * torch.finfo(logits.dtype).eps)
        off = (sum(parts) / size - whole).abs()
        if bool(whole.isfinite() & ~(off <= rounding * whole.abs())):
            raise ValueError(self.no_mean)

    @property
    def no_mean(self) -> str:
        """Why a batch cannot be split."""
        return (
            f"{type(self.loss).__name__} is no plain mean over the samples, and its parts do not "
            'add up: give it reduction="none" and no weight, or delete micro_batches'
        )


def part_names(terms: Sequence[Term]) -> list[str]:
    """Names of the parts of a loss, by class, numbered where two terms are of one."""
    names = [type(term.loss if isinstance(term, LossOfTorch) else term).__name__ for term in terms]
    return [
        name if names.count(name) == 1 else f"{name}.{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]


@configuration
class NFGSM(AttackedLoss):
    """Single-step adversarial training with strong noise and no clipping to the ball.

    x' = `clip_[0,1](x + n + a sign grad l(x + n))`, n uniform in [-k eps, k eps]; in L2 the unit
    gradient in place of its sign, and n uniform in the ball of k eps. Costs one pass forward and
    backward on top of a plain step. de Jorge et al., "Make Some Noise", NeurIPS 2022, in Linf.

    Args:
        noise: k, in units of eps.
        step_size: a, in units of eps.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    noise: Amount = 2.0
    step_size: Positive = 1.0
    kind: Literal["NFGSM"] = "NFGSM"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Noise, then one step from there."""
        noisy = self.noisy(inputs, self.noise)
        with self.inner_pass(model):
            _, gradient, _ = loss_and_gradient(model, noisy, labels, "cross_entropy")
        step = self.step_size * self.eps * steepest_direction(gradient, self.norm)
        return (noisy + step).clamp(0, 1)


@configuration
class FGSMRS(AttackedLoss):
    """Single-step adversarial training from a random start in the ball.

    x' = P(x_0 + a d(x_0)), x_0 uniform in the ball, d the sign of the gradient or, in L2, the unit
    gradient, P onto ball and box: PGD of one step.
    Costs one pass forward and backward on top of a plain step. Wong, Rice and Kolter, "Fast is
    better than free", ICLR 2020. Trained long it can lose all robustness to more than one step
    (catastrophic overfitting); `NFGSM` is the remedy.

    Args:
        step_size: a, in units of eps.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    step_size: Positive = 1.25
    kind: Literal["FGSMRS"] = "FGSMRS"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """A point of the ball, then one step from there."""
        start = self.noisy(inputs).clamp(0, 1)
        return self.last_iterate(model, inputs, labels, start, 1, self.step_size)


@configuration
class PGDAT(AttackedLoss):
    """Adversarial training on PGD from a random start in the ball.

    Costs `steps` passes forward and backward on top of a plain step. Madry et al., ICLR 2018.

    Args:
        steps: of the attack.
        step_size: of the attack, in units of eps.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    steps: Count = 10
    step_size: Positive = 0.25
    kind: Literal["PGDAT"] = "PGDAT"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy."""
        start = self.noisy(inputs).clamp(0, 1)
        return self.last_iterate(model, inputs, labels, start, self.steps, self.step_size)


@configuration
class APGDAT(AttackedLoss):
    """Adversarial training on Auto-PGD from a random start in the ball.

    x' is the point of largest cross-entropy that APGD meets: momentum, and a step size that begins
    at the diameter of the ball and halves where progress stalls. Costs `steps` passes forward and
    backward and one forward on top of a plain step. The attack: Croce and Hein, ICML 2020,
    algorithm 1. In training, with 2 steps: Singh, Croce and Hein, "Revisiting Adversarial Training
    for ImageNet", NeurIPS 2023.

    Args:
        steps: of the attack.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    steps: Count = 2
    kind: Literal["APGDAT"] = "APGDAT"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Point of largest cross-entropy that APGD meets."""
        start = self.noisy(inputs).clamp(0, 1)
        with self.inner_pass(model):
            return apgd_maximum(
                model, inputs, labels, eps=self.eps, steps=self.steps, start=start, norm=self.norm
            )


@configuration
class TRADES(AttackedLoss):
    """l(p(x), y) + beta KL(p(x) || p(x')), x' found by PGD on the KL; l is the cross-entropy.

    The attack starts 0.001 standard normal off the image and reads no label. Costs `steps` + 1
    passes forward and backward and one forward on top of a plain step. Zhang et al., "Theoretically
    Principled Trade-off between Robustness and Accuracy", ICML 2019.

    Args:
        beta: weight of the KL; 1 / lambda in the paper.
        steps: of the attack.
        inner_mode: as in `AttackedLoss`; the authors' code attacks in eval mode.
        step_size: of the attack, in units of eps.
        norm, eps, schedule, loss: as in `AttackedLoss`.
    """

    beta: Amount = 6.0
    steps: Count = 10
    step_size: Positive = 0.25
    inner_mode: InnerMode = "eval"
    kind: Literal["TRADES"] = "TRADES"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean", "attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on KL(p(x) || p(x'))."""
        start = gaussian_start(inputs)
        with self.inner_pass(model):
            probabilities = QueriedModel(model).logits(inputs).softmax(1)
        # The KL is the cross-entropy with labels p(x), less the entropy of p(x), which x' does not
        # move: both have one gradient.
        return self.last_iterate(model, inputs, probabilities, start, self.steps, self.step_size)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes."""
        clean = passes["clean"]
        moved = divergence(log_probabilities(clean), log_probabilities(passes["attacked"]))
        return self.loss_at(clean) + self.beta * moved


@configuration
class MART(AttackedLoss):
    """BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' found by PGD on the cross-entropy.

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k), exact in log-probabilities, where the authors'
    code adds constants to stay finite. The attack starts 0.001 standard normal off the image. Costs
    `steps` + 1 passes forward and backward on top of a plain step. Wang et al., "Improving
    Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.

    Args:
        beta: weight of the KL; lambda in the paper.
        steps: of the attack.
        inner_mode: as in `AttackedLoss`; the authors' code attacks in eval mode.
        step_size: of the attack, in units of eps.
        norm, eps, schedule: as in `AttackedLoss`.
    """

    beta: Amount = 5.0
    steps: Count = 10
    step_size: Positive = 0.25
    inner_mode: InnerMode = "eval"
    loss: Literal["cross_entropy"] = "cross_entropy"  # its own, boosted
    kind: Literal["MART"] = "MART"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean", "attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy.

        Raises:
            ValueError: the labels are probabilities: the loss needs a class to be wrong about.
        """
        labels, start = class_indices(labels, "MART"), gaussian_start(inputs)
        return self.last_iterate(model, inputs, labels, start, self.steps, self.step_size)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes.

        Raises:
            ValueError: as in `attack`.
        """
        labels = class_indices(passes["clean"].labels, "MART")[:, None]
        clean, attacked = (log_probabilities(passes[at]) for at in ("clean", "attacked"))
        rival = runner_up(attacked, labels[:, 0])[:, None]
        # log(1 - p_r) as the log-sum of the others: 1 - p_r itself rounds to 0 where p_r is near 1
        others = attacked.scatter(1, rival, -torch.inf).logsumexp(1)
        boosted = -attacked.gather(1, labels)[:, 0] - others
        missing = -torch.expm1(clean.gather(1, labels)[:, 0])
        return boosted + self.beta * divergence(clean, attacked) * missing
