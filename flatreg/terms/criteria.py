"""Criteria: what a model is trained on, a loss per sample of the clean and the attacked pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd_maximum
from flatreg.attacks.pgd import pgd_iterates
from flatreg.attacks.query import QueriedModel, loss_and_gradient
from flatreg.measures.linearised_margin import runner_up
from flatreg.models.forward import Forward
from flatreg.models.precision import IGNORE_NOTHING, as_targets, at_least_float32, class_indices
from flatreg.models.state import evaluation_mode, kept_buffers
from flatreg.terms.protocol import (
    CONFIG,
    Count,
    Eps,
    EpsWarmUp,
    Forwards,
    Number,
    Requirement,
    Strength,
)
from flatreg.threat import DenseNorm, per_sample, steepest_direction

InnerMode = Literal["train", "eval"]
TrainingLoss = Literal["cross_entropy", "brier"]
StepSize = Annotated[Number, Field(gt=0)]


def cross_entropy(at: Forward) -> Tensor:
    """Cross-entropy `(batch,)`, in the precision of the pass.

    Raises:
        ValueError: the labels are probabilities of other classes than the logits are.
    """
    targets = as_targets(at.labels, at.logits)
    return F.cross_entropy(at.logits, targets, reduction="none", ignore_index=IGNORE_NOTHING)


def brier_score(at: Forward) -> Tensor:
    """Brier score ||softmax(z) - y||^2 `(batch,)`, in float32 at least; y is one-hot or a mixture.

    Raises:
        ValueError: as `cross_entropy`.
    """
    logits = at_least_float32(at.logits)
    targets = as_targets(at.labels, logits)
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    return (logits.softmax(1) - targets).square().sum(1)


_LOSSES = {"cross_entropy": cross_entropy, "brier": brier_score}


def log_probabilities(at: Forward) -> Tensor:
    """Log-probabilities `(batch, classes)`, in float32 at least."""
    return at_least_float32(at.logits).log_softmax(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) `(batch,)`, differentiable in both."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def gaussian_start(inputs: Tensor) -> Tensor:
    """Inputs plus 0.001 standard normal noise: where an attack on the KL has a gradient."""
    return inputs + 0.001 * torch.randn_like(inputs)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CrossEntropy:
    """Cross-entropy of the clean batch."""

    kind: Literal["CrossEntropy"] = "CrossEntropy"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`."""
        return cross_entropy(passes["clean"])


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
        return brier_score(passes["clean"])


class LossOfTorch:
    """A loss module of torch's kind as a criterion: its value at the clean logits and labels.

    Args:
        loss: maps logits and labels to a loss, of the batch or per sample.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    @property
    def is_mean_of_samples(self) -> bool:
        """Whether the losses of parts of a batch, by their sizes, add up to that of the batch."""
        reduction = getattr(self.loss, "reduction", "")
        weighted = getattr(self.loss, "weight", None) is not None
        return reduction == "none" or (reduction == "mean" and not weighted)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss of the batch 0-d, or per sample `(batch,)`, as the module reduces it."""
        value: Tensor = self.loss(passes["clean"].logits, passes["clean"].labels)
        return value


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
        return _LOSSES[self.loss](passes["attacked"])

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
        self, model: nn.Module, inputs: Tensor, labels: Tensor, start: Tensor, **search: Any
    ) -> Tensor:
        """Last iterate of PGD on the cross-entropy, from `start`: `steps` >= 1 of `step_size`."""
        search |= {"eps": self.eps, "norm": self.norm, "loss": "cross_entropy"}
        with self.inner_pass(model):
            iterates = pgd_iterates(model, inputs, labels, start=start, **search)
            (last,) = deque(iterates, maxlen=1)  # keeps one batch of images, not steps + 1
        return last


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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

    noise: Annotated[Number, Field(ge=0)] = 2.0
    step_size: StepSize = 1.0
    kind: Literal["NFGSM"] = "NFGSM"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Noise, then one step from there."""
        noisy = self.noisy(inputs, self.noise)
        with self.inner_pass(model):
            _, gradient, _ = loss_and_gradient(model, noisy, labels, "cross_entropy")
        step = self.step_size * self.eps * steepest_direction(gradient, self.norm)
        return (noisy + step).clamp(0, 1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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

    step_size: StepSize = 1.25
    kind: Literal["FGSMRS"] = "FGSMRS"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """A point of the ball, then one step from there."""
        start = self.noisy(inputs).clamp(0, 1)
        step = {"steps": 1, "step_size": self.step_size}
        return self.last_iterate(model, inputs, labels, start, **step)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PGDAT(AttackedLoss):
    """Adversarial training on PGD from a random start in the ball.

    Costs `steps` passes forward and backward on top of a plain step. Madry et al., ICLR 2018.

    Args:
        steps: of the attack.
        step_size: of the attack, in units of eps.
        norm, eps, inner_mode, schedule, loss: as in `AttackedLoss`.
    """

    steps: Count = 10
    step_size: StepSize = 0.25
    kind: Literal["PGDAT"] = "PGDAT"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy."""
        start = self.noisy(inputs).clamp(0, 1)
        search = {"steps": self.steps, "step_size": self.step_size}
        return self.last_iterate(model, inputs, labels, start, **search)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
        search: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "steps": self.steps}
        with self.inner_pass(model):
            return apgd_maximum(model, inputs, labels, start=start, loss="cross_entropy", **search)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TRADES(AttackedLoss):
    """l(p(x), y) + beta KL(p(x) || p(x')), x' found by PGD on the KL; l is the cross-entropy.

    The attack starts 0.001 standard normal off the image and reads no label. Costs `steps` passes
    forward and backward and two passes forward on top of a plain step. Zhang et al., "Theoretically
    Principled Trade-off between Robustness and Accuracy", ICML 2019.

    Args:
        beta: weight of the KL; 1 / lambda in the paper.
        steps: of the attack.
        inner_mode: as in `AttackedLoss`; the authors' code attacks in eval mode.
        step_size: of the attack, in units of eps.
        norm, eps, schedule, loss: as in `AttackedLoss`.
    """

    beta: Strength = 6.0
    steps: Count = 10
    step_size: StepSize = 0.25
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
        search = {"steps": self.steps, "step_size": self.step_size}
        return self.last_iterate(model, inputs, probabilities, start, **search)

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes."""
        clean = passes["clean"]
        moved = divergence(log_probabilities(clean), log_probabilities(passes["attacked"]))
        return _LOSSES[self.loss](clean) + self.beta * moved


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MART(AttackedLoss):
    """BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' found by PGD on the cross-entropy.

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k), exact in log-probabilities, where the authors'
    code adds constants to stay finite. The attack starts 0.001 standard normal off the image. Costs
    `steps` passes forward and backward and one pass forward on top of a plain step. Wang et al.,
    "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.

    Args:
        beta: weight of the KL; lambda in the paper.
        steps: of the attack.
        inner_mode: as in `AttackedLoss`; the authors' code attacks in eval mode.
        step_size: of the attack, in units of eps.
        norm, eps, schedule: as in `AttackedLoss`.
    """

    beta: Strength = 5.0
    steps: Count = 10
    step_size: StepSize = 0.25
    inner_mode: InnerMode = "eval"
    loss: Literal["cross_entropy"] = "cross_entropy"  # its own, boosted
    kind: Literal["MART"] = "MART"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean", "attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy.

        Raises:
            ValueError: the labels are probabilities: the loss needs a class to be wrong about.
        """
        labels = class_indices(labels, "MART")
        search = {"steps": self.steps, "step_size": self.step_size}
        return self.last_iterate(model, inputs, labels, gaussian_start(inputs), **search)

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
