"""What a report holds: a row an arm."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass

from flatreg.evaluation.adaptive import AdaptiveAttackCheck
from flatreg.evaluation.compare import Comparison
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import QuantileBand
from flatreg.report.input_curvature import InputCurvature
from flatreg.run.checkpoints import Epoch

SCHEMA = 4


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: of the arm.
        model: its timm model, as in a recipe.
        criterion, penalties, wrapper: what it was trained with.
        evaluation: clean and attacked accuracy.
        comparison: with the plain twin on the same samples, if there is one of the same model.
        scrutiny: of the survivors, where the recipe asks for it; never of the plain twin.
        model_info: RobustBench's keys.
        relative_flatness: kappa on the evaluated samples by outcome; larger means sharper. Its
            attack is a PGD of 10 steps within the same eps, not the cascade of `evaluation`. None
            where the model has no head that is one linear map.
        input_curvature: of the loss on and off the data manifold; None where it cannot be had.
        seconds_per_epoch: median over the epochs.
        training_seconds: of all epochs, without monitoring and checkpoints.
        time_ratio: `seconds_per_epoch` over the plain twin's in the same run, if there is a twin
            of the same model.
        history: its training.
        path: "kappa", "matched kappa" (at median confidence 0.9, where a scale reaches it),
            "confidence" and "loss" along attack paths, aligned at the flip.
        path_samples: how many paths flip.
        path_by_step: the same by step, over all paths, whether they flip or not.
    """

    name: str
    model: dict[str, Any]
    criterion: dict[str, Any]
    penalties: list[dict[str, Any]]
    wrapper: dict[str, Any] | None
    evaluation: Evaluation
    comparison: Comparison | None
    adaptive_check: Annotated[
        AdaptiveAttackCheck | None,
        Field(validation_alias=AliasChoices("adaptive_check", "scrutiny")),
    ]
    model_info: dict[str, Any]
    relative_flatness: FlatnessByOutcome | None
    input_curvature: InputCurvature | None
    seconds_per_epoch: float
    training_seconds: float
    time_ratio: float | None
    history: list[Epoch]
    path: dict[str, QuantileBand]
    path_samples: int
    path_by_step: dict[str, QuantileBand] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the arm; of the recipe's own, `flatreg`, its penalties and wrapper."""
        parts = [*self.penalties, *([self.wrapper] if self.wrapper else [])]
        kinds = " + ".join(part["kind"] for part in parts)
        return kinds if self.name == "flatreg" and kinds else self.name


@dataclass(frozen=True)
class Report:
    """All arms of a recipe; `schema` is raised when a field changes its meaning."""

    schema: int
    recipe: dict[str, Any]
    rows: list[Row]
