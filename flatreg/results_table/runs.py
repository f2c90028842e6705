"""The reports that a table is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flatreg.report import Report, read_report


@dataclass(frozen=True, eq=False)
class Run:
    """One report.

    Attributes:
        name: of the run's folder, or of the file where that is not called `report.json`.
        path: where it was read.
        report: as read.
        environment: versions and machine, from `environment.json` beside it; None without one.
    """

    name: str
    path: Path
    report: Report
    environment: dict[str, str] | None

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.report.recipe["seed"])

    @property
    def recipe_key(self) -> str:
        """The recipe without its seed and without the place where its data lies."""
        recipe = {key: value for key, value in self.report.recipe.items() if key != "seed"}
        places = ("path", "root")
        recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in places}
        return json.dumps(recipe, sort_keys=True)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read reports, each given by its folder or its file.

    Raises:
        ValueError: a report has another schema, or none was given.
        OSError: there is no report.
    """
    runs = [_read(Path(path)) for path in paths]
    if not runs:
        raise ValueError("expected runs or report.json files, got none")
    return runs


def _read(path: Path) -> Run:
    file = path if path.suffix == ".json" else path / "report.json"
    folder = file.resolve().parent
    if folder.name == "evaluation":  # where `flatreg evaluate` writes by default
        folder = folder.parent
    name = folder.name if file.name == "report.json" else file.stem
    beside = file.with_name("environment.json")
    environment = json.loads(beside.read_text()) if beside.exists() else None
    return Run(name, file, read_report(file), environment)
