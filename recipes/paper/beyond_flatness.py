r"""Claim: what counts under attack is not kappa, but how the loss curves off the data manifold.

Arms trained for flatness, arms trained for little curvature off the manifold and their controls are
compared with a plain arm: relative flatness, attacked accuracy, and the curvature of the loss in
the input on either side of a manifold fitted to the training images, at the scale of the ball,

.. math:: \ell(x + d) - 2 \ell(x) + \ell(x - d), \qquad d = \epsilon\, P \operatorname{sign} g,

g the gradient of the loss, P the projector off the manifold, or onto it: the numbers that
`flatreg.OffManifoldCurvature` penalises. Off the manifold the same is taken further out, around
x + t d. All of it moves with the scale of the logits, so every model is taken at a median
confidence of 0.9, where kappa is called kappa*.

Conditions, fixed beforehand. The claim has five parts, each judged by itself:

- kappa alone: every arm in `flat` has a lower kappa than the plain one (mean difference on the same
  images, with its 95% interval), and an attacked accuracy that is not 10 points higher with
  p < 0.05 (McNemar);
- off the manifold: every arm in `curved` has an attacked accuracy higher by at least 10 points,
  p < 0.05;
- closer than kappa*: over all arms attacked accuracy goes with the curvature off the manifold more
  closely than with kappa* (absolute rank correlation);
- the sharper off the manifold, the better: that rank correlation is positive. The paper says that
  for robustness beyond a neighbourhood the loss must curve sharply away from the data; this is the
  plainest reading of it, at the scale of the ball;
- the sharper further out, the better: the rank correlation of attacked accuracy with the curvature
  three radii off the manifold is positive, which reads it beyond the ball.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231.

    python recipes/paper/beyond_flatness.py [cascade=short] [samples=150] [flat=[ARM,...]]
        [curved=[ARM,...]] [plain=ARM] [manifold={kind: PCAManifold, rank: 32}]
        [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import cycle
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from claim import (
    CONFIDENCE,
    MARKERS,
    STRICT,
    Cascade,
    Check,
    ClaimResult,
    Findings,
    Trained,
    at_head,
    legend_below,
    main,
    rank_correlation,
    result_of,
    stages_of,
)
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate, Evaluation, compare
from flatreg.measures import (
    IdentityManifold,
    Manifold,
    PCAManifold,
    scale_to_confidence,
    second_difference,
)
from flatreg.report.figures.style import COLORS, INK, panels, plain_ticks

GAIN, LEVEL = 0.1, 0.05  # of attacked accuracy over the plain arm's, and McNemar's p
FLAT, OFF = "kappa alone", "off the manifold"
CLOSER, SHARP = "closer than kappa*", "the sharper off the manifold, the better"
FURTHER, RADII = "the sharper further out, the better", 3
CURVATURE, CURVATURE_OUT = "curvature off", f"curvature off, {RADII} radii out"
PROFILE = 8  # radii out to which the figure shows the loss


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BeyondFlatness:
    """Not kappa alone, but how the loss curves off the data manifold counts under attack.

    Args:
        plain: arm that the others are compared with.
        flat: arms trained for flatness alone.
        curved: arms trained against curvature off the manifold.
        manifold: that the curvature is measured on.
        cascade: "short" (PGD-10 on the margin, APGD-20 on rescaled cross-entropy, APGD-10 on DLR at
            9 targets) or a preset of `flatreg.evaluate`.
        samples: how many of the evaluated test images.
    """

    plain: str = "plain"
    flat: Annotated[tuple[str, ...], Field(min_length=1)] = ("flat", "flatter")
    curved: Annotated[tuple[str, ...], Field(min_length=1)] = ("off-pca", "off-local")
    manifold: Manifold = Field(default_factory=partial(PCAManifold, rank=32))
    cascade: Cascade = "short"
    samples: PositiveInt = 150

    statement: ClassVar[str] = (
        "Lower kappa alone does not raise attacked accuracy; controlling how the loss curves off "
        "the data manifold does."
    )
    caption: ClassVar[str] = (
        "Attacked accuracy of every arm against relative flatness and curvature of the loss off "
        "the data manifold, within the ball and three radii out, with 95% intervals; right, the "
        "loss on the way there. All at a median confidence of 0.9."
    )

    def arms(self) -> tuple[str, ...]:
        """Arms that the recipe must have."""
        return (self.plain, *self.flat, *self.curved)

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        manifold = self.manifold
        if not isinstance(manifold, IdentityManifold):
            manifold = manifold.fit(trained.splits.train.images)
        arms = {arm: self.on_arm(model, trained, manifold) for arm, model in trained.models.items()}
        found = {
            trained.title(name): Findings([], arm.numbers, {"loss off": arm.losses})
            for name, arm in arms.items()
        }
        return result_of(self, trained, found, self.checks(arms))

    def on_arm(self, model: nn.Module, trained: Trained, manifold: Manifold) -> ArmFindings:
        """Measure flatness and curvature of one arm, and attack it."""
        inputs, labels = trained.test_batch(self.samples, model)
        at = at_head(model, inputs, labels)
        eps, kappa = trained.evaluation.eps, at.kappa()
        try:
            scale = scale_to_confidence(at.logits, CONFIDENCE)
        except ValueError:  # no scale of these logits gets there
            scale, matched = 1.0, torch.full_like(kappa, torch.nan)
        else:
            matched = at.kappa(scale)
        losses, on = losses_off(model, inputs, labels, manifold, eps, scale)
        off = losses[:, 2:] - 2 * losses[:, 1:-1] + losses[:, :-2]  # around 0, 1, ... radii out
        run = trained.evaluate(model, stages_of(self.cascade), self.samples)
        numbers = {
            "kappa": Estimate.mean(kappa),
            "kappa*": Estimate.mean(matched),
            CURVATURE: Estimate.mean(off[:, 0]),
            CURVATURE_OUT: Estimate.mean(off[:, RADII]),
            "curvature on": Estimate.mean(on),
            "attacked accuracy": run.attacked,
        }
        return ArmFindings(numbers, kappa, run, losses[:, 1:].mean(0).tolist())

    def checks(self, arms: dict[str, ArmFindings]) -> list[Check]:
        """All conditions; `arms` by name."""
        plain, checks = arms[self.plain], []
        for name in self.flat:
            difference = Estimate.mean(arms[name].kappa - plain.kappa)
            gain = compare(plain.run, arms[name].run).attacked
            higher = gain.value >= GAIN and gain.p_value < LEVEL
            below = f"{name}: kappa below that of {self.plain}"
            checks.append(Check(FLAT, below, str(difference), difference.high < 0))
            equal = f"{name}: attacked accuracy not {100 * GAIN:g} points higher"
            checks.append(Check(FLAT, equal, str(gain), not higher))
        for name in self.curved:
            gain = compare(plain.run, arms[name].run).attacked
            higher = gain.value >= GAIN and gain.p_value < LEVEL
            criterion = f"{name}: attacked accuracy {100 * GAIN:g} points higher, p < {LEVEL:g}"
            checks.append(Check(OFF, criterion, str(gain), higher))

        def correlation(quantity: str) -> float:
            names = (quantity, "attacked accuracy")
            columns = [[arm.numbers[name].value for arm in arms.values()] for name in names]
            return rank_correlation(*map(torch.tensor, columns))

        near, out, kappa = map(correlation, (CURVATURE, CURVATURE_OUT, "kappa*"))
        return [
            *checks,
            Check(
                CLOSER,
                "attacked accuracy goes with curvature off the manifold more closely",
                f"rank correlation {near:+.2f} against {kappa:+.2f}, {len(arms)} arms",
                abs(near) > (0 if math.isnan(kappa) else abs(kappa)),
            ),
            Check(SHARP, "that rank correlation is positive", f"{near:+.2f}", near > 0),
            Check(
                FURTHER,
                f"rank correlation with the curvature {RADII} radii out is positive",
                f"{out:+.2f}",
                out > 0,
            ),
        ]

    def figure(self, result: ClaimResult) -> Figure:
        """Attacked accuracy against kappa* and two curvatures; the loss off the manifold."""
        figure, (line,) = panels(1, 4, (13.0, 4.0), constrained=True)
        names = {
            "kappa*": "kappa* (larger = sharper)",
            CURVATURE: "second difference off the manifold",
            CURVATURE_OUT: f"the same, {RADII} radii out",
        }
        marks = zip(cycle([*COLORS, INK]), cycle(MARKERS), strict=False)
        styles = dict(zip(result.numbers, marks, strict=False))
        for axes, (name, label) in zip(line, names.items(), strict=False):
            for title, numbers in result.numbers.items():
                x, y, (color, marker) = numbers[name], numbers["attacked accuracy"], styles[title]
                axes.errorbar(
                    [x.value],
                    [100 * y.value],
                    xerr=[[x.value - x.low], [x.high - x.value]],
                    yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
                    fmt=marker,
                    color=color,
                    markersize=6,
                    capsize=2,
                    elinewidth=0.8,
                    label=title.split(", ")[0],
                )
            if min(numbers[name].low for numbers in result.numbers.values()) > 0:
                axes.set_xscale("log")
                low, high = axes.get_xlim()
                if high < 100 * low:
                    plain_ticks(axes.xaxis)
            axes.set(xlabel=label, ylim=(-3, 103))
        line[0].set_ylabel("attacked accuracy, %")
        for title, arrays in result.arrays.items():
            losses, (color, marker) = arrays["loss off"], styles[title]
            line[3].plot(range(len(losses)), losses, color=color, marker=marker, markersize=3)
        line[3].set(xlabel="radii off the manifold", ylabel="mean loss")
        legend_below(figure, line[0])
        return figure


@dataclasses.dataclass(frozen=True, eq=False)
class ArmFindings:
    """What was found on one arm.

    Attributes:
        numbers: by quantity.
        kappa: of every sample `(n,)`.
        run: its evaluation.
        losses: mean loss 0, 1, ..., 8 radii off the manifold.
    """

    numbers: dict[str, Estimate]
    kappa: Tensor
    run: Evaluation
    losses: list[float]


def losses_off(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    manifold: Manifold,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Loss along the way off the manifold, and its second difference on the manifold.

    Args:
        model: images in [0,1] to logits, in the mode it is in.
        inputs: `(n, ...)` in [0,1].
        labels: `(n,)`.
        manifold: fitted.
        eps: radius in [0,1] pixel units.
        scale: of the logits.

    Returns:
        Losses at x + t d for t = -1, 0, ..., 8, `(n, 10)`, which may lie outside the box; second
        difference within the ball along the tangent part of the same sign, `(n,)`.
    """
    losses, on = list[Tensor](), list[Tensor]()
    for x, y in zip(inputs.split(128), labels.split(128), strict=True):

        def loss_at(points: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(scale * model(points), y, reduction="none")

        points = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(points).sum(), points)
        tangent, normal = manifold.split(x, eps * gradient.sign())
        with torch.no_grad():
            steps = range(-1, PROFILE + 1)
            losses.append(torch.stack([loss_at(x + t * normal) for t in steps], 1))
            on.append(second_difference(loss_at, x, tangent, 1.0))
    return torch.cat(losses).cpu(), torch.cat(on).cpu()


if __name__ == "__main__":
    main(BeyondFlatness, __file__, needs=BeyondFlatness.arms)
