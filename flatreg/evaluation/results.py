"""Results of an evaluation: counts with their intervals, and how they read."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Annotated

import torch
from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from flatreg.evaluation.findings import Finding
from flatreg.measures.estimate import Estimate


@dataclass(frozen=True)
class Stage:
    """What a stage of the cascade left: accuracy after it."""

    attack: str
    accuracy: Estimate


@dataclass(frozen=True)
class CurvePoint:
    """Attacked accuracy at another eps."""

    eps: float
    accuracy: Estimate


@dataclass(frozen=True)
class OtherThreat:
    """Attacked accuracy under a threat the model was not trained for, same cascade.

    Attributes:
        norm, eps: the ball.
        attacked: accuracy under the cascade in it.
        stages: accuracy after each stage.
        verdicts: per sample, as in `Evaluation`.
    """

    norm: str
    eps: float
    attacked: Estimate
    stages: list[Stage]
    verdicts: list[int]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    The columns have one entry a sample, in the order of `indices`. "Attacked" is the image that
    fooled the model, or the last one tried.

    Attributes:
        eps: radius in [0,1] pixel units.
        norm: of the ball.
        n: samples evaluated.
        clean: accuracy on the images as they are.
        attacked: accuracy under the cascade: an upper bound on robust accuracy.
        stages: accuracy after each stage, in order.
        curve: attacked accuracy at other eps; monotone, because a sample fooled within a ball is
            fooled within every larger one.
        other_threats: attacked accuracy under other threats.
        union: accuracy under all threats at once, where others were asked for.
        findings: signs that the number flatters the model.
        forwards: samples passed forward for `attacked`: clean pass, cascade and re-scoring.
        backwards: samples passed backward for it.
        seed: of the subset and the random starts.
        seconds: wall-clock.
        versions: of what computed it.
        indices: dataset index.
        labels: true class.
        verdicts: -2 wrong when clean, -1 survived, else the stage that fooled it.
        predictions: class of the clean image.
        margins: z_y - max_{s != y} z_s of the clean image.
        kappas: relative flatness of the last layer at the clean image, larger means sharper; None
            where the model has no head that is one linear map.
        attacked_predictions, attacked_margins, attacked_kappas: the same at the attacked image;
            where the clean image was wrong already, its prediction and None.
    """

    eps: float
    norm: str
    n: int
    clean: Estimate
    attacked: Estimate
    stages: list[Stage]
    curve: list[CurvePoint]
    other_threats: Annotated[
        list[OtherThreat], Field(validation_alias=AliasChoices("other_threats", "unseen"))
    ]
    union: Estimate | None
    findings: list[Finding]
    forwards: int
    backwards: int
    seed: int
    seconds: float
    versions: dict[str, str]
    indices: list[int]
    labels: list[int]
    verdicts: list[int]
    predictions: list[int]
    margins: list[float]
    kappas: list[float | None]
    attacked_predictions: list[int]
    attacked_margins: list[float | None]
    attacked_kappas: list[float | None]

    def __str__(self) -> str:
        lines = [
            f"{self.norm} eps {self.eps:.4g}, n = {self.n}, seed {self.seed}; "
            "attacked accuracy is an upper bound on robust accuracy",
            f"  clean                {self.clean}",
            *(f"  after {stage.attack:<58} {stage.accuracy}" for stage in self.stages),
            f"  attacked             {self.attacked}",
            *(f"  {u.norm} eps {u.eps:<12.4g} {u.attacked}" for u in self.other_threats),
            *([f"  under all of these   {self.union}"] if self.union else []),
            f"  passes per image     {self.forwards / self.n:.1f} forward, "
            f"{self.backwards / self.n:.1f} backward",
            *(
                f"  finding {f.verdict:<8} {f.name}: {f.value:.2f} (threshold {f.threshold:.2f})"
                for f in self.findings
            ),
        ]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of what computes: Python, torch, timm, accelerate, flatreg."""
    packages = {name: version(name) for name in ("timm", "accelerate", "flatreg")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}
