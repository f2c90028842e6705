"""What is known of every sample, and the result that it sums up to."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
from torch import Tensor

from flatreg.attacks.cascade import describe
from flatreg.attacks.spot_check import checked_samples
from flatreg.data.sharing import gather
from flatreg.evaluation.evaluator import Request
from flatreg.evaluation.findings import Checks, chance_finding, joined, masking_findings
from flatreg.evaluation.results import CurvePoint, Evaluation, OtherThreat, Stage, versions
from flatreg.measures.estimate import Estimate
from flatreg.threat import Threat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleResults:
    """What is known of some samples; every tensor is on the CPU, its last dimension the samples.

    Attributes:
        index: in the dataset `(n,)`.
        label: true class `(n,)`.
        digest: hash of image and label, the image in 256 levels `(n,)`.
        prediction, margin, kappa: at the clean image `(n,)`.
        attacked_prediction, attacked_margin, attacked_kappa: at the attacked one, as in
            `Evaluation` `(n,)`; nan where there is none.
        verdicts: as in `Evaluation`, a row for each threat `(threats, n)`.
        survives: booleans, a row for each eps of the curve `(eps, n)`.
        checks: of the samples that were checked for masked gradients, fewer than n.
        images: attacked `(n, ...)`, where they are kept.
    """

    index: Tensor
    label: Tensor
    digest: Tensor
    prediction: Tensor
    margin: Tensor
    kappa: Tensor
    attacked_prediction: Tensor
    attacked_margin: Tensor
    attacked_kappa: Tensor
    verdicts: Tensor
    survives: Tensor
    checks: Checks
    images: Tensor | None

    @classmethod
    def gathered(cls, blocks: list[SampleResults]) -> SampleResults:
        """All blocks of all processes, by rising index; images on the first process only."""
        images = gather({"images": [b.images for b in blocks]}, everyone=False).get("images", [])
        lean = [dataclasses.replace(block, images=None) for block in blocks]
        blocks = gather({"blocks": lean})["blocks"]
        order = torch.cat([block.index for block in blocks]).argsort(stable=True)
        columns = {
            field.name: torch.cat([getattr(block, field.name) for block in blocks], -1)[..., order]
            for field in dataclasses.fields(cls)
            if field.name not in ("checks", "images")
        }
        return cls(
            **columns,
            checks=joined([block.checks for block in blocks]),
            images=torch.cat(images)[order] if images and images[0] is not None else None,
        )


def summarise(
    samples: SampleResults,
    request: Request,
    *,
    classes: int,
    forwards: int,
    backwards: int,
    seconds: float,
) -> Evaluation:
    """Sum up what is known of every sample.

    Args:
        samples: all of them.
        request: what was asked.
        classes: of the model.
        forwards: samples passed forward for the evaluation's own threat.
        backwards: samples passed backward for it.
        seconds: wall-clock.
    """
    n, verdicts = len(samples.index), samples.verdicts.tolist()
    masking = masking_findings(samples.checks)
    masked = any(finding.verdict == "flagged" for finding in masking)
    own, *others = (
        _under(threat, row, masked) for threat, row in zip(request.threats, verdicts, strict=True)
    )
    clean = Estimate.share(sum(v > -2 for v in own.verdicts), n)
    everywhere = int((samples.verdicts == -1).all(0).sum())
    return Evaluation(
        eps=own.eps,
        norm=own.norm,
        n=n,
        clean=clean,
        attacked=own.attacked,
        stages=own.stages,
        curve=[
            CurvePoint(threat.eps, Estimate.share(count, n))
            for threat, count in zip(request.curve, samples.survives.sum(1).tolist(), strict=True)
        ],
        other_threats=others,
        union=Estimate.share(everywhere, n) if others else None,
        findings=[chance_finding(clean, classes), *masking],
        forwards=forwards,
        backwards=backwards,
        seed=request.seed,
        seconds=seconds,
        versions=versions(),
        indices=samples.index.tolist(),
        labels=samples.label.tolist(),
        verdicts=own.verdicts,
        predictions=samples.prediction.tolist(),
        margins=samples.margin.tolist(),
        kappas=_known(samples.kappa),
        attacked_predictions=samples.attacked_prediction.tolist(),
        attacked_margins=_known(samples.attacked_margin),
        attacked_kappas=_known(samples.attacked_kappa),
        expected=_expected(samples, request),
        samples_digest=hashlib.sha256(samples.digest.numpy().tobytes()).hexdigest(),
    )


def _expected(samples: SampleResults, request: Request) -> Estimate | None:
    """Attacked accuracy at a radius uniform in [0, eps]: `Evaluation.expected`."""
    verdicts, eps = samples.verdicts[0], request.threat.eps
    below = [number for number, threat in enumerate(request.curve) if threat.eps < eps]
    if not below:
        return None
    radii = [0.0, *(request.curve[number].eps for number in below), eps]
    at = torch.tensor(radii, dtype=torch.float64)  # a caller's default may be half precision
    survives = torch.stack([verdicts > -2, *samples.survives[below], verdicts == -1])
    shares = torch.trapezoid(survives.double(), at, dim=0) / eps
    return Estimate.mean(shares)


def _under(threat: Threat, verdicts: list[int], masked: bool) -> OtherThreat:
    """Accuracy under a threat, and after each of its attacks."""
    n = len(verdicts)
    stages = [
        Stage(
            describe(attack),
            Estimate.share(sum(v == -1 or v > number for v in verdicts), n),
            checked_samples(attack, verdicts.count(-1), verdicts.count(number), masked),
        )
        for number, attack in enumerate(threat.attacks)
    ]
    attacked = Estimate.share(verdicts.count(-1), n)
    return OtherThreat(threat.norm, threat.eps, attacked, stages, verdicts)


def _known(values: Tensor) -> list[float | None]:
    """None for what was not measured: JSON has no nan."""
    return [None if math.isnan(value) else value for value in values.tolist()]
