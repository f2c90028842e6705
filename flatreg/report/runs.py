"""The reports that a table is made of."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import mean

from flatreg.data.files import write_whole
from flatreg.data.sources import source_name
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.report.arms import Report, Row
from flatreg.report.files import read_report, write_report_file
from flatreg.run.checkpoints import Epoch


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


_SEED = re.compile(r"[-_.](seed|s)?[-_]?\d+$")  # at the end of a folder's name


@dataclass(frozen=True, eq=False)
class Entry:
    """One arm of one run."""

    run: Run
    row: Row

    @property
    def name(self) -> str:
        """Run and arm, for messages."""
        return f"{self.run.name}/{self.row.name}"


@dataclass(frozen=True, eq=False)
class Group:
    """One arm of a recipe, an entry a seed.

    Attributes:
        name: what the table calls it.
        arm: its name in the recipe.
        entries: by seed.
    """

    name: str
    arm: str
    entries: list[Entry]

    @property
    def method(self) -> str:
        """What the arm does, as `Row.method`."""
        return self.entries[0].row.method

    @property
    def attacked(self) -> float:
        """Attacked accuracy in [0, 1], mean over the seeds."""
        return mean(entry.row.evaluation.attacked.value for entry in self.entries)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest attacked accuracy of the seeds; of one seed, its Wilson interval."""
        found: list[Estimate] = [entry.row.evaluation.attacked for entry in self.entries]
        if len(found) == 1:
            return found[0].low, found[0].high
        return min(a.value for a in found), max(a.value for a in found)

    @property
    def cost(self) -> float | None:
        """Training time in epochs of the plain twin, so that arms of unlike length compare.

        Mean over the seeds; None where a run has no plain twin of the same model.
        """
        costs = [_cost(entry.row) for entry in self.entries]
        known = [cost for cost in costs if cost is not None]
        return mean(known) if len(known) == len(costs) else None

    @property
    def epochs(self) -> int:
        """Of the recipe."""
        return int(self.entries[0].run.report.recipe["epochs"])


@dataclass(frozen=True, eq=False)
class Section:
    """Arms that were judged alike: the plain ones first, then by attacked accuracy."""

    subject: str
    groups: list[Group]
    runs: list[Run]

    @property
    def evaluation(self) -> Evaluation:
        """One of its evaluations, for what they share."""
        return self.groups[0].entries[0].row.evaluation

    @property
    def title(self) -> str:
        """Dataset and network, threat and n."""
        shared = self.evaluation
        return f"{self.subject}, {shared.norm} eps {_eps_text(shared)}, n = {shared.n}"


def sections(runs: Sequence[Run]) -> list[Section]:
    """Sort runs into sections by dataset, the recipe's network, norm and eps.

    Raises:
        ValueError: runs of one section differ in their cascade or in the samples they were judged
            on, two are the same recipe with the same seed, or two recipes have the same name.
    """
    by_threat: defaultdict[tuple[str, str, float], list[Run]] = defaultdict(list)
    for run in runs:
        judged = run.report.rows[0].evaluation
        recipe = run.report.recipe
        subject = f"{source_name(recipe['data'])}, {recipe['model']['name']}"
        by_threat[subject, judged.norm, round(judged.eps, 9)].append(run)
    return [_section(subject, alike) for (subject, _, _), alike in sorted(by_threat.items())]


def _section(subject: str, runs: list[Run]) -> Section:
    entries = [Entry(run, row) for run in runs for row in run.report.rows]
    for entry in entries[1:]:
        _refuse_unlike(entries[0], entry)
    by_recipe: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_recipe[run.recipe_key].append(run)
    names: dict[str, str] = {}
    for key, same in by_recipe.items():
        name = _common_name([run.name for run in same])
        if name in names.values():
            raise ValueError(f"two recipes of {subject} are called {name}: rename a folder")
        names[key] = name
    groups: list[Group] = []
    for key, same in by_recipe.items():
        same.sort(key=lambda run: run.seed)
        for run, after in pairwise(same):
            if run.seed == after.seed:
                raise ValueError(
                    f"{run.path} and {after.path} are the same recipe with the same seed: "
                    "expected every seed once"
                )
        for row in same[0].report.rows:
            shown = row.method if len(by_recipe) == 1 else f"{names[key]} / {row.method}"
            arms = [Entry(run, r) for run in same for r in run.report.rows if r.name == row.name]
            groups.append(Group(shown, row.name, arms))
    groups.sort(key=lambda group: (group.arm != "plain", -group.attacked, group.name))
    return Section(subject, groups, sorted(runs, key=lambda run: (names[run.recipe_key], run.seed)))


def _cost(row: Row) -> float | None:
    if row.time_ratio is None:
        return None
    return row.training_seconds * row.time_ratio / row.seconds_per_epoch


def _refuse_unlike(first: Entry, other: Entry) -> None:
    one, two = first.row.evaluation, other.row.evaluation
    cascades = [[stage.attack for stage in e.stages] for e in (one, two)]
    if cascades[0] != cascades[1]:
        ours, theirs = (", ".join(cascade) for cascade in cascades)
        raise ValueError(
            f"{first.name} and {other.name} were judged by different cascades, {ours}; "
            f"and {theirs}: expected the same in one table"
        )
    if one.n != two.n:
        raise ValueError(
            f"{first.name} and {other.name} were judged on n = {one.n} and n = {two.n}: "
            "expected the same in one table"
        )
    if one.indices != two.indices:
        raise ValueError(
            f"{first.name} and {other.name} were judged on different samples, by evaluation.seed "
            f"{one.seed} and {two.seed}: expected the same in one table"
        )


def _common_name(names: list[str]) -> str:
    """What the folders of one recipe's seeds have in common.

    >>> _common_name(["nfgsm", "nfgsm-seed1", "nfgsm_2"]), _common_name(["quickstart-1"])
    ('nfgsm', 'quickstart-1')
    """
    stems = {_SEED.sub("", name) for name in names}
    return stems.pop() if len(names) > 1 and len(stems) == 1 else names[0]


def _eps_text(evaluation: Evaluation) -> str:
    grey = Fraction(evaluation.eps * 255).limit_denominator(100)
    exact = grey.denominator == 1 and abs(float(grey) / 255 - evaluation.eps) < 1e-7
    if evaluation.norm == "linf" and exact:
        return f"{grey}/255"
    return f"{evaluation.eps:.4g}"


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
    adaptive_check = row.adaptive_check and replace(row.adaptive_check, slices=[])
    return replace(
        row,
        evaluation=evaluation,
        adaptive_check=adaptive_check,
        history=history,
        path={},
        path_by_step={},
    )


def _flags(epoch: Epoch) -> bool:
    return any(finding.verdict == "flagged" for finding in epoch.findings)
