r"""Claim: relative flatness of the last layer has a closed form.

.. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle \operatorname{Tr} H_{s,s'}
          = \|\phi\|^2 \Big( \sum_s p_s \|w_s\|^2 - \Big\| \sum_s p_s w_s \Big\|^2 \Big)

The left side is computed as it stands: autograd's Hessian of a sample's cross-entropy in the weight
of the head, block by block, in float64. The right side is `flatreg.measures.relative_flatness`.

Condition, fixed beforehand. The claim is reproduced on an arm if the two sides differ by at most
1e-9, relative to the left one, over the samples whose confidence is below 1 - 1e-6, at least 20 of
them. Above that confidence the Hessian itself has lost its digits: it is drawn and not judged.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231.

    python recipes/paper/closed_form.py [samples=64] [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

from itertools import cycle
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from claim import (
    FEWEST,
    MARKERS,
    STRICT,
    AtHead,
    Check,
    ClaimResult,
    Findings,
    Trained,
    at_head,
    in_float64,
    main,
    result_of,
)
from matplotlib.figure import Figure
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate
from flatreg.report.figures.style import COLORS, INK, panels

TOLERANCE = 1e-9
# 1 - p has lost half of float64's digits there, and with it the Hessian, not the closed form.
FAINTEST = 1e-6


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClosedForm:
    """Relative flatness of the last layer is what its closed form says.

    Args:
        samples: how many of the evaluated test images.
    """

    samples: PositiveInt = 64

    statement: ClassVar[str] = (
        "Relative flatness of the last layer, a sum over blocks of the Hessian, is the squared "
        "norm of the features times the variance of the class weights under the softmax."
    )
    caption: ClassVar[str] = (
        "Relative flatness of every sample by its closed form and by autograd's Hessian, and their "
        "relative difference; beyond a confidence of 1 - 1e-6 the Hessian has lost its digits."
    )

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Compare both sides on the samples of one arm."""
        exact = in_float64(model)
        at = at_head(exact, *trained.test_batch(self.samples, exact))
        closed, explicit = at.kappa(), kappa_by_hessian(at)
        difference = (closed - explicit).abs() / explicit.abs()
        judged = difference[at.uncertainty > FAINTEST]
        largest = float(judged.max()) if len(judged) else float("nan")
        check = Check(
            title,
            f"largest relative difference at most {TOLERANCE:g}, over {FEWEST} samples or more of "
            f"confidence below 1 - {FAINTEST:g}",
            f"{largest:.2g} over {len(judged)} of {len(difference)}",
            len(judged) >= FEWEST and largest <= TOLERANCE,
        )
        numbers = {
            "largest difference": Estimate.exact(largest, len(judged)),
            "median difference": Estimate.median(difference),
            "kappa": Estimate.median(closed),
            "1 - confidence": Estimate.median(at.uncertainty),
        }
        drawn = {"closed": closed, "hessian": explicit, "uncertainty": at.uncertainty}
        return Findings([check], numbers, {name: values.tolist() for name, values in drawn.items()})

    def figure(self, result: ClaimResult) -> Figure:
        """Both sides against each other, and their relative difference over 1 - confidence."""
        figure, ((left, right),) = panels(1, 2, (9.6, 4.0), constrained=True)
        styles = zip(cycle(COLORS), cycle(MARKERS), strict=False)
        for (title, arm), (color, marker) in zip(result.arrays.items(), styles, strict=False):
            pairs = zip(arm["closed"], arm["hessian"], strict=True)
            difference = [max(abs(c - h) / abs(h), 1e-17) for c, h in pairs]
            style: dict[str, Any] = {"color": color, "markersize": 5, "markerfacecolor": "none"}
            left.plot(arm["hessian"], arm["closed"], marker, **style, label=title)
            right.plot(arm["uncertainty"], difference, marker, **style)
        positive = [v for arm in result.arrays.values() for v in arm["hessian"] if v > 0]
        ends = [min(positive), max(positive)]
        left.plot(ends, ends, color=INK, linewidth=0.8, zorder=0)
        left.set(xscale="log", yscale="log", xlabel="sum over blocks of the Hessian, autograd")
        left.set(ylabel="closed form", title="kappa of a sample, twice")
        left.legend(fontsize=8)
        right.axhline(TOLERANCE, color=COLORS[4], linestyle="--", linewidth=1)
        place: dict[str, Any] = {"transform": right.get_yaxis_transform(), "ha": "right"}
        right.text(0.98, TOLERANCE * 1.5, "allowed", color=COLORS[4], fontsize=8, **place)
        right.axvspan(right.get_xlim()[0] or 1e-17, FAINTEST, color=INK, alpha=0.06, linewidth=0)
        right.set(xscale="log", yscale="log", xlabel="1 - confidence (grey: not judged)")
        right.set(title="relative difference")
        return figure


@torch.enable_grad()
def kappa_by_hessian(at: AtHead) -> Tensor:
    """The sum over blocks of the Hessian `(n,)`, sample by sample."""
    gram = at.weight @ at.weight.T
    basis = torch.eye(at.weight.shape[1], dtype=at.weight.dtype)
    sums = []
    for phi, z, y in zip(at.features, at.logits, at.labels, strict=True):
        weight = at.weight.clone().requires_grad_()
        bias = z - at.weight @ phi
        loss = F.cross_entropy(weight @ phi + bias, y)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        traces = []
        for of_class in gradient:  # rows (s, i) of the Hessian over (t, j): one pass for each i
            (rows,) = torch.autograd.grad(
                of_class, weight, basis, retain_graph=True, is_grads_batched=True
            )
            traces.append(torch.einsum("iti->t", rows))  # Tr H_{s,t} for every t
        sums.append((gram * torch.stack(traces)).sum())
    return torch.stack(sums)


if __name__ == "__main__":
    main(ClosedForm, __file__)
