"""Criteria: what a batch is trained on, clean or attacked."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd_iterates
from flatreg.attacks.victim import climb
from flatreg.terms import CONFIG, Eps, Need, Number, Passes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CrossEntropy:
    """Cross-entropy of the clean batch."""

    kind: Literal["CrossEntropy"] = "CrossEntropy"
    needs: ClassVar[frozenset[Need]] = frozenset({"clean"})

    def __call__(self, passes: Passes) -> Tensor:
        """Loss per sample `(batch,)`."""
        return F.cross_entropy(passes["clean"].logits, passes["clean"].labels, reduction="none")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class NFGSM:
    """Single-step adversarial training with strong noise and no clipping to the ball.

    x' = clip_[0,1](x + n + a sign grad l(x + n)), n uniform in [-k eps, k eps]. Costs one pass
    forward and backward on top of a plain step. de Jorge et al., "Make Some Noise", NeurIPS 2022.

    Args:
        eps: radius in [0,1] pixel units.
        noise: k, in units of eps.
        step_size: a, in units of eps.
    """

    eps: Eps
    noise: Annotated[Number, Field(ge=0)] = 2.0
    step_size: Annotated[Number, Field(gt=0)] = 1.0
    kind: Literal["NFGSM"] = "NFGSM"
    needs: ClassVar[frozenset[Need]] = frozenset({"attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Noise, then one step from there."""
        noisy = inputs + self.noise * self.eps * (2 * torch.rand_like(inputs) - 1)
        _, gradient, _ = climb(model, noisy, labels, "cross_entropy")
        return (noisy + self.step_size * self.eps * gradient.sign()).clamp(0, 1)

    def __call__(self, passes: Passes) -> Tensor:
        """Cross-entropy of the attacked batch `(batch,)`."""
        return _attacked_cross_entropy(passes)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PGDAT:
    """Adversarial training on PGD from a random start. Madry et al., ICLR 2018.

    Costs `steps` passes forward and backward on top of a plain step.

    Args:
        eps: radius in [0,1] pixel units.
        steps: steps of the inner attack.
        step_size: in units of eps.
    """

    eps: Eps
    steps: Annotated[int, Field(ge=1)] = 10
    step_size: Annotated[Number, Field(gt=0)] = 0.25
    kind: Literal["PGDAT"] = "PGDAT"
    needs: ClassVar[frozenset[Need]] = frozenset({"attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Last iterate of PGD on the cross-entropy."""
        start = (inputs + self.eps * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)
        *_, attacked = pgd_iterates(
            model, inputs, labels, eps=self.eps, steps=self.steps, step_size=self.step_size,
            start=start, loss="cross_entropy",
        )  # fmt: skip
        return attacked

    def __call__(self, passes: Passes) -> Tensor:
        """Cross-entropy of the attacked batch `(batch,)`."""
        return _attacked_cross_entropy(passes)


def _attacked_cross_entropy(passes: Passes) -> Tensor:
    attacked = passes["attacked"]
    return F.cross_entropy(attacked.logits, attacked.labels, reduction="none")


Criterion = Annotated[CrossEntropy | NFGSM | PGDAT, Field(discriminator="kind")]
