"""Claim: a scaled last layer is flatter and looks more robust, and is neither.

Multiplying weight and bias of the head by c > 0 changes no prediction and moves no boundary. The
softmax saturates: kappa of the samples that are right goes to 0, and with it the gradient of the
cross-entropy that plain PGD and APGD follow. A cascade on losses blind to the scale sees through.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from flatreg.attacks.apgd import apgd
from flatreg.attacks.options import Attack
from flatreg.attacks.pgd import pgd
from flatreg.claims.at_head import pass_to_head
from flatreg.claims.cascade import Cascade, evaluated, stages_of
from flatreg.claims.result import Check, ClaimResult, Findings, Trained, result_of
from flatreg.evaluation.compare import compare
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.models.heads import find_head
from flatreg.terms.protocol import CONFIG, Count, Number

FLATTER = 1e-3  # kappa at the largest factor over kappa at the smallest, at most
WEAKER, LEVEL = 0.1, 0.05  # rise of the accuracy under plain cross-entropy, and its p
PLAIN: dict[str, tuple[Attack, ...]] = {
    "PGD on plain cross-entropy": (partial(pgd, loss="cross_entropy", steps=10),),
    "APGD on plain cross-entropy": (partial(apgd, loss="cross_entropy", steps=20),),
}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ScaledHead:
    """A scaled last layer is flatter, looks more robust, and is not.

    Reproduced on an arm if, from the first factor to the last:

    - flatter: the median kappa of the samples that are right falls by a factor of 1000 at least;
    - looks more robust: accuracy under PGD, and under APGD, on plain cross-entropy rises by 10
      points at least, p < 0.05 (McNemar);
    - is not: under the cascade not one sample changes its verdict at any factor.

    Args:
        factors: ascending, the first 1.
        cascade: "short" (PGD-10 on the margin, APGD-20 on rescaled cross-entropy, APGD-10 on DLR at
            9 targets) or a preset of `flatreg.evaluate`.
        samples: how many of the evaluated ones.
    """

    factors: tuple[Number, ...] = Field(default=(1, 10, 100, 1000), min_length=2)
    cascade: Cascade = "short"
    samples: Count = 150
    kind: Literal["ScaledHead"] = "ScaledHead"

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        found = {title: self._on_arm(title, model, trained) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Scaling the last layer makes the loss flatter and attacks on plain cross-entropy "
            "weaker, and changes no verdict under a cascade that is blind to the scale.",
            trained,
            self.samples,
            found,
        )

    def _on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        inputs, labels = trained.test_batch(self.samples, model)
        attacks = PLAIN | {"cascade": stages_of(self.cascade)}
        kappas, runs = [], {name: list[Evaluation]() for name in attacks}
        for factor in self.factors:
            scaled = scaled_head(model, inputs[:2], factor)
            at = pass_to_head(scaled, inputs, labels)
            kappas.append(Estimate.median(at.kappa()[at.right]))
            for name, attack in attacks.items():
                runs[name].append(evaluated(scaled, attack, trained, self.samples))
        fall = kappas[-1].value / kappas[0].value if kappas[0].value > 0 else float("nan")
        checks = [
            Check(
                title,
                f"kappa falls to {FLATTER:g} of what it was, or below, median",
                f"{kappas[0].value:.3g} to {kappas[-1].value:.3g}, {fall:.2g}",
                fall <= FLATTER,
            ),
            *(_looks_more_robust(title, name, runs[name]) for name in PLAIN),
            _is_not(title, runs["cascade"]),
        ]
        numbers: dict[str, Estimate] = {}
        arrays = {"factors": [float(factor) for factor in self.factors]}
        columns = {"kappa, right": kappas} | {
            name: [one.attacked for one in found] for name, found in runs.items()
        }
        for name, column in columns.items():
            numbers |= {f"{name}, x{c:g}": m for c, m in zip(self.factors, column, strict=True)}
            for field in ("value", "low", "high"):
                arrays[f"{name}.{field}"] = [getattr(measured, field) for measured in column]
        return Findings(checks, numbers, arrays)


def scaled_head(model: nn.Module, inputs: torch.Tensor, factor: float) -> nn.Module:
    """A copy whose last layer is multiplied by `factor`, weight and bias.

    Raises:
        ValueError: the model has no linear head.
    """
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in find_head(scaled, inputs).parameters():
            parameter.mul_(factor)
    return scaled


def _looks_more_robust(title: str, attack: str, runs: list[Evaluation]) -> Check:
    rise = compare(runs[0], runs[-1]).attacked
    return Check(
        title,
        f"{attack} leaves {100 * WEAKER:g} points more, p < {LEVEL:g}",
        str(rise),
        rise.value >= WEAKER and rise.p_value < LEVEL,
    )


def _is_not(title: str, runs: list[Evaluation]) -> Check:
    """A verdict is whether a sample survives, not which stage fells it."""
    first, *others = ([verdict == -1 for verdict in one.verdicts] for one in runs)
    changed = [sum(a != b for a, b in zip(first, other, strict=True)) for other in others]
    return Check(
        title,
        "no verdict of the cascade changes",
        f"{', '.join(map(str, changed))} of {runs[0].n} change; attacked {runs[0].attacked} to "
        f"{runs[-1].attacked}",
        not any(changed),
    )
