"""Claim: flatness goes with confidence and knows no label: the confidently wrong are flat.

Every sample that the model has wrong, as it is or at the end of a PGD attack (20 steps, which go on
after the flip), is compared with the right samples nearest in confidence:

    ratio = kappa / geometric mean of kappa over the 15 nearest right samples,

all of them within a factor of 2 in 1 - confidence. 1 is what a measure that knows no label gives.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.claims.at_head import AtHead, pass_to_head
from flatreg.claims.result import (
    FEWEST,
    Check,
    ClaimResult,
    Findings,
    Trained,
    rank_correlation,
    result_of,
    share_of,
)
from flatreg.measures.estimate import Estimate
from flatreg.terms.protocol import CONFIG, Count

FACTOR = 2.0  # within which kappa must agree, and confidence to be compared
NEIGHBOURS, LEAST = 15, 5
CONFIDENT = 0.9
ORDERED = 0.9  # rank correlation
_STEPS = 20


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LabelBlind:
    """Flatness goes with confidence and knows no label.

    Reproduced on an arm if:

    - wrong at any confidence: the median ratio lies in [1/2, 2] with its 95% interval;
    - wrong and confident, at 0.9 or above: the same;
    - confidence decides: kappa and 1 - confidence have a rank correlation of 0.9 at least over all
      samples, right and wrong.

    Each over 20 samples at least.

    Args:
        samples: how many of the evaluated ones.
    """

    samples: Count = 500
    kind: Literal["LabelBlind"] = "LabelBlind"

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        found = {title: self._on_arm(title, model, trained) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Flatness goes with confidence, whatever the label: a model that is confidently wrong "
            "is as flat as one that is confidently right.",
            trained,
            self.samples,
            found,
        )

    def _on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        groups = _groups(model, trained, self.samples)
        right, kappas = groups["right"], {name: at.kappa() for name, at in groups.items()}
        compared = {n: _ratios(at, kappas[n], right, kappas["right"]) for n, at in groups.items()}
        ratio = torch.cat([compared[name] for name in ("wrong", "attacked")])
        doubt = torch.cat([groups[name].uncertainty for name in ("wrong", "attacked")])
        known = ratio.isfinite()
        every, sure = (ratio[known & rows] for rows in (doubt < 1, doubt <= 1 - CONFIDENT))
        doubts = torch.cat([at.uncertainty for at in groups.values()])
        rank = rank_correlation(doubts, torch.cat(list(kappas.values())))
        total = sum(len(kappa) for kappa in kappas.values())
        checks = [
            _agrees(title, "wrong", every),
            _agrees(title, f"wrong at {CONFIDENT:g} or above", sure),
            Check(
                title,
                f"rank correlation of kappa and 1 - confidence at least {ORDERED:g}",
                f"{rank:.3f} over {total}",
                total >= FEWEST and rank >= ORDERED,
            ),
        ]
        numbers = {
            "ratio, wrong": Estimate.median(every),
            f"ratio, wrong at {CONFIDENT:g} or above": Estimate.median(sure),
            "rank correlation": Estimate.exact(rank, total),
            "attacked with confidence 0.9 or above": share_of(
                groups["attacked"].uncertainty <= 1 - CONFIDENT
            ),
            "attacked flatter than the median right one": share_of(
                kappas["attacked"] < kappas["right"].median()
            ),
        } | {f"kappa, {name}": Estimate.median(kappa) for name, kappa in kappas.items()}
        for name, at in groups.items():
            numbers[f"norm of the features, {name}"] = Estimate.median(at.features.norm(dim=1))
        arrays = {f"{name}.kappa": kappa.tolist() for name, kappa in kappas.items()}
        arrays |= {f"{name}.doubt": at.uncertainty.tolist() for name, at in groups.items()}
        return Findings(checks, numbers, arrays)


def _groups(model: nn.Module, trained: Trained, samples: int) -> dict[str, AtHead]:
    """Right, wrong, and those right that the attack made wrong."""
    threat = trained.threat
    inputs, labels = trained.test_batch(samples, model)
    clean = pass_to_head(model, inputs, labels)
    right = clean.right.to(inputs.device)
    found = pgd(
        model,
        inputs[right],
        labels[right],
        eps=threat.eps,
        norm=threat.norm,
        seed=threat.seed,
        steps=_STEPS,
        early_stop=False,
    )
    attacked = pass_to_head(model, found.inputs, labels[right])
    return {
        "right": clean.rows(clean.right),
        "wrong": clean.rows(~clean.right),
        "attacked": attacked.rows(~attacked.right),
    }


def _ratios(at: AtHead, kappa: Tensor, right: AtHead, reference: Tensor) -> Tensor:
    """Kappa over that of right samples of like confidence `(n,)`; nan where there are too few."""
    gaps = (at.uncertainty.log()[:, None] - right.uncertainty.log()).abs()
    near, which = gaps.topk(min(NEIGHBOURS, gaps.shape[1]), dim=1, largest=False)
    inside = near <= torch.tensor(FACTOR).log()
    logs = torch.where(inside, reference.log()[which], 0).sum(1) / inside.sum(1)
    return torch.where(inside.sum(1) >= LEAST, kappa / logs.exp(), torch.nan)


def _agrees(title: str, group: str, ratio: Tensor) -> Check:
    median = Estimate.median(ratio)
    inside = median.low >= 1 / FACTOR and median.high <= FACTOR
    return Check(
        title,
        f"{group}: median ratio to right ones of like confidence in [{1 / FACTOR:g}, {FACTOR:g}] "
        f"with its interval, n >= {FEWEST}",
        f"{median}, n = {len(ratio)}",
        len(ratio) >= FEWEST and inside,
    )
