"""Results of an evaluation: with their intervals, in words and on disk."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.attacks.spot_check import SpotChecked
from flatreg.data.files import AGAIN, read_json, save_whole, write_json, write_whole
from flatreg.evaluation.findings import Finding
from flatreg.measures.estimate import Estimate


@dataclass(frozen=True)
class Stage:
    """Accuracy after a stage of the cascade; `spot_check` says whom it attacked, if it was one."""

    attack: str
    accuracy: Estimate
    spot_check: SpotChecked | None = None


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
        findings: signs that the setup is broken, or that the attacked accuracy is too high.
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
        waiting_seconds: of `seconds`, waiting for images; of several processes the most.
        expected: expected robustness: attacked accuracy at a radius that is uniform in [0, eps], by
            the trapezoid rule over 0 (clean), the radii of the curve below eps, and eps. None where
            the curve has none below eps. The mean over samples of the part of the radii that each
            survives, in [0, 1] (https://arxiv.org/abs/2509.23325).
        samples_digest: SHA-256 of the images, in 256 levels, and of the labels, in the order of
            `indices`. None leaves out the check of `compare` that the images are the same.
    """

    eps: float
    norm: str
    n: int
    clean: Estimate
    attacked: Estimate
    stages: list[Stage]
    curve: list[CurvePoint]
    other_threats: list[OtherThreat]
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
    waiting_seconds: float = 0.0
    expected: Estimate | None = None
    samples_digest: str | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.norm} eps {self.eps:.4g}, n = {self.n}, seed {self.seed}; "
            "attacked accuracy is an upper bound on robust accuracy",
            f"  clean                {self.clean}",
            *(f"  after {stage.attack:<58} {stage.accuracy}" for stage in self.stages),
            *(f"  the last stage {stage.spot_check}" for stage in self.stages if stage.spot_check),
            f"  attacked             {self.attacked}",
            *(f"  at eps {point.eps:<13.4g} {point.accuracy}" for point in self.curve),
            *([f"  expected, 0 to eps   {self.expected}"] if self.expected else []),
            *(line for other in self.other_threats for line in _lines(other)),
            *([f"  under all of these   {self.union}"] if self.union else []),
            f"  passes per image     {self.forwards / self.n:.1f} forward, "
            f"{self.backwards / self.n:.1f} backward",
            f"  waited for images    {self.waiting_seconds:.1f} of {self.seconds:.1f} s",
        ]
        for f in self.findings:
            limit = f"{f.value:.2f} (threshold {f.threshold:.2f})"
            meaning = f"; {f.meaning}" if f.verdict == "flagged" else ""
            lines.append(f"  finding {f.verdict:<8} {f.name}: {limit}{meaning}")
        return "\n".join(lines)


def _lines(other: OtherThreat) -> list[str]:
    """What is printed of another threat."""
    checks = [stage.spot_check for stage in other.stages if stage.spot_check]
    return [
        f"  {other.norm} eps {other.eps:<12.4g} {other.attacked}",
        *(f"    the last stage {check}" for check in checks),
    ]


def spot_checks(
    result: Evaluation,
) -> list[tuple[Evaluation | OtherThreat, str, SpotChecked]]:
    """Threat, attack and outcome of every spot check, those under other threats too."""
    threats: list[Evaluation | OtherThreat] = [result, *result.other_threats]
    return [
        (threat, stage.attack, stage.spot_check)
        for threat in threats
        for stage in threat.stages
        if stage.spot_check is not None
    ]


def versions() -> dict[str, str]:
    """Versions of what computes: Python, torch, timm, accelerate, flatreg."""
    packages = {name: version(name) for name in ("timm", "accelerate", "flatreg")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def model_info(
    result: Evaluation,
    *,
    name: str,
    architecture: str,
    dataset: str,
    link: str = "",
    authors: str = "",
    venue: str = "",
    additional_data: bool = False,
) -> dict[str, Any]:
    """The keys of RobustBench's `model_info`, and what these do not say.

    `autoattack_acc` is attacked accuracy under the cascade named in `attack`, which is not
    AutoAttack's code; `reported` is the same number. Accuracies are percent with two decimals;
    `unreliable` says whether a finding is flagged.

    Args:
        result: of `evaluate`.
        name: of the model.
        architecture: of the model, as timm calls it.
        dataset: it was evaluated on.
        link: where it is published.
        authors: of the publication.
        venue: of the publication.
        additional_data: whether it was trained on more than the dataset's training split.
    """
    attacked = f"{100 * result.attacked.value:.2f}"
    grey = Fraction(result.eps * 255).limit_denominator(1000)
    exact = result.norm == "linf" and abs(float(grey) / 255 - result.eps) < 1e-9
    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": f"{grey}/255" if exact and grey.denominator == 1 else f"{result.eps:g}",
        "clean_acc": f"{100 * result.clean.value:.2f}",
        "reported": attacked,
        "autoattack_acc": attacked,
        "unreliable": any(finding.verdict == "flagged" for finding in result.findings),
        "norm": result.norm,
        "attack": [stage.attack for stage in result.stages],
        "n": result.n,
        "interval": [f"{100 * end:.2f}" for end in (result.attacked.low, result.attacked.high)],
    }


def samples_csv(result: Evaluation) -> str:
    """One line a sample: clean and attacked prediction, margin and kappa; which stage fooled it."""
    names = {-2: "wrong when clean", -1: "survived"}
    names |= {number: stage.attack for number, stage in enumerate(result.stages)}
    columns: dict[str, Sequence[Any]] = {
        "index": result.indices,
        "label": result.labels,
        "prediction": result.predictions,
        "attacked_prediction": result.attacked_predictions,
        "margin": result.margins,
        "attacked_margin": result.attacked_margins,
        "kappa": result.kappas,
        "attacked_kappa": result.attacked_kappas,
        "fooled_by": [names[verdict] for verdict in result.verdicts],
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def write_evaluation(result: Evaluation, folder: str | Path, images: Tensor | None = None) -> None:
    """Write `evaluation.json`, `samples.csv` and, where given, `adversarial.safetensors`.

    Each is replaced whole or not at all. The last has `inputs` and `index`: anyone can score them.
    Its metadata has the `identity` of the result. Without `images`, those of an earlier evaluation
    are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", result, TypeAdapter(Evaluation))
    write_whole(folder / "samples.csv", samples_csv(result))
    kept = folder / "adversarial.safetensors"
    if images is None:
        kept.unlink(missing_ok=True)
        return
    tensors = {"inputs": images, "index": torch.tensor(result.indices)}
    save_whole(kept, tensors, {"evaluation": identity(result)})


def identity(result: Evaluation) -> str:
    """SHA-256 of threat, cascade, seed, indices and verdicts: says of which result images are."""
    stages = [stage.attack for stage in result.stages]
    parts = [result.norm, result.eps, stages, result.seed, result.indices, result.verdicts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read `evaluation.json` back.

    Raises:
        ValueError: it is no evaluation; `folder` is a file.
        OSError: there is none.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: expected the folder, got a file in it: give {folder.parent}")
    file = folder / "evaluation.json"
    result = read_json(file, TypeAdapter(Evaluation), what="an evaluation")
    if (damage := _damage(result)) is not None:
        raise ValueError(f"{file}: not an evaluation: {damage}{AGAIN}")
    return result


def _damage(result: Evaluation) -> str | None:
    """Why its columns cannot be those of `evaluate`: the first reason."""
    if result.n < 1:
        return f"expected n from 1, got {result.n}"
    names = "indices labels predictions margins kappas attacked_predictions attacked_margins"
    columns = {name: getattr(result, name) for name in [*names.split(), "attacked_kappas"]}
    under: dict[str, Evaluation | OtherThreat] = {"verdicts": result}
    under |= {f"verdicts under {other.norm}": other for other in result.other_threats}
    columns |= {name: threat.verdicts for name, threat in under.items()}
    for name, values in columns.items():
        if len(values) != result.n:
            return f"expected {result.n} {name}, one a sample, got {len(values)}"
    for name, threat in under.items():
        last = len(threat.stages) - 1
        if not all(-2 <= verdict <= last for verdict in threat.verdicts):
            return f"expected {name} from -2 to {last}, got others"
        if threat.attacked.value != threat.verdicts.count(-1) / result.n:
            return f"the attacked accuracy is not that of its {name}"
    if len(set(result.indices)) < result.n:
        return "an index stands twice"
    return None
