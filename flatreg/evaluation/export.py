"""Write an evaluation down: JSON, CSV, the attacked images; and RobustBench's keys."""

from __future__ import annotations

import csv
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flatreg.data.files import read_json, save_whole, write_json, write_whole
from flatreg.evaluation.results import Evaluation

_EVALUATION = TypeAdapter(Evaluation)


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
    """The keys of RobustBench's `model_info`, and what they leave open.

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
    """One line a sample: what it was, what it became, and which stage fooled it."""
    names = {-2: "wrong when clean", -1: "survived"}
    names |= {number: stage.attack for number, stage in enumerate(result.stages)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "index",
            "label",
            "prediction",
            "attacked_prediction",
            "margin",
            "attacked_margin",
            "kappa",
            "attacked_kappa",
            "fooled_by",
        ]
    )
    writer.writerows(
        zip(
            result.indices,
            result.labels,
            result.predictions,
            result.attacked_predictions,
            result.margins,
            result.attacked_margins,
            result.kappas,
            result.attacked_kappas,
            (names[verdict] for verdict in result.verdicts),
            strict=True,
        )
    )
    return text.getvalue()


def write_evaluation(result: Evaluation, folder: Path, images: Tensor | None = None) -> None:
    """Write `evaluation.json`, `samples.csv` and, where given, `adversarial.safetensors`.

    Each is replaced whole or not at all. The last has `inputs` and `index`: anyone can score them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", result, _EVALUATION)
    write_whole(folder / "samples.csv", samples_csv(result))
    if images is not None:
        index = torch.tensor(result.indices)
        save_whole(folder / "adversarial.safetensors", {"inputs": images, "index": index})


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json` back.

    Raises:
        ValueError: it is no evaluation.
        OSError: there is none.
    """
    return read_json(folder / "evaluation.json", _EVALUATION, what="an evaluation")
