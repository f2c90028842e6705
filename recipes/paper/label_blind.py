"""Claim: flatness goes with confidence and knows no label: the confidently wrong are flat.

Every sample that the model has wrong, as it is or at the end of a PGD attack (20 steps, continued
after the flip), is compared with the right samples nearest in confidence:

    ratio = kappa / geometric mean of kappa over the 15 nearest right samples,

all of them within a factor of 2 in 1 - confidence. A measure that knows no label gives 1.

Conditions, fixed beforehand. The claim is reproduced on an arm if, each over at least 20 samples:

- wrong at any confidence: the median ratio lies in [1/2, 2] with its 95% interval;
- wrong and confident, at 0.9 or above: the same;
- confidence decides: kappa and 1 - confidence have a rank correlation of at least 0.9 over all
  samples, right and wrong.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231.

    python recipes/paper/label_blind.py [samples=500] [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from claim import (
    FEWEST,
    STRICT,
    AtHead,
    Check,
    ClaimResult,
    Findings,
    Trained,
    at_head,
    legend_below,
    main,
    panels_by_arm,
    rank_correlation,
    result_of,
    share_of,
)
from matplotlib.figure import Figure
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate
from flatreg.attacks import pgd
from flatreg.report.figures.style import COLORS

FACTOR = 2.0  # within which kappa must agree, and confidence to be compared
NEIGHBOURS, LEAST = 15, 5  # right samples that one wrong sample is compared with
CONFIDENT = 0.9
ORDERED = 0.9  # rank correlation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LabelBlind:
    """Flatness goes with confidence and knows no label.

    Args:
        samples: how many of the evaluated test images.
    """

    samples: PositiveInt = 500

    statement: ClassVar[str] = (
        "Flatness goes with confidence, whatever the label: a model that is confidently wrong is "
        "as flat as one that is confidently right."
    )
    caption: ClassVar[str] = (
        "Kappa against 1 - confidence, one mark a sample: right, wrong, and wrong after an attack."
    )

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Compare the wrong samples of one arm with its right ones."""
        groups = by_outcome(model, trained, self.samples)
        right, kappas = groups["right"], {name: at.kappa() for name, at in groups.items()}
        wrong = ("wrong", "attacked")
        ratio = torch.cat([ratios(groups[n], kappas[n], right, kappas["right"]) for n in wrong])
        uncertainty = torch.cat([groups[name].uncertainty for name in wrong])
        known = ratio.isfinite()
        every, sure = ratio[known], ratio[known & (uncertainty <= 1 - CONFIDENT)]
        everywhere = torch.cat([at.uncertainty for at in groups.values()])
        rank = rank_correlation(everywhere, torch.cat(list(kappas.values())))
        checks = [
            agrees(title, "wrong", every),
            agrees(title, f"wrong at {CONFIDENT:g} or above", sure),
            Check(
                title,
                f"rank correlation of kappa and 1 - confidence at least {ORDERED:g}",
                f"{rank:.3f} over {len(everywhere)}",
                len(everywhere) >= FEWEST and rank >= ORDERED,
            ),
        ]
        numbers = {
            "ratio, wrong": Estimate.median(every),
            f"ratio, wrong at {CONFIDENT:g} or above": Estimate.median(sure),
            "rank correlation": Estimate.exact(rank, len(everywhere)),
            "attacked with confidence 0.9 or above": share_of(
                groups["attacked"].uncertainty <= 1 - CONFIDENT
            ),
            "attacked flatter than the median right one": share_of(
                kappas["attacked"] < kappas["right"].median()
            ),
        }
        arrays = {}
        for name, at in groups.items():
            numbers[f"kappa, {name}"] = Estimate.median(kappas[name])
            numbers[f"norm of the features, {name}"] = Estimate.median(at.features.norm(dim=1))
            arrays[f"{name}.kappa"] = kappas[name].tolist()
            arrays[f"{name}.uncertainty"] = at.uncertainty.tolist()
        return Findings(checks, numbers, arrays)

    def figure(self, result: ClaimResult) -> Figure:
        """Kappa against 1 - confidence of every sample, a panel for each arm."""
        figure, (panels,) = panels_by_arm(result, width=2.9, height=3.4, sharey=True)
        styles: dict[str, dict[str, Any]] = {
            "right": {"color": COLORS[2], "marker": "o", "s": 42, "alpha": 0.25, "linewidths": 0},
            "attacked": {"edgecolors": COLORS[1], "marker": "D", "s": 6, "facecolors": "none"},
            "wrong": {"edgecolors": COLORS[4], "marker": "s", "s": 26, "facecolors": "none"},
        }
        for axes, (title, arm) in zip(panels, result.arrays.items(), strict=True):
            for name, style in styles.items():
                axes.scatter(arm[f"{name}.uncertainty"], arm[f"{name}.kappa"], **style, label=name)
            axes.set(xscale="log", yscale="log", xlabel="1 - confidence", xlim=(1.2, 1e-12))
            ratio = result.numbers[title]["ratio, wrong"].value
            text = f"wrong / right at equal\nconfidence: {ratio:.2f}"
            place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
            axes.text(0.97, 0.96, text, fontsize=8, **place)
        panels[0].set_ylabel("kappa (larger = sharper)")
        panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 1e-10))
        legend_below(figure, panels[0])
        return figure


def by_outcome(model: nn.Module, trained: Trained, samples: int) -> dict[str, AtHead]:
    """Samples that are right, that are wrong, and right ones that the attack made wrong."""
    threat = trained.evaluation
    inputs, labels = trained.test_batch(samples, model)
    clean = at_head(model, inputs, labels)
    right = clean.right.to(inputs.device)
    found = pgd(
        model,
        inputs[right],
        labels[right],
        eps=threat.eps,
        norm=threat.norm,
        seed=threat.seed,
        steps=20,
        early_stop=False,
    )
    attacked = at_head(model, found.inputs, labels[right])
    return {
        "right": clean.rows(clean.right),
        "wrong": clean.rows(~clean.right),
        "attacked": attacked.rows(~attacked.right),
    }


def ratios(at: AtHead, kappa: Tensor, right: AtHead, reference: Tensor) -> Tensor:
    """Kappa over that of right samples of like confidence `(n,)`; nan where there are too few.

    `kappa` is that of `at`, `reference` that of `right`.
    """
    gaps = (at.uncertainty.log()[:, None] - right.uncertainty.log()).abs()
    near, which = gaps.topk(min(NEIGHBOURS, gaps.shape[1]), dim=1, largest=False)
    inside = near <= torch.tensor(FACTOR).log()
    logs = torch.where(inside, reference.log()[which], 0).sum(1) / inside.sum(1)
    return torch.where(inside.sum(1) >= LEAST, kappa / logs.exp(), torch.nan)


def agrees(title: str, group: str, ratio: Tensor) -> Check:
    """Whether the median ratio lies within a factor of 2 of 1, with its interval."""
    median = Estimate.median(ratio)
    inside = median.low >= 1 / FACTOR and median.high <= FACTOR
    return Check(
        title,
        f"{group}: median ratio to right ones of like confidence in [{1 / FACTOR:g}, {FACTOR:g}] "
        f"with its interval, n >= {FEWEST}",
        f"{median}, n = {len(ratio)}",
        len(ratio) >= FEWEST and inside,
    )


if __name__ == "__main__":
    main(LabelBlind, __file__)
