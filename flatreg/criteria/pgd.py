"""Adversarial training on PGD."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.criteria.inner import InnerMode, inner_pass, last_iterate, uniform_start
from flatreg.criteria.losses import cross_entropy
from flatreg.terms import CONFIG, Eps, Need, Number, Passes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PGDAT:
    """Adversarial training on PGD from a random start. Madry et al., ICLR 2018.

    Costs `steps` passes forward and backward on top of a plain step.

    Args:
        eps: radius in [0,1] pixel units.
        steps: steps of the inner attack.
        step_size: in units of eps.
        inner_mode: the attack runs with the model in eval mode, or (`"train"`) in the mode it is in
            with BatchNorm statistics frozen.
    """

    eps: Eps
    steps: Annotated[int, Field(ge=1)] = 10
    step_size: Annotated[Number, Field(gt=0)] = 0.25
    inner_mode: InnerMode = "train"
    kind: Literal["PGDAT"] = "PGDAT"
    needs: ClassVar[frozenset[Need]] = frozenset({"attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy."""
        start = uniform_start(inputs, self.eps)
        with inner_pass(model, self.inner_mode):
            return last_iterate(
                model, inputs, labels, start, eps=self.eps, steps=self.steps,
                step_size=self.step_size,
            )  # fmt: skip

    def __call__(self, passes: Passes) -> Tensor:
        """Cross-entropy of the attacked batch `(batch,)`."""
        return cross_entropy(passes["attacked"])
