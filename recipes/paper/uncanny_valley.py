"""Claim: along an attack the loss sharpens until the label flips, then flattens: the valley.

Relative flatness kappa is followed along PGD on the margin, 40 steps out to `reach` times eps, over
the samples that are right at first and flip on the way. "At the flip" is the larger kappa of the
two points on either side of it. kappa moves with confidence, so each model is judged twice: as it
is, and with its head scaled so that the clean images have a median confidence of 0.9.

Conditions, fixed beforehand. The claim is reproduced on an arm, as it is and at matched confidence
each, if over the paths that flip, at least 20 of them:

- kappa rises: at the flip it is above its clean value on more than half of the paths;
- and falls: at the end it is below its value at the flip on more than half of them, each with the
  whole Wilson interval;
- the largest kappa of a path lies within 3 steps of the flip, in the median.

Whether the end is flatter than the clean image is reported and not judged.

Source: Walter, Adilova, Vreeken, Kamp 2025, arXiv:2510.14231. The valley by that name: the same
authors, "The Uncanny Valley", 2024, arXiv:2405.16918.

    python recipes/paper/uncanny_valley.py [samples=128] [reach=3] [key.path=value ...] [output=DIR]
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import torch
from claim import (
    CONFIDENCE,
    FEWEST,
    STRICT,
    Check,
    ClaimResult,
    Findings,
    Trained,
    main,
    panels_by_arm,
    result_of,
    share_of,
)
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg import Estimate
from flatreg.attacks import pgd
from flatreg.evaluation import AttackPath, aligned_bands, attack_path
from flatreg.report.figures.style import COLORS, INK, log_axis

STEPS, WINDOW = 40, 12  # of the attack; steps drawn on either side of the flip
NEAR = 3  # steps from the flip within which the peak must lie
BANDS = {"as it is": "kappa", "matched": "matched kappa"}  # names in `aligned_bands`


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UncannyValley:
    """Along an attack the loss sharpens until the label flips, then flattens.

    Args:
        samples: how many of the evaluated test images.
        reach: length of the path, in units of eps.
    """

    samples: PositiveInt = 128
    reach: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0

    statement: ClassVar[str] = (
        "Along an attack the loss sharpens until the label flips and then runs into a flat valley "
        "where the model is wrong; adversarial training moves the valley and does not remove it."
    )
    caption: ClassVar[str] = (
        "Kappa along PGD on the margin, aligned at the flip of the label: median and quartiles "
        "over the paths that flip. Dotted: the median at the clean images."
    )

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Follow the attack on one arm."""
        threat = trained.evaluation
        eps = self.reach * threat.eps
        path = attack_path(
            model,
            *trained.test_batch(self.samples, model),
            eps=min(1.0, eps) if threat.norm == "linf" else eps,
            norm=threat.norm,
            attack=partial(pgd, steps=STEPS, step_size=2 / STEPS),
            matched=CONFIDENCE,
        )
        flipped = (path.flip > 0).nonzero().flatten()
        kinds = {"as it is": path.relative_flatness, "matched": path.matched_relative_flatness}
        bands = aligned_bands(path, WINDOW).by_flip
        checks: list[Check] = []
        numbers = {"paths that flip": share_of((path.flip > 0)[path.flip != 0])}
        arrays: dict[str, list[float]] = {}
        for kind, kappa in kinds.items():
            if kappa is None or len(flipped) < FEWEST:
                found = f"{len(flipped)} flip" if kappa is not None else "no scale reaches it"
                criterion = f"{FEWEST} paths that flip, or more"
                checks.append(Check(f"{title}, {kind}", criterion, found, False))
                continue
            clean, top, end = kappa[0, flipped], at_flip(kappa, path, flipped), kappa[-1, flipped]
            peak = kappa[:, flipped].argmax(0) - path.flip[flipped]
            checks += judged(f"{title}, {kind}", clean, top, end, peak)
            numbers |= {
                f"kappa clean, {kind}": Estimate.median(clean),
                f"kappa at the flip, {kind}": Estimate.median(top),
                f"kappa at the end, {kind}": Estimate.median(end),
                f"ends flatter than clean, {kind}": share_of(end < clean),
            }
            for name in ("offsets", "lower", "median", "upper"):
                values = getattr(bands[BANDS[kind]], name)
                arrays[f"{kind}.{name}"] = [float(value) for value in values]
        numbers["confidence at the end"] = Estimate.median(path.confidence[-1, flipped])
        return Findings(checks, numbers, arrays)

    def figure(self, result: ClaimResult) -> Figure:
        """Kappa along the attack, aligned at the flip, a column for each arm."""
        figure, panels = panels_by_arm(result, rows=2, width=2.1, height=4.8, sharey=False)
        kinds = {"as it is": COLORS[4], "matched": COLORS[5]}
        for column, (title, arm) in zip(panels.T, result.arrays.items(), strict=True):
            for axes, (kind, color) in zip(column, kinds.items(), strict=True):
                if f"{kind}.median" in arm:
                    at, lower, median, upper = (
                        arm[f"{kind}.{name}"] for name in ("offsets", "lower", "median", "upper")
                    )
                    axes.fill_between(at, lower, upper, color=color, alpha=0.18, linewidth=0)
                    axes.plot(at, median, color=color)
                    clean = result.numbers[title][f"kappa clean, {kind}"].value
                    axes.axhline(clean, color=COLORS[0], linewidth=0.9, linestyle=":")
                holds = result.subjects().get(f"{title}, {kind}", False)
                verdict, ink = ("reproduced", INK) if holds else ("not reproduced", COLORS[4])
                place = axes.transAxes
                axes.text(0.97, 0.04, verdict, fontsize=8, ha="right", transform=place, color=ink)
                axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
                axes.tick_params(labelsize=8)
                log_axis(axes)
            column[1].set_xlabel("steps from the flip")
        panels[0, 0].set_ylabel("kappa\n(larger = sharper)")
        panels[1, 0].set_ylabel("kappa at matched\nconfidence\n(larger = sharper)")
        return figure


def at_flip(kappa: Tensor, path: AttackPath, flipped: Tensor) -> Tensor:
    """The larger of the two points between which the label flips."""
    rows = path.flip[flipped]
    return torch.maximum(kappa[rows - 1, flipped], kappa[rows, flipped])


def judged(subject: str, clean: Tensor, top: Tensor, end: Tensor, peak: Tensor) -> list[Check]:
    """The three conditions on kappa at the clean image, the flip and the end of every path.

    `peak` is the step of the largest kappa, counted from the flip.
    """
    rises, falls, median = share_of(top > clean), share_of(end < top), Estimate.median(peak)
    return [
        Check(subject, "rises to the flip on more than half", str(rises), rises.low > 0.5),
        Check(subject, "falls beyond it on more than half", str(falls), falls.low > 0.5),
        Check(
            subject,
            f"peaks within {NEAR} steps of it, median",
            f"{median} steps",
            abs(median.value) <= NEAR,
        ),
    ]


if __name__ == "__main__":
    main(UncannyValley, __file__)
