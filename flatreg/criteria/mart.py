"""Adversarial training that looks harder at what is misclassified without an attack."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.criteria.inner import InnerMode, gaussian_start, inner_pass, last_iterate
from flatreg.criteria.losses import divergence, log_probabilities
from flatreg.labels import class_indices
from flatreg.measures.linearised_margin import runner_up
from flatreg.terms import (
    CONFIG,
    Count,
    Eps,
    Need,
    Number,
    Passes,
    Strength,
)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MART:
    """BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' found by PGD on the cross-entropy.

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k), exact in log-probabilities, where the authors'
    code adds constants to stay finite. The attack starts 0.001 standard normal off the image. Costs
    `steps` passes forward and backward and one pass forward on top of a plain step. Wang et al.,
    "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.

    Args:
        beta: weight of the KL; lambda in the paper.
        eps: radius of the Linf ball in [0,1] pixel units.
        steps: steps of the inner attack.
        step_size: in units of eps.
        inner_mode: as in `TRADES`.
    """

    beta: Strength = 5.0
    eps: Eps
    steps: Count = 10
    step_size: Annotated[Number, Field(gt=0)] = 0.25
    inner_mode: InnerMode = "eval"
    kind: Literal["MART"] = "MART"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy.

        Raises:
            ValueError: the labels are probabilities: the loss needs a class to be wrong about.
        """
        labels, start = class_indices(labels, "MART"), gaussian_start(inputs)
        with inner_pass(model, self.inner_mode):
            return last_iterate(
                model, inputs, labels, start, eps=self.eps, steps=self.steps,
                step_size=self.step_size,
            )  # fmt: skip

    def __call__(self, passes: Passes) -> Tensor:
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
