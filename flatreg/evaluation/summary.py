"""From what every process found, sample by sample, to the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flatreg.attacks.cascade import describe
from flatreg.evaluation.evaluator import Threat
from flatreg.evaluation.findings import masking_findings
from flatreg.evaluation.results import CurvePoint, Evaluation, OtherThreat, Stage, versions
from flatreg.measures.estimate import Estimate


def summarise(
    merged: Mapping[str, list[Any]],
    threats: Sequence[Threat],
    grid: Sequence[float],
    seed: int,
    seconds: float,
) -> Evaluation:
    """Judge the columns of all processes.

    Args:
        merged: one entry a sample, in any order: index, label, prediction, margin, kappa, verdict,
            the same attacked, `verdict KEY` of each further threat, `survives EPS` of each point of
            the curve; `evidence.NAME`, one entry a diagnosed sample; forwards, backwards.
        threats: the first is the evaluation's own, the others unseen.
        grid: of the curve.
        seed: of the evaluation.
        seconds: it took.
    """
    order = np.argsort(merged["index"], kind="stable").tolist()
    per_sample = {name: values for name, values in merged.items() if len(values) == len(order)}
    column = {name: [values[i] for i in order] for name, values in per_sample.items()}
    n = len(order)
    verdicts = column["verdict"]
    evidence = {
        name.removeprefix("evidence."): torch.tensor(values)
        for name, values in merged.items()
        if name.startswith("evidence.")
    }
    others = [column[f"verdict {threat.key}"] for threat in threats[1:]]
    everywhere = sum(all(v == -1 for v in row) for row in zip(verdicts, *others, strict=True))
    return Evaluation(
        eps=threats[0].eps,
        norm=threats[0].norm,
        n=n,
        clean=Estimate.share(sum(v > -2 for v in verdicts), n),
        attacked=Estimate.share(verdicts.count(-1), n),
        stages=_stages(threats[0], verdicts),
        curve=[
            CurvePoint(eps, Estimate.share(sum(column[f"survives {eps!r}"]), n)) for eps in grid
        ],
        other_threats=[
            OtherThreat(t.norm, t.eps, Estimate.share(v.count(-1), n), _stages(t, v), v)
            for t, v in zip(threats[1:], others, strict=True)
        ],
        union=Estimate.share(everywhere, n) if others else None,
        findings=masking_findings(evidence) if evidence else [],
        forwards=sum(merged["forwards"]),
        backwards=sum(merged["backwards"]),
        seed=seed,
        seconds=seconds,
        versions=versions(),
        indices=column["index"],
        labels=column["label"],
        verdicts=verdicts,
        predictions=column["prediction"],
        margins=column["margin"],
        kappas=_known(column["kappa"]),
        attacked_predictions=column["attacked_prediction"],
        attacked_margins=_known(column["attacked_margin"]),
        attacked_kappas=_known(column["attacked_kappa"]),
    )


def _stages(threat: Threat, verdicts: list[int]) -> list[Stage]:
    """Accuracy after each stage."""
    left = [sum(v == -1 or v > k for v in verdicts) for k in range(len(threat.stages))]
    return [
        Stage(describe(stage), Estimate.share(count, len(verdicts)))
        for stage, count in zip(threat.stages, left, strict=True)
    ]


def _known(values: list[float]) -> list[float | None]:
    """None for what was not measured: JSON has no nan."""
    return [None if math.isnan(value) else value for value in values]
