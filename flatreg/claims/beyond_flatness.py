r"""Claim: what counts under attack is not kappa, but how the loss curves off the data manifold.

Arms trained for flatness, arms trained for little curvature off the manifold and their controls are
compared with a plain arm: relative flatness, attacked accuracy, and the curvature of the loss in
the input on either side of a manifold fitted to the training images, at the scale of the ball,

.. math:: \ell(x + d) - 2 \ell(x) + \ell(x - d), \qquad d = \epsilon\, P \operatorname{sign} g,

g the gradient of the loss, P the projector off the manifold, or onto it: the numbers that
`OffManifoldCurvature` penalises. Off the manifold the same is taken further out, around x + t d.
All of it moves with the scale of the logits, so every model is taken at a median confidence of 0.9,
where kappa is called kappa*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass as record
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.claims.at_head import pass_to_head
from flatreg.claims.cascade import Cascade, evaluated, stages_of
from flatreg.claims.result import (
    Check,
    ClaimResult,
    Findings,
    Trained,
    rank_correlation,
    result_of,
)
from flatreg.evaluation.compare import PairedDifference, compare
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.measures.input_curvature import second_difference
from flatreg.measures.manifold import Manifold, PCAManifold
from flatreg.measures.relative_flatness import matching_scale
from flatreg.models.precision import at_least_float32, cross_entropy
from flatreg.terms.protocol import CONFIG, Count

_AT_ONCE = 128
RISE, LEVEL = 0.1, 0.05  # of attacked accuracy over the plain arm's, and McNemar's p
FLAT, OFF = "kappa alone", "off the manifold"
CLOSER, SHARP = "closer than kappa*", "the sharper off the manifold, the better"
FURTHER, RADII = "the sharper further out, the better", 3
_PROFILE = 8  # radii out to which the figure shows the loss


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BeyondFlatness:
    """Not kappa alone, but how the loss curves off the data manifold counts under attack.

    Five parts, each judged by itself:

    - kappa alone: every arm in `flat` has a lower kappa than the plain one (mean difference on the
      same images, with its 95% interval), and an attacked accuracy that is not 10 points higher
      with p < 0.05 (McNemar);
    - off the manifold: every arm in `curved` has an attacked accuracy higher by 10 points at least,
      p < 0.05;
    - closer than kappa*: over all arms attacked accuracy goes with the curvature off the manifold
      more closely than with kappa* (absolute rank correlation);
    - the sharper off the manifold, the better: that rank correlation is positive. The paper says
      that for robustness beyond a neighbourhood the loss must curve sharply away from the data;
      this is the plainest reading of it, at the scale of the ball;
    - the sharper further out, the better: the rank correlation of attacked accuracy with the
      curvature three radii off the manifold is positive, which reads it beyond the ball.

    Args:
        plain: arm that the others are compared with.
        flat: arms trained for flatness alone.
        curved: arms trained against curvature off the manifold.
        manifold: that the curvature is measured on.
        cascade: "short" (PGD-10 on the margin, APGD-20 on rescaled cross-entropy, APGD-10 on DLR at
            9 targets) or a preset of `flatreg.evaluate`.
        samples: how many of the evaluated ones.
    """

    plain: str = "plain"
    flat: Annotated[tuple[str, ...], Field(min_length=1)]
    curved: Annotated[tuple[str, ...], Field(min_length=1)]
    manifold: Manifold = Field(default_factory=partial(PCAManifold, rank=32))
    cascade: Cascade = "short"
    samples: Count = 150
    kind: Literal["BeyondFlatness"] = "BeyondFlatness"

    @property
    def named(self) -> tuple[str, ...]:
        """Arms that there must be."""
        return (self.plain, *self.flat, *self.curved)

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        fit = getattr(self.manifold, "fit", None)
        manifold = fit(trained.splits.train.images) if fit else self.manifold
        arms = {title: self._on_arm(model, trained, manifold) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Lower kappa alone does not raise attacked accuracy; controlling how the loss curves "
            "off the data manifold does.",
            trained,
            self.samples,
            {t: Findings([], arm.numbers, {"loss off": arm.losses}) for t, arm in arms.items()},
            self._checks({name: arms[trained.title(name)] for name in trained.models}),
        )

    def _on_arm(self, model: nn.Module, trained: Trained, manifold: Manifold) -> _Arm:
        inputs, labels = trained.test_batch(self.samples, model)
        at = pass_to_head(model, inputs, labels)
        scale = matching_scale(at.logits, CONFIDENCE)
        losses, on = losses_off(model, inputs, labels, manifold, trained.threat.eps, scale or 1.0)
        bends = losses[:, 2:] - 2 * losses[:, 1:-1] + losses[:, :-2]  # around 0, 1, ... radii out
        run = evaluated(model, stages_of(self.cascade), trained, self.samples)
        numbers = {
            "kappa": Estimate.mean(at.kappa()),
            "kappa*": Estimate.mean(at.kappa(scale or float("nan"))),
            "curvature off": Estimate.mean(bends[:, 0]),
            f"curvature off, {RADII} radii out": Estimate.mean(bends[:, RADII]),
            "curvature on": Estimate.mean(on),
            "attacked accuracy": run.attacked,
        }
        return _Arm(numbers, at.kappa(), run, losses[:, 1:].mean(0).tolist())

    def _checks(self, arms: dict[str, _Arm]) -> list[Check]:
        plain, checks = arms[self.plain], []
        for name in self.flat:
            fall = Estimate.mean(arms[name].kappa - plain.kappa)
            rise = compare(plain.run, arms[name].run).attacked
            checks += [
                Check(FLAT, f"{name}: kappa below that of {self.plain}", str(fall), fall.high < 0),
                Check(
                    FLAT,
                    f"{name}: attacked accuracy not {100 * RISE:g} points higher",
                    str(rise),
                    not _rises(rise),
                ),
            ]
        for name in self.curved:
            rise = compare(plain.run, arms[name].run).attacked
            criterion = f"{name}: attacked accuracy {100 * RISE:g} points higher, p < {LEVEL:g}"
            checks.append(Check(OFF, criterion, str(rise), _rises(rise)))
        names = (
            "attacked accuracy",
            "curvature off",
            f"curvature off, {RADII} radii out",
            "kappa*",
        )
        attacked, curvature, further, kappa = (
            torch.tensor([arm.numbers[name].value for arm in arms.values()]) for name in names
        )
        out = rank_correlation(further, attacked)
        with_curvature = rank_correlation(curvature, attacked)
        with_kappa = rank_correlation(kappa, attacked)
        return [
            *checks,
            Check(
                CLOSER,
                "attacked accuracy goes with curvature off the manifold more closely",
                f"rank correlation {with_curvature:+.2f} against {with_kappa:+.2f}, "
                f"{len(arms)} arms",
                abs(with_curvature) > (0 if math.isnan(with_kappa) else abs(with_kappa)),
            ),
            Check(
                SHARP,
                "that rank correlation is positive",
                f"{with_curvature:+.2f}",
                with_curvature > 0,
            ),
            Check(
                FURTHER,
                f"rank correlation with the curvature {RADII} radii out is positive",
                f"{out:+.2f}",
                out > 0,
            ),
        ]


@record(frozen=True, eq=False)
class _Arm:
    """Numbers of an arm, kappa of its samples, its evaluation, mean losses off the manifold."""

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
    for x, y in zip(torch.split(inputs, _AT_ONCE), torch.split(labels, _AT_ONCE), strict=True):
        loss_at = partial(_loss, model, y, scale)
        points = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_at(points).sum(), points)
        tangent, normal = manifold.split(x, eps * gradient.sign())
        with torch.no_grad():
            steps = range(-1, _PROFILE + 1)
            losses.append(torch.stack([loss_at(x + t * normal) for t in steps], 1))
            on.append(second_difference(loss_at, x, tangent, 1.0))
    return torch.cat(losses).cpu(), torch.cat(on).cpu()


def _loss(model: nn.Module, labels: Tensor, scale: float, inputs: Tensor) -> Tensor:
    return cross_entropy(scale * at_least_float32(model(inputs)), labels)


def _rises(gain: PairedDifference) -> bool:
    return gain.value >= RISE and gain.p_value < LEVEL
