"""Claim: a scaled last layer is flatter and looks more robust, and is neither.

Multiplying weight and bias of the head by c > 0 changes no prediction and moves no boundary. The
softmax saturates: kappa of the samples that are right goes to 0, and with it the gradient of the
cross-entropy that plain PGD and APGD follow. A cascade on losses that do not depend on the scale
attacks as before.

Conditions, fixed beforehand. The claim is reproduced on an arm if, from the first factor to the
last:

- flatter: the median kappa of the samples that are right falls by a factor of at least 1000;
- looks more robust: accuracy under PGD, and under APGD, on plain cross-entropy rises by at least
  10 points, p < 0.05 (McNemar);
- is not: under the cascade not one sample changes its verdict at any factor.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231.

    python recipes/paper/scaled_head.py [factors=[1,10,100,1000]] [cascade=short] [samples=150]
        [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated, ClassVar

import torch
from claim import (
    STRICT,
    Cascade,
    Check,
    ClaimResult,
    Findings,
    Trained,
    at_head,
    legend_below,
    main,
    panels_by_arm,
    result_of,
    stages_of,
)
from matplotlib.figure import Figure
from pydantic import Field, FiniteFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate, Evaluation, compare, find_head
from flatreg.attacks import Attack, apgd, pgd
from flatreg.report.figures.style import COLORS

FLATTER = 1e-3  # kappa at the last factor over kappa at the first, at most
WEAKER, LEVEL = 0.1, 0.05  # gain of accuracy under plain cross-entropy, and McNemar's p
PLAIN: dict[str, tuple[Attack, ...]] = {
    "PGD on plain cross-entropy": (partial(pgd, loss="cross_entropy", steps=10),),
    "APGD on plain cross-entropy": (partial(apgd, loss="cross_entropy", steps=20),),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScaledHead:
    """A scaled last layer is flatter, looks more robust, and is not.

    Args:
        factors: ascending, the first 1.
        cascade: "short" (PGD-10 on the margin, APGD-20 on rescaled cross-entropy, APGD-10 on DLR at
            9 targets) or a preset of `flatreg.evaluate`.
        samples: how many of the evaluated test images.
    """

    factors: Annotated[tuple[FiniteFloat, ...], Field(min_length=2)] = (1, 10, 100, 1000)
    cascade: Cascade = "short"
    samples: PositiveInt = 150

    statement: ClassVar[str] = (
        "Scaling the last layer makes the loss flatter and attacks on plain cross-entropy weaker, "
        "and changes no verdict under a cascade that is blind to the scale."
    )
    caption: ClassVar[str] = (
        "The last layer multiplied: median kappa of the samples that are right, and what attacks "
        "leave, with Wilson 95% intervals. No prediction changes."
    )

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Scale the head of one arm by every factor; measure kappa and attack it."""
        inputs, labels = trained.test_batch(self.samples, model)
        attacks = PLAIN | {"cascade": stages_of(self.cascade)}
        kappas, runs = list[Estimate](), {name: list[Evaluation]() for name in attacks}
        for factor in self.factors:
            scaled = scaled_head(model, inputs[:2], factor)
            at = at_head(scaled, inputs, labels)
            kappas.append(Estimate.median(at.kappa()[at.right]))
            for name, attack in attacks.items():
                runs[name].append(trained.evaluate(scaled, attack, self.samples))
        first, last = kappas[0].value, kappas[-1].value
        ratio = last / first if first > 0 else float("nan")
        checks = [
            Check(
                title,
                f"kappa falls to {FLATTER:g} of what it was, or below, median",
                f"{first:.3g} to {last:.3g}, {ratio:.2g}",
                ratio <= FLATTER,
            ),
            *(looks_more_robust(title, name, runs[name]) for name in PLAIN),
            is_not(title, runs["cascade"]),
        ]
        numbers: dict[str, Estimate] = {}
        arrays = {"factors": [float(factor) for factor in self.factors]}
        columns = {"kappa, right": kappas}
        columns |= {name: [one.attacked for one in of_attack] for name, of_attack in runs.items()}
        for name, column in columns.items():
            numbers |= {f"{name}, x{c:g}": e for c, e in zip(self.factors, column, strict=True)}
            for field in ("value", "low", "high"):
                arrays[f"{name}.{field}"] = [getattr(estimate, field) for estimate in column]
        return Findings(checks, numbers, arrays)

    def figure(self, result: ClaimResult) -> Figure:
        """Kappa and accuracies over the factor, a column for each arm."""
        figure, panels = panels_by_arm(result, rows=2, width=2.3, height=4.8, sharey="row")
        lines = {
            "cascade": ("cascade blind to the scale", COLORS[2], "o-"),
            "PGD on plain cross-entropy": ("PGD, plain cross-entropy", COLORS[1], "s--"),
            "APGD on plain cross-entropy": ("APGD, plain cross-entropy", COLORS[4], "^:"),
        }
        for (above, below), arm in zip(panels.T, result.arrays.values(), strict=True):
            at = arm["factors"]
            kappa = [max(value, 1e-40) for value in arm["kappa, right.value"]]
            above.plot(at, kappa, "o-", color=COLORS[5])
            for name, (label, color, style) in lines.items():
                low, value, high = (
                    [100 * v for v in arm[f"{name}.{field}"]] for field in ("low", "value", "high")
                )
                below.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
                below.plot(at, value, style, color=color, markersize=4, label=label)
            above.set(xscale="log", yscale="log")
            below.set(ylim=(-3, 103), xlabel="head multiplied by")
        panels[0, 0].set_ylabel("kappa of right samples\n(from 1e-40)")
        panels[1, 0].set_ylabel("accuracy left, %")
        legend_below(figure, panels[1, 0])
        return figure


def scaled_head(model: nn.Module, inputs: Tensor, factor: float) -> nn.Module:
    """A copy of `model` whose last layer is multiplied by `factor`, weight and bias.

    `inputs` are a few images, from which the head is found.

    Raises:
        ValueError: the model has no linear head.
    """
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in find_head(scaled, inputs).parameters():
            parameter.mul_(factor)
    return scaled


def looks_more_robust(title: str, attack: str, runs: list[Evaluation]) -> Check:
    """Whether the attack leaves more samples at the last factor than at the first."""
    gain = compare(runs[0], runs[-1]).attacked
    return Check(
        title,
        f"{attack} leaves {100 * WEAKER:g} points more, p < {LEVEL:g}",
        str(gain),
        gain.value >= WEAKER and gain.p_value < LEVEL,
    )


def is_not(title: str, runs: list[Evaluation]) -> Check:
    """Whether no sample changes its verdict: survived or not, whatever stage fooled it."""
    first, *others = ([verdict == -1 for verdict in one.verdicts] for one in runs)
    changed = [sum(a != b for a, b in zip(first, other, strict=True)) for other in others]
    return Check(
        title,
        "no verdict of the cascade changes",
        f"{', '.join(map(str, changed))} of {runs[0].n} change; attacked {runs[0].attacked} to "
        f"{runs[-1].attacked}",
        not any(changed),
    )


if __name__ == "__main__":
    main(ScaledHead, __file__)
