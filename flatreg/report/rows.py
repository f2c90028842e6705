"""What a report holds, a row an arm; `report.json`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as record
from typing_extensions import TypedDict

from flatreg.data.configuration import first_mistake
from flatreg.data.files import read_json, write_json
from flatreg.data.sources import source_name
from flatreg.evaluation.adaptive import AdaptiveAttackCheck
from flatreg.evaluation.compare import Comparison
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import FlatnessByOutcome
from flatreg.evaluation.geometry.input_curvature import InputCurvature
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate, QuantileBand
from flatreg.run.checkpoints import Epoch, flagged

SCHEMA = 4


@record(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: of the arm.
        model: its timm model, as in a recipe.
        criterion, penalties, wrapper: what it was trained with.
        comparison: with the plain arm on the same samples, if there is one of the same model.
        adaptive_check: of the survivors, where the recipe asks for it; never of the plain arm.
        model_info: RobustBench's keys.
        relative_flatness: kappa on the evaluated samples by outcome; larger means sharper. Its
            attack is a PGD of 10 steps within the same eps, not the cascade of `evaluation`. None
            where the model has no head that is one linear map.
        input_curvature: None where it cannot be measured.
        seconds_per_epoch: median over the epochs; None where the model was trained elsewhere.
        training_seconds: of all epochs, without monitoring and checkpoints.
        time_ratio: `seconds_per_epoch` over the plain arm's in the same run, if there is a plain
            arm of the same model.
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
    adaptive_check: AdaptiveAttackCheck | None
    model_info: dict[str, Any]
    relative_flatness: FlatnessByOutcome | None
    input_curvature: InputCurvature | None
    seconds_per_epoch: float | None
    training_seconds: float
    time_ratio: float | None
    history: list[Epoch]
    path: dict[str, QuantileBand]
    path_samples: int
    path_by_step: dict[str, QuantileBand] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the arm; of the recipe's own, `flatreg`, its penalties and wrapper."""
        kinds = " + ".join(part["kind"] for part in self.added)
        return kinds if self.name == "flatreg" and kinds else self.name

    @property
    def added(self) -> list[dict[str, Any]]:
        """Its penalties and its wrapper."""
        return [*self.penalties, *([self.wrapper] if self.wrapper else [])]

    @property
    def cost(self) -> float | None:
        """Training time in epochs of the plain arm, so that arms of unlike length compare.

        None where the run has no plain arm of the same model.
        """
        if self.time_ratio is None or not self.seconds_per_epoch:
            return None
        return self.training_seconds * self.time_ratio / self.seconds_per_epoch

    @property
    def flagged_findings(self) -> list[Finding]:
        """What flags its training, its evaluation and its adaptive check."""
        check = self.adaptive_check.findings if self.adaptive_check else []
        found = [*flagged(self.history), *self.evaluation.findings, *check]
        return [finding for finding in found if finding.verdict == "flagged"]

    def kappa(self, *, matched: bool = False) -> Estimate | None:
        """Mean kappa of the clean images, as it is or at matched confidence."""
        return clean_kappa(self.relative_flatness, matched)

    def gauss_newton_trace(self, *, matched: bool = False) -> Estimate | None:
        """Mean Gauss-Newton trace off the manifold, as it is or at matched confidence."""
        found = self.input_curvature
        sides = found and (found.matched if matched else found.raw)
        return sides.off if sides else None


@record(frozen=True)
class Report:
    """All arms of a recipe; `schema` is raised when a field changes its meaning."""

    schema: int
    recipe: dict[str, Any]
    rows: list[Row]

    @property
    def networks(self) -> str:
        """Names of the networks of its arms."""
        return ", ".join(dict.fromkeys(row.model["name"] for row in self.rows))


_REPORT = TypeAdapter(Report)


def clean_kappa(flatness: FlatnessByOutcome | None, matched: bool) -> Estimate | None:
    """Mean kappa of the clean images; None where it was not measured."""
    if flatness is None:
        return None
    return flatness.clean.matched if matched else flatness.clean.raw


def write_report_file(report: Report, folder: Path) -> None:
    """Write `report.json`; its series (columns of samples, histories, paths) to five digits."""
    raw = _REPORT.dump_python(report, mode="json")
    series = ("history", "path", "path_by_step")
    for row in raw["rows"]:
        for part in ("evaluation", "adaptive_check", *series):
            row[part] = _rounded(row[part], whole=part in series)
    write_json(folder / "report.json", raw, indent=None)


class _Named(TypedDict):
    name: str


class _OfAKind(TypedDict):
    kind: str


class _ShownRecipe(TypedDict):
    """What tables and figures show of a recipe, of any version of flatreg."""

    data: _OfAKind
    model: _Named
    seed: int
    epochs: int
    batch_size: int


_SHOWN, _NAMED = TypeAdapter(_ShownRecipe), TypeAdapter(_Named)
_PARTS = TypeAdapter(list[_OfAKind])


def read_report(path: str | Path) -> Report:
    """Read `report.json` back, given its folder or the file itself.

    Raises:
        ValueError: it has another schema, or is no report.
        OSError: there is none.
    """
    file = report_file(Path(path))
    report = read_json(file, _REPORT, what="a report", schema=SCHEMA)
    if not report.rows:
        raise ValueError(f"{file}: not a report: rows: it has no arm")
    try:
        _SHOWN.validate_python(report.recipe)
        source_name(report.recipe["data"])
        for row in report.rows:
            _NAMED.validate_python(row.model)
            _PARTS.validate_python(row.added)
    except ValidationError as error:
        where = "its recipe or an arm"
        raise ValueError(f"{file}: not a report: {where}: {first_mistake(error)}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a report: recipe.data: it names no place") from error
    return report


def report_file(path: Path) -> Path:
    """`report.json` of a folder, or the file that was given."""
    return path if path.suffix == ".json" else path / "report.json"


def _rounded(value: Any, whole: bool) -> Any:
    """Floats of `value` to five significant digits: those in lists, or on the whole all of them."""
    if isinstance(value, dict):
        return {key: _rounded(item, whole) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, whole or isinstance(item, float)) for item in value]
    return float(f"{value:.5g}") if whole and isinstance(value, float) else value
