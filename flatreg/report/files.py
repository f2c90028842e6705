"""A report on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flatreg.data.files import write_whole
from flatreg.report.arms import SCHEMA, Report
from flatreg.report.text import markdown

_REPORT = TypeAdapter(Report)


def write_report(report: Report, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `report.json` and `report.md`; `figures` maps file names to captions."""
    write_report_file(report, folder)
    write_whole(folder / "report.md", markdown(report, figures))


def write_report_file(report: Report, folder: Path) -> None:
    """Write `report.json`; its series (columns of samples, histories, paths) to five digits."""
    raw = _REPORT.dump_python(report, mode="json")
    for row in raw["rows"]:
        for part in ("evaluation", "adaptive_check", "history", "path", "path_by_step"):
            row[part] = _rounded(row[part], whole=part in ("history", "path", "path_by_step"))
    write_whole(folder / "report.json", json.dumps(raw, separators=(",", ":")) + "\n")


def read_report(path: Path) -> Report:
    """Read `report.json` back, given its folder or the file itself.

    Raises:
        ValueError: it has another schema, or is no report.
        OSError: there is none.
    """
    file = path if path.suffix == ".json" else path / "report.json"
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{file}: expected schema {SCHEMA}, got {found}")
    try:
        return _REPORT.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file}: not a report: {place}: {first['msg']}") from error


def _rounded(value: Any, whole: bool) -> Any:
    """Floats of `value` to five significant digits: those in lists, or on the whole all of them."""
    if isinstance(value, dict):
        return {key: _rounded(item, whole) for key, item in value.items()}
    if isinstance(value, list):
        return [
            float(f"{item:.5g}") if isinstance(item, float) else _rounded(item, whole)
            for item in value
        ]
    return float(f"{value:.5g}") if whole and isinstance(value, float) else value
