r"""Claim: flatness bounds the loss, and does so locally.

If the features of an image move by at most R,

.. math:: \ell(\phi + h) \le \ell + \|W^T(p - e_y)\| R + \tfrac12 \lambda_{\max}(C) R^2
          + \tfrac16 (R \max_{s,s'} \|w_s - w_{s'}\|)^3 / (6 \sqrt 3)

(see `flatreg.measures.local_bound`). The bound is compared with the largest loss that a maximiser
finds at R, with a bound that knows no derivative, and with R*, the exact distance at which the
prediction can first change.

Conditions, fixed beforehand. The claim is reproduced on an arm if, over the samples that are right,
at least 20 of them:

- no bound is violated by more than rounding, by the maximiser or by PGD in the input;
- it is tight near 0: at R*/1000 the median of bound over largest loss is at most 1.05;
- it is local: the radius up to which it still excludes another prediction (bound below log 2) is
  less than half of R*, in the median with its 95% interval. This is taken over the samples whose
  loss is below log 2 to begin with, at least 20 of them: of the others no bound can say that.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231.

    python recipes/paper/local_bound.py [samples=128] [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from claim import (
    FEWEST,
    STRICT,
    AtHead,
    Check,
    ClaimResult,
    Findings,
    Trained,
    at_head,
    in_float64,
    legend_below,
    main,
    panels_by_arm,
    result_of,
)
from matplotlib.figure import Figure
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate
from flatreg.attacks import pgd
from flatreg.measures import BoundCurve, bound_curve, feature_radius, global_bound, local_bound
from flatreg.report.figures.style import COLORS, INK

ROUNDING = 1e-12
TIGHT = 1.05  # median of bound over largest loss, at a thousandth of R*
HALF = 0.5  # of R*, before which a local bound is lost
BOUNDS = ("local_bound", "relative_bound", "global_bound")  # fields of a BoundCurve
DECISION = math.log(2)  # below it the label has more than half of the probability


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalBound:
    """Flatness bounds the loss near the features, and promises little further out.

    Args:
        samples: how many of the evaluated test images.
    """

    samples: PositiveInt = 128

    statement: ClassVar[str] = (
        "Flatness bounds the loss near the features of an image and promises little further out, "
        "long before the prediction can change."
    )
    caption: ClassVar[str] = (
        "Bounds on the loss and the largest loss found when features move by R: median and "
        "quartiles. Dotted: log 2, above which the prediction may change; where the local bound "
        "reaches it; and R*, where the prediction can first change."
    )

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Compare the bounds with the losses found on one arm."""
        exact = in_float64(model)
        inputs, labels = trained.test_batch(self.samples, exact)
        at = at_head(exact, inputs, labels)
        radius = feature_radius(at.logits, at.labels, at.weight)  # R* of every sample
        kept = (radius > 0) & radius.isfinite()  # those that are right
        at, radius = at.rows(kept), radius[kept]
        multiples = torch.cat([torch.tensor([1e-3]), torch.logspace(-2.5, 0.5, 41)]).double()
        curve = bound_curve(at.logits, at.labels, at.weight, multiples[:, None] * radius)
        moved, above = attacked(exact, inputs[kept], labels[kept], at, trained)
        violated = violations(curve) + int(above.sum())
        pairs = len(BOUNDS) * curve.worst_loss.numel() + len(above)
        excess = Estimate.median((curve.local_bound / curve.worst_loss)[0])
        sure = F.cross_entropy(at.logits, at.labels, reduction="none") < DECISION
        certifies = {name: certified(at.rows(sure), radius[sure], name) for name in BOUNDS}
        medians = {name: Estimate.median(part) for name, part in certifies.items()}
        local, enough = medians["local_bound"], len(radius) >= FEWEST
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
            "the same by kappa, R*": medians["relative_bound"],
            "global bound certifies, R*": medians["global_bound"],
            "local below global up to, R*": Estimate.median(better_up_to(curve, multiples)),
            "PGD moves the features by, R*": Estimate.median(moved / radius),
        }
        arrays = {
            "multiples": multiples.tolist(),
            "certified": certifies["local_bound"].tolist(),
            "reach": (moved / radius).tolist(),
        }
        return Findings(checks, numbers, arrays | quartiles(curve))

    def figure(self, result: ClaimResult) -> Figure:
        """Bounds and the largest loss found over the radius, a panel for each arm."""
        figure, (panels,) = panels_by_arm(result, width=2.9, height=3.4, sharey=True)
        lines = {
            "worst_loss": ("largest loss found", INK, "-"),
            "local_bound": ("local bound, curvature", COLORS[5], "-"),
            "relative_bound": ("local bound, kappa", COLORS[1], "--"),
            "global_bound": ("global bound, no derivative", COLORS[2], "-"),
        }
        for axes, (title, arm) in zip(panels, result.arrays.items(), strict=True):
            at = arm["multiples"]
            for name, (label, color, dash) in lines.items():
                lower, median, upper = (arm[f"{name}.{q}"] for q in ("lower", "median", "upper"))
                axes.fill_between(at, lower, upper, color=color, alpha=0.12, linewidth=0)
                axes.plot(at, median, dash, color=color, label=label)
            local = result.numbers[title]["local bound certifies, R*"].value
            axes.axhline(DECISION, color=COLORS[0], linewidth=0.8, linestyle=":")
            axes.axvline(local, color=COLORS[5], linewidth=0.8, linestyle=":")
            axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
            place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 8}
            axes.text(local, 0.09, f"{local:.2g} ", color=COLORS[5], ha="right", **place)
            axes.text(1, 0.02, " R*", color=INK, **place)
            axes.set(xscale="log", yscale="log", ylim=(1e-5, 1e3), xlim=(at[1], at[-1]))
            axes.set_xlabel("R / R* of the image")
        panels[0].set_ylabel("cross-entropy")
        legend_below(figure, panels[0])
        return figure


def violations(curve: BoundCurve) -> int:
    """Pairs of sample and radius at which the largest loss found exceeds a bound."""
    least = curve.worst_loss * (1 - ROUNDING)
    return sum(int((getattr(curve, name) < least).sum()) for name in BOUNDS)


def attacked(
    model: nn.Module, inputs: Tensor, labels: Tensor, clean: AtHead, trained: Trained
) -> tuple[Tensor, Tensor]:
    """How far PGD moves the features, and where its loss exceeds the bound at that R."""
    threat = trained.evaluation
    found = pgd(
        model, inputs, labels, eps=threat.eps, norm=threat.norm, seed=threat.seed, early_stop=False
    )
    end = at_head(model, found.inputs, labels)
    moved = (end.features - clean.features).norm(dim=1)
    loss = F.cross_entropy(end.logits, end.labels, reduction="none")
    bound = local_bound(clean.logits, clean.labels, clean.weight, moved)
    return moved, loss * (1 - ROUNDING) > bound


def certified(at: AtHead, radius: Tensor, bound: str) -> Tensor:
    """Largest R, in units of R*, at which the bound still lies below log 2, by bisection."""

    def value(r: Tensor) -> Tensor:
        if bound == "global_bound":
            return global_bound(at.logits, at.labels, at.weight, r)
        kind = "eigenvalue" if bound == "local_bound" else "relative_flatness"
        return local_bound(at.logits, at.labels, at.weight, r, second_order=kind)

    low, high = torch.zeros_like(radius), radius  # at R* two classes tie: the bound is above log 2
    for _ in range(40):
        middle = (low + high) / 2
        below = value(middle) < DECISION
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low / radius


def better_up_to(curve: BoundCurve, multiples: Tensor) -> Tensor:
    """First multiple of R* at which the local bound is not below the global one `(batch,)`."""
    lost = curve.local_bound >= curve.global_bound
    return torch.where(lost.any(0), multiples[lost.int().argmax(0)], multiples[-1])


def quartiles(curve: BoundCurve) -> dict[str, list[float]]:
    """Quartiles over samples of every line of the curve, at each radius."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found = {}
    for name in ("worst_loss", *BOUNDS):
        rows = getattr(curve, name).quantile(levels, dim=1)
        for level, values in zip(("lower", "median", "upper"), rows, strict=True):
            found[f"{name}.{level}"] = values.tolist()
    return found


if __name__ == "__main__":
    main(LocalBound, __file__)
