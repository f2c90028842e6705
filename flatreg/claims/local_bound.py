r"""Claim: flatness bounds the loss, and does so locally.

If the features move by at most R,

.. math:: \ell(\phi + h) \le \ell + \|W^T(p - e_y)\| R + \tfrac12 \lambda_{\max}(C) R^2
          + \tfrac16 (R \max_{s,s'} \|w_s - w_{s'}\|)^3 / (6 \sqrt 3)

(see `flatreg.measures.feature_bound`). It is held against the largest loss that a maximiser finds
at R, against a bound that knows no derivative, and against R*, the exact distance at which the
prediction can first change.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.claims.at_head import AtHead, in_float64, pass_to_head
from flatreg.claims.result import FEWEST, Check, ClaimResult, Findings, Trained, result_of
from flatreg.measures.estimate import Estimate
from flatreg.measures.feature_bound import (
    BoundCurve,
    bound_curve,
    feature_radius,
    global_bound,
    local_bound,
)
from flatreg.terms.protocol import CONFIG, Count

ROUNDING = 1e-12
TIGHT = 1.05  # median of bound over largest loss, at a thousandth of R*
HALF = 0.5  # of R*, before which a local bound is lost
_BOUNDS = ("local_bound", "relative_bound", "global_bound")
_DECISION = math.log(2)  # below it the label has more than half of the probability
_RADII = 41


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LocalBound:
    """Flatness bounds the loss near the features, and promises little further out.

    Reproduced on an arm if, over the samples that are right, 20 at least:

    - no bound is violated by more than rounding, by the maximiser or by PGD in the input;
    - it is tight near 0: at R*/1000 the median of bound over largest loss is at most 1.05;
    - it is local: the radius up to which it still excludes another prediction (bound below log 2)
      is less than half of R*, in the median with its 95% interval. Over the samples whose loss is
      below log 2 to begin with, 20 at least: of the others no bound on the loss can say that.

    Args:
        samples: how many of the evaluated ones.
    """

    samples: Count = 128
    kind: Literal["LocalBound"] = "LocalBound"

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        found = {title: self._on_arm(title, model, trained) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Flatness bounds the loss near the features of an image and promises little further "
            "out, long before the prediction can change.",
            trained,
            self.samples,
            found,
        )

    def _on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        exact = in_float64(model)
        inputs, labels = trained.test_batch(self.samples, exact)
        at = pass_to_head(exact, inputs, labels)
        own = feature_radius(at.logits, at.labels, at.weight)
        kept = (own > 0) & own.isfinite()
        at, own = at.rows(kept), own[kept]
        multiples = torch.cat([torch.tensor([1e-3]), torch.logspace(-2.5, 0.5, _RADII)]).double()
        curve = bound_curve(at.logits, at.labels, at.weight, multiples[:, None] * own)
        moved, beyond = _attacked(exact, inputs[kept], labels[kept], at, trained)
        violated = _violations(curve) + int(beyond.sum())
        pairs = len(_BOUNDS) * curve.worst_loss.numel() + len(beyond)
        excess = Estimate.median((curve.local_bound / curve.worst_loss)[0])
        sure = F.cross_entropy(at.logits, at.labels, reduction="none") < _DECISION
        certified = {name: _certified(at.rows(sure), own[sure], name) for name in _BOUNDS}
        shares = {name: Estimate.median(share) for name, share in certified.items()}
        local, enough = shares["local_bound"], len(own) >= FEWEST
        checks = [
            Check(
                title,
                f"no violation beyond a rounding of {ROUNDING:g}",
                f"{violated} of {pairs}",
                enough and violated == 0,
            ),
            Check(
                title,
                f"bound / largest loss at R*/1000 at most {TIGHT:g}, median",
                str(excess),
                enough and excess.value <= TIGHT,
            ),
            Check(
                title,
                f"certifies less than {HALF:g} R*, median with its interval",
                f"{local} R*, n = {local.n}",
                local.n >= FEWEST and local.high < HALF,
            ),
        ]
        numbers = {
            "violations": Estimate.exact(violated, pairs),
            "bound / loss at R*/1000": excess,
            "local bound certifies, R*": local,
            "the same by kappa, R*": shares["relative_bound"],
            "global bound certifies, R*": shares["global_bound"],
            "local below global up to, R*": Estimate.median(_better_up_to(curve, multiples)),
            "PGD moves the features by, R*": Estimate.median(moved / own),
        }
        per_sample = {"certified": certified["local_bound"], "reach": moved / own}
        return Findings(
            checks,
            numbers,
            _drawn(curve, multiples) | {n: values.tolist() for n, values in per_sample.items()},
        )


def _violations(curve: BoundCurve) -> int:
    """Pairs of sample and radius at which the largest loss found exceeds a bound."""
    least = curve.worst_loss * (1 - ROUNDING)
    return sum(int((getattr(curve, name) < least).sum()) for name in _BOUNDS)


def _attacked(
    model: nn.Module, inputs: Tensor, labels: Tensor, clean: AtHead, trained: Trained
) -> tuple[Tensor, Tensor]:
    """How far PGD moves the features, and where its loss exceeds the bound at that R."""
    threat = trained.threat
    found = pgd(
        model, inputs, labels, eps=threat.eps, norm=threat.norm, seed=threat.seed, early_stop=False
    )
    there = pass_to_head(model, found.inputs, labels)
    moved = (there.features - clean.features).norm(dim=1)
    loss = F.cross_entropy(there.logits, there.labels, reduction="none")
    bound = local_bound(clean.logits, clean.labels, clean.weight, moved)
    return moved, loss * (1 - ROUNDING) > bound


def _certified(at: AtHead, own: Tensor, bound: str) -> Tensor:
    """Largest R, in units of R*, at which the bound still lies below log 2, by bisection."""

    def value(radius: Tensor) -> Tensor:
        if bound == "global_bound":
            return global_bound(at.logits, at.labels, at.weight, radius)
        kind: Literal["eigenvalue", "relative_flatness"] = (
            "eigenvalue" if bound == "local_bound" else "relative_flatness"
        )
        return local_bound(at.logits, at.labels, at.weight, radius, second_order=kind)

    low, high = torch.zeros_like(own), own  # at R* two classes tie, so the bound is above log 2
    for _ in range(40):
        middle = (low + high) / 2
        below = value(middle) < _DECISION
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low / own


def _better_up_to(curve: BoundCurve, multiples: Tensor) -> Tensor:
    """First multiple of R* at which the local bound is not below the global one `(batch,)`."""
    lost = curve.local_bound >= curve.global_bound
    return torch.where(lost.any(0), multiples[lost.int().argmax(0)], multiples[-1])


def _drawn(curve: BoundCurve, multiples: Tensor) -> dict[str, list[float]]:
    """Quartiles over samples of every curve."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    out = {"multiples": multiples.tolist()}
    for name in ("worst_loss", *_BOUNDS):
        quartiles = getattr(curve, name).quantile(levels, dim=1)
        for level, values in zip(("lower", "median", "upper"), quartiles, strict=True):
            out[f"{name}.{level}"] = values.tolist()
    return out
