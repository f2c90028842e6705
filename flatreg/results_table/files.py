"""The table between its markers in a file, and the results that are kept to make it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flatreg.atomic import write_whole
from flatreg.checkpoints import Epoch
from flatreg.report import Report, Row, write_report_file
from flatreg.results_table.runs import Run

BEGIN, END = "<!-- table -->", "<!-- /table -->"


def insert_table(file: Path, text: str) -> None:
    """Write `text` between the markers of `file`, or into a new file with nothing else.

    Raises:
        ValueError: the file is there and has not one pair of markers.
    """
    before, after = "", "\n"
    if file.exists():
        found = file.read_text()
        before, begin, rest = found.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end) or found.count(BEGIN) + found.count(END) != 2:
            raise ValueError(f"{file}: expected one {BEGIN} and then one {END}, left as it is")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def keep_results(runs: Sequence[Run], folder: Path) -> None:
    """Write what a table needs of each run into `folder/NAME`, for a repository to keep.

    It is a report of the same schema, with verdicts of the samples but without their margins and
    flatness, without attack paths and without epochs that flag nothing, the last one excepted.

    Raises:
        ValueError: two runs have the same name.
    """
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs are called {name}: expected every name once")
    for run in runs:
        target = folder / run.name
        target.mkdir(parents=True, exist_ok=True)
        rows = [_without_series(row) for row in run.report.rows]
        write_report_file(Report(run.report.schema, run.report.recipe, rows), target)
        if run.environment is not None:
            write_whole(target / "environment.json", json.dumps(run.environment, indent=1) + "\n")


def _without_series(row: Row) -> Row:
    evaluation = replace(
        row.evaluation,
        labels=[],
        predictions=[],
        margins=[],
        kappas=[],
        attacked_predictions=[],
        attacked_margins=[],
        attacked_kappas=[],
    )
    telling = [epoch for epoch in row.history if _flags(epoch)] + row.history[-1:]
    history = list({epoch.epoch: epoch for epoch in telling}.values())
    scrutiny = row.scrutiny and replace(row.scrutiny, slices=[])
    return replace(
        row, evaluation=evaluation, scrutiny=scrutiny, history=history, path={}, path_by_step={}
    )


def _flags(epoch: Epoch) -> bool:
    return any(finding.verdict == "flagged" for finding in epoch.findings)
