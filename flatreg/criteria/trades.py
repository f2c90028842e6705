"""Adversarial training that trades clean accuracy for a prediction that does not move."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.victim import Victim
from flatreg.criteria.inner import InnerMode, gaussian_start, inner_pass, last_iterate
from flatreg.criteria.losses import cross_entropy, divergence, log_probabilities
from flatreg.terms import CONFIG, Count, Eps, Need, Number, Passes, Strength


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TRADES:
    """CE(p(x), y) + beta KL(p(x) || p(x')), x' found by PGD on the KL.

    The attack starts 0.001 standard normal off the image and reads no label. Costs `steps` passes
    forward and backward and two passes forward on top of a plain step. Zhang et al., "Theoretically
    Principled Trade-off between Robustness and Accuracy", ICML 2019.

    Args:
        beta: weight of the KL; 1 / lambda in the paper.
        eps: radius of the Linf ball in [0,1] pixel units.
        steps: steps of the inner attack.
        step_size: in units of eps.
        inner_mode: the attack runs with the model in eval mode, as in the authors' code, or
            (`"train"`) in the mode it is in with BatchNorm statistics frozen.
    """

    beta: Strength = 6.0
    eps: Eps
    steps: Count = 10
    step_size: Annotated[Number, Field(gt=0)] = 0.25
    inner_mode: InnerMode = "eval"
    kind: Literal["TRADES"] = "TRADES"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean", "attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on KL(p(x) || p(x')).

        The KL is the cross-entropy with labels p(x), less the entropy of p(x), which x' does not
        move: both have one gradient.
        """
        start = gaussian_start(inputs)
        with inner_pass(model, self.inner_mode):
            probs = Victim(model).logits(inputs).softmax(1)
            return last_iterate(
                model, inputs, probs, start, eps=self.eps, steps=self.steps,
                step_size=self.step_size,
            )  # fmt: skip

    def __call__(self, passes: Passes) -> Tensor:
        """Loss per sample `(batch,)`, differentiable through both passes."""
        clean = passes["clean"]
        moved = divergence(log_probabilities(clean), log_probabilities(passes["attacked"]))
        return cross_entropy(clean) + self.beta * moved
