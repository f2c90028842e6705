"""The runs of several reports, sorted into sections; and their small copies."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flatreg.data.files import read_json, write_json
from flatreg.data.sources import evaluated_on
from flatreg.evaluation.compare import other_images
from flatreg.evaluation.results import Evaluation
from flatreg.report.rows import Report, Row, read_report, report_file, write_report_file
from flatreg.run.checkpoints import flagged
from flatreg.run.recipe import Recipe

_ENVIRONMENT = TypeAdapter(dict[str, str])
_OF_ARMS = ("arm", "model", "criterion", "penalties", "baseline", "variants")
_SEED = re.compile(r"[-_.](seed|s)?[-_]?\d+$")  # at the end of a folder's name


@dataclass(frozen=True, eq=False)
class Run:
    """One report, read at `path`.

    Attributes:
        name: of the run's folder, or of the file where that is not called `report.json`.
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

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe as it is read today, with its defaults; None where another program trained."""
        with suppress(ValidationError):
            return Recipe.model_validate(self.report.recipe)
        return None

    @cached_property
    def recipe_key(self) -> str:
        """The recipe without its seed and what changes no number.

        The place where data lie, how many workers decode them and how often checkpoints are written
        change no number.
        """
        recipe = self.recipe.model_dump(mode="json") if self.recipe else self.report.recipe
        recipe = {k: v for k, v in recipe.items() if k not in ("seed", "checkpoint_minutes")}
        recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in ("path", "root")}
        recipe["data"]["workers"] = bool(recipe["data"].get("workers"))
        return json.dumps(recipe, sort_keys=True)

    def arm_key(self, name: str) -> str:
        """The same of one arm: another recipe that trains and evaluates it alike has this key."""
        if self.recipe is None or name not in self.recipe.arms():
            return f"{name} {self.recipe_key}"
        shared = {k: v for k, v in json.loads(self.recipe_key).items() if k not in _OF_ARMS}
        shared["optimizer"].pop("wrapper")
        arm = self.recipe.arms()[name].model_dump(mode="json")
        return json.dumps([shared, arm], sort_keys=True)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read reports, each given by its folder or its file.

    Raises:
        ValueError: a report has another schema, or none was given.
        OSError: there is no report.
    """
    runs = []
    for file in (report_file(Path(path)) for path in paths):
        folder = file.resolve().parent
        if folder.name == "evaluation":  # where `flatreg evaluate` writes by default
            folder = folder.parent
        name = folder.name if file.name == "report.json" else file.stem
        runs.append(Run(name, file, read_report(file), read_environment(file.parent)))
    if not runs:
        raise ValueError("expected runs or report.json files, got none")
    return runs


def read_environment(folder: Path) -> dict[str, str] | None:
    """Versions and machine of a run, from `environment.json` in its folder; None without one.

    Raises:
        ValueError: it is no environment.
    """
    file = folder / "environment.json"
    return read_json(file, _ENVIRONMENT, what="an environment") if file.exists() else None


@dataclass(frozen=True, eq=False)
class Group:
    """One arm, trained with one seed or several, in ascending order: a row a seed.

    The seeds are of one recipe, or of several that train this arm alike.
    """

    name: str
    epochs: int
    seeds: list[int]
    rows: list[Row]

    @property
    def arm(self) -> str:
        """Its name in the recipe."""
        return self.rows[0].name

    @property
    def method(self) -> str:
        """As `Row.method`."""
        return self.rows[0].method

    @property
    def attacked(self) -> float:
        """Attacked accuracy in [0, 1], mean over the seeds."""
        return mean(row.evaluation.attacked.value for row in self.rows)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest attacked accuracy of the seeds; of one seed, its Wilson interval."""
        found = [row.evaluation.attacked for row in self.rows]
        if len(found) == 1:
            return found[0].low, found[0].high
        return min(a.value for a in found), max(a.value for a in found)

    @property
    def cost(self) -> float | None:
        """`Row.cost`, mean over the seeds; None where a run has none."""
        costs = [row.cost for row in self.rows if row.cost is not None]
        return mean(costs) if len(costs) == len(self.rows) else None


@dataclass(frozen=True, eq=False)
class Section:
    """Arms evaluated under one threat: the plain ones first, then by attacked accuracy."""

    setting: str
    groups: list[Group]
    runs: list[Run]

    @property
    def evaluation(self) -> Evaluation:
        """One of its evaluations, for what they share."""
        return self.groups[0].rows[0].evaluation

    @property
    def title(self) -> str:
        """Dataset and network, threat and n."""
        shared = self.evaluation
        grey = Fraction(shared.eps * 255).limit_denominator(100)
        exact = grey.denominator == 1 and abs(float(grey) / 255 - shared.eps) < 1e-7
        eps = f"{grey}/255" if shared.norm == "linf" and exact else f"{shared.eps:.4g}"
        return f"{self.setting}, {shared.norm} eps {eps}, n = {shared.n}"


def sections(runs: Sequence[Run]) -> list[Section]:
    """Sort runs into sections by dataset, the recipe's network, norm, eps and number of images.

    Raises:
        ValueError: runs of one section differ in their cascade or in their samples, two
            are the same recipe with the same seed, or two recipes have the same name.
    """
    by_threat: defaultdict[tuple[str, str, float, int], list[Run]] = defaultdict(list)
    for run in runs:
        threat, recipe = run.report.rows[0].evaluation, run.report.recipe
        setting = f"{evaluated_on(recipe)}, {recipe['model']['name']}"
        by_threat[setting, threat.norm, round(threat.eps, 9), threat.n].append(run)
    return [_section(setting, alike) for (setting, *_), alike in sorted(by_threat.items())]


def _section(setting: str, runs: list[Run]) -> Section:
    arms = [(f"{run.name}/{row.name}", row.evaluation) for run in runs for row in run.report.rows]
    for arm in arms[1:]:
        _refuse_unlike(arms[0], arm)
    by_recipe: defaultdict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_recipe[run.recipe_key].append(run)
    names: dict[str, str] = {}
    groups: defaultdict[str, list[Group]] = defaultdict(list)  # by training
    for key, same in by_recipe.items():
        name = _common_name([run.name for run in same])
        if name in names.values():
            raise ValueError(f"two recipes of {setting} are called {name}: rename a folder")
        names[key] = name
        for run, after in pairwise(same):
            if run.seed == after.seed:
                raise ValueError(
                    f"{run.path} and {after.path} are the same recipe with the same seed: "
                    "expected every seed once"
                )
        for row in same[0].report.rows:
            shown = row.method if len(by_recipe) == 1 else f"{name} / {row.method}"
            found = [(run.seed, r) for run in same for r in run.report.rows if r.name == row.name]
            seeds, rows = (list(column) for column in zip(*found, strict=True))
            group = Group(shown, int(same[0].report.recipe["epochs"]), seeds, rows)
            _add(group, groups[same[0].arm_key(row.name)])
    every = [group for alike in groups.values() for group in alike]
    every.sort(key=lambda group: (group.arm != "plain", -group.attacked, group.name))
    return Section(setting, every, sorted(runs, key=lambda run: (names[run.recipe_key], run.seed)))


def _add(group: Group, alike: list[Group]) -> None:
    """Add a group to the first of the same training that has none of its seeds, or as another."""
    for at, one in enumerate(alike):
        if not {*one.seeds} & {*group.seeds}:
            pairs = zip(one.seeds + group.seeds, one.rows + group.rows, strict=True)
            by_seed = sorted(pairs, key=lambda pair: pair[0])
            seeds, rows = (list(column) for column in zip(*by_seed, strict=True))
            first = min(one, group, key=lambda group: group.seeds[0])
            alike[at] = Group(first.name, one.epochs, seeds, rows)
            return
    alike.append(group)


def _refuse_unlike(first: tuple[str, Evaluation], other: tuple[str, Evaluation]) -> None:
    """Refuse two evaluations, each with its name, that do not belong into one table."""
    one, two = first[1], other[1]
    cascades = [", ".join(stage.attack for stage in e.stages) for e in (one, two)]
    if cascades[0] != cascades[1]:
        difference = f"by different cascades, {cascades[0]}; and {cascades[1]}"
    elif one.indices != two.indices:
        difference = f"on different samples, by evaluation.seed {one.seed} and {two.seed}"
    elif other_images(one, two):
        difference = "on different images under the same indices, of two data sets of one name"
    else:
        return
    raise ValueError(
        f"{first[0]} and {other[0]} were evaluated {difference}: expected the same in one table"
    )


def _common_name(names: list[str]) -> str:
    """What the folders of one recipe's seeds have in common.

    >>> _common_name(["nfgsm", "nfgsm-seed1", "nfgsm_2"]), _common_name(["quickstart-1"])
    ('nfgsm', 'quickstart-1')
    """
    stems = {_SEED.sub("", name) for name in names}
    return stems.pop() if len(names) > 1 and len(stems) == 1 else names[0]


def keep_results(runs: Sequence[Run], folder: Path) -> None:
    """Write what a table needs of each run into `folder/NAME`, for a repository to keep.

    It is a report of the same schema, with verdicts of the samples but without their margins and
    flatness, without attack paths, and with the last epoch and those that flag something alone.

    Raises:
        ValueError: two runs have the same name.
    """
    name, times = Counter(run.name for run in runs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"two runs are called {name}: expected every name once")
    for run in runs:
        target = folder / run.name
        target.mkdir(parents=True, exist_ok=True)
        rows = [_without_series(row) for row in run.report.rows]
        write_report_file(Report(run.report.schema, run.report.recipe, rows), target)
        if run.environment is not None:
            write_json(target / "environment.json", run.environment)


def _without_series(row: Row) -> Row:
    columns = ("predictions", "margins", "kappas")
    names = ("labels", *columns, *(f"attacked_{name}" for name in columns))
    empty: dict[str, Any] = {name: [] for name in names}
    history = [e for e in row.history[:-1] if flagged([e])] + row.history[-1:]
    check = row.adaptive_check and replace(row.adaptive_check, slices=[])
    kept = replace(row, history=history, path={}, path_by_step={})
    return replace(kept, evaluation=replace(row.evaluation, **empty), adaptive_check=check)
