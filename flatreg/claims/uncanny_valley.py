"""Claim: along an attack the loss sharpens until the label flips, then flattens: the valley.

Relative flatness kappa is followed along PGD on the margin, 40 steps out to `reach` eps, over the
samples that are right at first and flip on the way. "At the flip" is the larger of the two looks
on either side of it. kappa moves with confidence, so each model is judged twice: as it is, and with
its head scaled so that the clean images have a median confidence of 0.9.

The valley by that name: Walter, Adilova, Vreeken, Kamp, "The Uncanny Valley", 2024,
arXiv:2405.16918.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.claims.result import FEWEST, Check, ClaimResult, Findings, Trained, result_of, share_of
from flatreg.evaluation.attack_path import AttackPath, attack_path, bands_by_flip
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.measures.estimate import Estimate
from flatreg.terms.protocol import CONFIG, Count, Number

STEPS, WINDOW = 40, 12
NEAR = 3  # steps from the flip within which the peak must lie


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class UncannyValley:
    """Along an attack the loss sharpens until the label flips, then flattens.

    Reproduced on an arm, as it is and at matched confidence each, if over the paths that flip, 20
    at least:

    - kappa rises: at the flip it is above its clean value on more than half of the paths;
    - and falls: at the end it is below its value at the flip on more than half of them, each with
      the whole Wilson interval;
    - the largest kappa of a path lies within 3 steps of the flip, in the median.

    Whether the end is flatter than the clean image is reported, and not judged.

    Args:
        samples: how many of the evaluated ones.
        reach: how far the path goes, in eps.
    """

    samples: Count = 128
    reach: Annotated[Number, Field(ge=1)] = 2.0
    kind: Literal["UncannyValley"] = "UncannyValley"

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        found = {title: self._on_arm(title, model, trained) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Along an attack the loss sharpens until the label flips and then runs into a flat "
            "valley where the model is wrong; adversarial training moves the valley and does not "
            "remove it.",
            trained,
            self.samples,
            found,
        )

    def _on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        threat = trained.threat
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
        checks: list[Check] = []
        end = Estimate.median(path.confidence[-1, flipped])
        numbers = {"paths that flip": share_of((path.flip > 0)[path.flip != 0])}
        arrays: dict[str, list[float]] = {}
        for kind, kappa in kinds.items():
            if kappa is None or len(flipped) < FEWEST:
                found = f"{len(flipped)} flip" if kappa is not None else "no scale reaches it"
                criterion = f"{FEWEST} paths that flip, or more"
                checks.append(Check(f"{title}, {kind}", criterion, found, False))
                continue
            checks += _checks(f"{title}, {kind}", kappa, path, flipped)
            numbers |= {f"{name}, {kind}": n for name, n in _numbers(kappa, path, flipped).items()}
            band = bands_by_flip(path, kappa, WINDOW)
            for name in ("offsets", "lower", "median", "upper"):
                arrays[f"{kind}.{name}"] = [float(value) for value in getattr(band, name)]
        return Findings(checks, numbers | {"confidence at the end": end}, arrays)


def _at_flip(kappa: Tensor, path: AttackPath, flipped: Tensor) -> Tensor:
    """The larger of the two looks between which the label flips."""
    rows = path.flip[flipped]
    return torch.maximum(kappa[rows - 1, flipped], kappa[rows, flipped])


def _checks(subject: str, kappa: Tensor, path: AttackPath, flipped: Tensor) -> list[Check]:
    top = _at_flip(kappa, path, flipped)
    rises = share_of(top > kappa[0, flipped])
    falls = share_of(kappa[-1, flipped] < top)
    peak = Estimate.median((kappa[:, flipped].argmax(0) - path.flip[flipped]).double())
    return [
        Check(subject, "rises to the flip on more than half", str(rises), rises.low > 0.5),
        Check(subject, "falls beyond it on more than half", str(falls), falls.low > 0.5),
        Check(
            subject,
            f"peaks within {NEAR} steps of it, median",
            f"{peak} steps",
            abs(peak.value) <= NEAR,
        ),
    ]


def _numbers(kappa: Tensor, path: AttackPath, flipped: Tensor) -> dict[str, Estimate]:
    clean, end = kappa[0, flipped], kappa[-1, flipped]
    return {
        "kappa clean": Estimate.median(clean),
        "kappa at the flip": Estimate.median(_at_flip(kappa, path, flipped)),
        "kappa at the end": Estimate.median(end),
        "ends flatter than clean": share_of(end < clean),
    }
