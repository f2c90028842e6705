"""Adversarial training on one step of the attack, from noise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.victim import climb
from flatreg.criteria.inner import InnerMode, inner_pass, last_iterate, uniform_start
from flatreg.criteria.losses import cross_entropy
from flatreg.terms import CONFIG, Eps, Need, Number, Passes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class NFGSM:
    """Single-step adversarial training with strong noise and no clipping to the ball.

    x' = clip_[0,1](x + n + a sign grad l(x + n)), n uniform in [-k eps, k eps]. Costs one pass
    forward and backward on top of a plain step. de Jorge et al., "Make Some Noise", NeurIPS 2022.

    Args:
        eps: radius in [0,1] pixel units.
        noise: k, in units of eps.
        step_size: a, in units of eps.
        inner_mode: the attack runs with the model in eval mode, or (`"train"`) in the mode it is in
            with BatchNorm statistics frozen.
    """

    eps: Eps
    noise: Annotated[Number, Field(ge=0)] = 2.0
    step_size: Annotated[Number, Field(gt=0)] = 1.0
    inner_mode: InnerMode = "train"
    kind: Literal["NFGSM"] = "NFGSM"
    needs: ClassVar[frozenset[Need]] = frozenset({"attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Noise, then one step from there."""
        noisy = inputs + self.noise * self.eps * (2 * torch.rand_like(inputs) - 1)
        with inner_pass(model, self.inner_mode):
            _, gradient, _ = climb(model, noisy, labels, "cross_entropy")
        return (noisy + self.step_size * self.eps * gradient.sign()).clamp(0, 1)

    def __call__(self, passes: Passes) -> Tensor:
        """Cross-entropy of the attacked batch `(batch,)`."""
        return cross_entropy(passes["attacked"])


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FGSMRS:
    """Single-step adversarial training from a random start in the ball.

    x' = P(x_0 + a sign grad l(x_0)), x_0 uniform in the ball, P onto ball and box: PGD of one step.
    Costs one pass forward and backward on top of a plain step. Wong, Rice and Kolter, "Fast is
    better than free", ICLR 2020. Trained long it can lose all robustness to more than one step
    (catastrophic overfitting); `NFGSM` is the remedy.

    Args:
        eps: radius in [0,1] pixel units.
        step_size: a, in units of eps.
        inner_mode: as in `NFGSM`.
    """

    eps: Eps
    step_size: Annotated[Number, Field(gt=0)] = 1.25
    inner_mode: InnerMode = "train"
    kind: Literal["FGSMRS"] = "FGSMRS"
    needs: ClassVar[frozenset[Need]] = frozenset({"attacked", "unit_inputs"})

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """A point of the ball, then one step from there."""
        start = uniform_start(inputs, self.eps)
        with inner_pass(model, self.inner_mode):
            return last_iterate(
                model, inputs, labels, start, eps=self.eps, steps=1, step_size=self.step_size
            )

    def __call__(self, passes: Passes) -> Tensor:
        """Cross-entropy of the attacked batch `(batch,)`."""
        return cross_entropy(passes["attacked"])
