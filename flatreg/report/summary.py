"""What `--json` prints: the numbers of a report, a table or a sweep, without their series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from flatreg.data.sources import source_name
from flatreg.evaluation.results import spot_checks
from flatreg.measures.estimate import Estimate
from flatreg.report.rows import Report, Row
from flatreg.report.sections import Section

if TYPE_CHECKING:
    from flatreg.run.sweep import Sweep

_ESTIMATE = TypeAdapter(Estimate)


def of_report(report: Report) -> dict[str, Any]:
    """Data, network, threat and cascade once, and the numbers of each arm."""
    first, recipe = report.rows[0].evaluation, report.recipe
    return {
        "data": source_name(recipe["data"]),
        "split": recipe.get("split", "test"),
        "seed": recipe["seed"],
        "epochs": recipe["epochs"],
        "norm": first.norm,
        "eps": first.eps,
        "n": first.n,
        "attacks": [stage.attack for stage in first.stages],
        "arms": [_of_row(row) for row in report.rows],
    }


def of_sections(sections: Sequence[Section]) -> dict[str, Any]:
    """The numbers of each arm of each run, by section of the table."""
    return {
        "sections": [
            {
                "title": section.title,
                "attacks": [stage.attack for stage in section.evaluation.stages],
                "arms": [
                    {"row": group.name, "seed": seed} | _of_row(row)
                    for group in section.groups
                    for seed, row in zip(group.seeds, group.rows, strict=True)
                ],
            }
            for section in sections
        ]
    }


def of_sweep(result: Sweep) -> dict[str, Any]:
    """The accuracies of each value, and the best of them."""
    return {
        "key": result.key,
        "arm": result.arm,
        "best": result.best,
        "tied": result.tied,
        "trials": [
            {
                "value": trial.value,
                "clean": _estimate(trial.evaluation.clean if trial.evaluation else None),
                "attacked": _estimate(trial.evaluation.attacked if trial.evaluation else None),
                "seconds": trial.seconds,
                "findings": [finding.name for finding in trial.findings],
                "failure": trial.failure,
            }
            for trial in result.trials
        ],
    }


def _of_row(row: Row) -> dict[str, Any]:
    found = row.evaluation
    return {
        "arm": row.name,
        "model": row.model["name"],
        "clean": _estimate(found.clean),
        "attacked": _estimate(found.attacked),
        "after": [_estimate(stage.accuracy) for stage in found.stages],
        "curve": [{"eps": point.eps, **_estimate(point.accuracy)} for point in found.curve],
        "other_threats": [
            {"norm": other.norm, "eps": other.eps, **_estimate(other.attacked)}
            for other in found.other_threats
        ],
        "union": _estimate(found.union),
        "expected": _estimate(found.expected),
        "spot_checks": [
            {"norm": threat.norm, "eps": threat.eps, "attack": attack, **asdict(check)}
            for threat, attack, check in spot_checks(found)
        ],
        "kappa": _estimate(row.kappa()),
        "kappa_matched": _estimate(row.kappa(matched=True)),
        "time_ratio": row.time_ratio,
        "training_seconds": row.training_seconds if row.history else None,
        "evaluation_seconds": found.seconds,
        "evaluation_waiting_seconds": found.waiting_seconds,
        "flagged": [finding.name for finding in row.flagged_findings],
    }


def _estimate(estimate: Estimate | None) -> Any:
    return estimate and _ESTIMATE.dump_python(estimate, mode="json")
