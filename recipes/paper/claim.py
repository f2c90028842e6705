"""What the scripts of the paper's claims share: trained arms in, conditions and a verdict out.

Each script beside this module judges one claim. It is called with settings of the claim (the fields
of its class), with changes to the recipe beside it, and with the folder of the run:

    python recipes/paper/closed_form.py samples=128 epochs=20 output=runs/closed_form
    python recipes/paper/closed_form.py run=runs/60k output=runs/closed_form_60k

The arms of the recipe are trained in that folder, or taken from it where it holds the same run;
with `run=` they are those of a finished run of any recipe. The script then measures each arm,
compares what it found with conditions that were written down before the first run, and writes
`claim.json`, `claim.md` and `figures/claim.png` into the folder of `output=`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Subset

import flatreg
from flatreg import Estimate, Evaluation, Recipe
from flatreg.attacks import Attack, apgd, pgd
from flatreg.data.files import write_json, write_whole
from flatreg.measures import AtHead
from flatreg.report.figures.style import panels, save, styled
from flatreg.report.tables import markdown, pictures
from flatreg.run.settings import parse_settings

if TYPE_CHECKING:
    from flatreg.data.images import Splits

PAPER = (
    "Walter, Adilova, Vreeken, Kamp, When Flatness Does (Not) Guarantee Adversarial Robustness, "
    "2025, arXiv:2510.14231"
)
SCHEMA = 2  # of claim.json
FEWEST = 20  # samples; a share or a median of fewer decides nothing
CONFIDENCE = 0.9  # median confidence at which models are compared

Cascade = Literal["short", "fast", "standard"]
# The kinds of stages that "standard" has, without its black-box stage, at a twentieth of its cost.
SHORT: tuple[Attack, ...] = (
    partial(pgd, loss="margin", steps=10),
    partial(apgd, loss="rescaled_cross_entropy", steps=20),
    partial(apgd, loss="dlr", targets=9, steps=10),
)

STRICT = ConfigDict(extra="forbid")  # a setting that a claim does not have is an error


# --- what a claim is judged on


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """The trained arms of a recipe, with its data and the evaluation of one of them.

    Attributes:
        models: by arm; in eval mode, images in [0,1] to logits.
        splits: the training images are for manifolds, the test images for everything else.
        evaluation: of any arm; eps, norm, seed and the test images are the same for all arms.
        titles: what figures and tables call an arm; an arm that is left out goes by its name.
    """

    models: Mapping[str, nn.Module]
    splits: Splits
    evaluation: Evaluation
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def by(cls, recipe: Recipe, folder: Path) -> Trained:
        """Train the arms of `recipe` in `folder`, or load them where it holds the finished run.

        Raises:
            ValueError: the folder holds the run of another recipe.
        """
        finished = (folder / "report.json").exists()
        if finished and flatreg.load_recipe(folder / "recipe.yaml") == recipe:
            report = flatreg.read_report(folder)
        else:
            report = flatreg.run_recipe(recipe, folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoints = {row.name: folder / "checkpoints" / row.name for row in report.rows}
        return cls(
            models={arm: flatreg.load_model(at).to(device) for arm, at in checkpoints.items()},
            splits=recipe.data.load(),
            evaluation=report.rows[0].evaluation,
            titles={row.name: f"{row.method}, {row.model['name']}" for row in report.rows},
        )

    def title(self, arm: str) -> str:
        """Title of an arm."""
        return self.titles.get(arm, arm)

    def each(self, judge: Callable[[str, nn.Module, Trained], Findings]) -> dict[str, Findings]:
        """What `judge` finds on every arm, by title; it is called with title, model and this."""
        arms = {self.title(arm): model for arm, model in self.models.items()}
        return {title: judge(title, model, self) for title, model in arms.items()}

    def indices(self, samples: int) -> list[int]:
        """Dataset indices of at most `samples` of the evaluated test images; the seed chooses."""
        known = self.evaluation.indices
        if samples >= len(known):
            return list(known)
        generator = np.random.default_rng(self.evaluation.seed)
        return [known[row] for row in sorted(generator.choice(len(known), samples, replace=False))]

    def test_batch(self, samples: int, like: nn.Module) -> tuple[Tensor, Tensor]:
        """Images `(n, ...)` in [0,1] and labels `(n,)` of `indices`, as the model `like` is."""
        parameter, indices = next(like.parameters()), self.indices(samples)
        images = self.splits.test.images[indices].to(parameter.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        labels = self.splits.test.labels[indices].to(parameter.device)
        return images.to(parameter.dtype), labels.long()

    def evaluate(
        self, model: nn.Module, attack: str | Sequence[Attack], samples: int
    ) -> Evaluation:
        """Attacked accuracy of `model` within the eps of the run, on the images of `indices`."""
        threat = self.evaluation
        return flatreg.evaluate(
            model,
            Subset(self.splits.test, self.indices(samples)),
            eps=threat.eps,
            norm=threat.norm,
            attack=attack,
            seed=threat.seed,
            diagnose=False,
            progress=False,
        )


def stages_of(cascade: Cascade) -> str | tuple[Attack, ...]:
    """Stages of "short"; any other name is a preset of `flatreg.evaluate`."""
    return SHORT if cascade == "short" else cascade


def at_head(model: nn.Module, inputs: Tensor, labels: Tensor) -> AtHead:
    """What reaches the last linear map of `model`, in float64, in the mode the model is in."""
    return flatreg.measures.pass_to_head(model, inputs, labels, dtype=torch.float64)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64 on the CPU, in the mode the model is in."""
    return copy.deepcopy(model).cpu().double()


# --- what comes out


@dataclass(frozen=True)
class Check:
    """A condition fixed beforehand.

    Attributes:
        subject: an arm, or the part of the claim that the condition belongs to.
        criterion: the condition.
        found: what was measured.
        holds: whether the condition holds.
    """

    subject: str
    criterion: str
    found: str
    holds: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """What was found on one arm.

    Attributes:
        checks: conditions.
        numbers: by quantity.
        arrays: what the figure shows, by name.
    """

    checks: list[Check]
    numbers: dict[str, Estimate]
    arrays: dict[str, list[float]]


@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings"))
class ClaimResult:
    """A judged claim, as in `claim.json`; `schema` is raised when a field changes its meaning.

    Attributes:
        kind: class of the claim.
        statement: what is claimed, in one sentence.
        paper: where.
        setting: threat, number of test images and seed.
        checks: all conditions.
        numbers: by title of the arm and quantity.
        arrays: what the figure shows, by title of the arm and name.
    """

    schema: int
    kind: str
    statement: str
    paper: str
    setting: str
    checks: list[Check]
    numbers: dict[str, dict[str, Estimate]]
    arrays: dict[str, dict[str, list[float]]]

    @property
    def verdict(self) -> str:
        """The verdict that follows from the checks: see `verdict_of`."""
        return verdict_of(self.checks)

    def subjects(self) -> dict[str, bool]:
        """Whether every check of a subject holds, by subject."""
        names = dict.fromkeys(check.subject for check in self.checks)
        return {n: all(c.holds for c in self.checks if c.subject == n) for n in names}


def verdict_of(checks: Sequence[Check]) -> Literal["reproduced", "partly", "not reproduced"]:
    """Reproduced if all checks of all subjects hold, not if no subject has all of its own.

    >>> verdict_of([Check("a", "", "", True), Check("b", "", "", False)])
    'partly'
    >>> verdict_of([Check("a", "", "", True), Check("a", "", "", False)])
    'not reproduced'
    """
    failing = {check.subject for check in checks if not check.holds}
    if checks and not failing:
        return "reproduced"
    return "partly" if {check.subject for check in checks} - failing else "not reproduced"


class Claim(Protocol):
    """A claim: its fields are its settings, calling it judges trained arms.

    Attributes:
        statement: what is claimed, in one sentence.
        caption: of its figure.
        samples: how many of the evaluated test images to use.
    """

    statement: ClassVar[str]
    caption: ClassVar[str]
    samples: int

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""

    def figure(self, result: ClaimResult) -> Figure:
        """Draw what was found."""


def result_of(
    claim: Claim, trained: Trained, found: Mapping[str, Findings], across: Sequence[Check] = ()
) -> ClaimResult:
    """Put together what was `found` by title of the arm, and the checks `across` arms."""
    threat, n = trained.evaluation, len(trained.indices(claim.samples))
    return ClaimResult(
        schema=SCHEMA,
        kind=type(claim).__name__,
        statement=claim.statement,
        paper=PAPER,
        setting=f"{threat.norm} eps {threat.eps:.4g}, {n} test images an arm, seed {threat.seed}",
        checks=[*(check for one in found.values() for check in one.checks), *across],
        numbers={title: one.numbers for title, one in found.items()},
        arrays={title: one.arrays for title, one in found.items()},
    )


def share_of(hits: Tensor) -> Estimate:
    """Share of `(n,)` booleans that are true."""
    return Estimate.share(int(hits.sum()), len(hits))


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, over the finite pairs of two `(n,)`; nan where one of them is constant.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    known = one.isfinite() & other.isfinite()
    one, other = one[known].double(), other[known].double()
    if len(one) < 2 or bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return float("nan")
    return float(spearmanr(one.numpy(), other.numpy()).statistic)


def claim_text(result: ClaimResult) -> str:
    """Verdict and every condition, at most 100 columns wide."""
    lines = [
        f"claim     {result.kind}: {result.verdict}",
        *_wrapped(result.statement),
        *_wrapped(result.setting),
    ]
    for subject, holds in result.subjects().items():
        lines.append(f"  {'yes' if holds else 'NO':<4}{subject}")
        for check in result.checks:
            if check.subject == subject:
                mark = "+" if check.holds else "-"
                lines += _wrapped(f"{mark} {check.criterion}: {check.found}", 6)
    return "\n".join(lines)


def write_claim(claim: Claim, result: ClaimResult, folder: Path) -> None:
    """Write `claim.json`, `claim.md` and `figures/claim.png` into `folder`."""
    save(styled(claim.figure)(result), folder / "figures" / "claim.png")
    raw = TypeAdapter(ClaimResult).dump_python(result, mode="json") | {"verdict": result.verdict}
    write_json(folder / "claim.json", raw)
    arms = result.numbers.values()
    quantities = dict.fromkeys(name for numbers in arms for name in numbers)
    rows = [[name, *(str(numbers.get(name, "")) for numbers in arms)] for name in quantities]
    parts = [
        f"# {result.kind}: {result.verdict}",
        f"{result.statement} ({result.paper})",
        f"```\n{claim_text(result)}\n```",
        pictures({"figures/claim.png": claim.caption}),
        markdown(["", *result.numbers], rows),
        "95% intervals in brackets. Larger kappa = sharper.\n",
    ]
    write_whole(folder / "claim.md", "\n\n".join(parts))


def _wrapped(text: str, indent: int = 10) -> list[str]:
    first, rest = " " * indent, " " * (indent + 2)
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=rest)


# --- figures

MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*"]


def panels_by_arm(
    result: ClaimResult, *, rows: int = 1, width: float, height: float, sharey: bool | str
) -> tuple[Figure, Any]:
    """A column of panels for each arm, with its title: the figure and its axes `(rows, arms)`.

    `width` is that of a column, `height` that of the figure, in inches.
    """
    count = len(result.arrays)
    size = (1.0 + width * count, height)
    figure, grid = panels(rows, count, size, constrained=True, sharex=True, sharey=sharey)
    for axes, title in zip(grid[0], result.arrays, strict=True):
        axes.set_title(title.replace(", ", "\n"), fontsize=9)
    return figure, grid


def legend_below(figure: Figure, axes: Axes) -> None:
    """Write the legend of `axes` below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


# --- what every script ends with


def main(
    kind: type[Claim], script: str, *, needs: Callable[[Any], Sequence[str]] | None = None
) -> None:
    """Read the command line, train or load the arms, judge the claim, write and print the verdict.

    Args:
        kind: class of the claim.
        script: its file; the recipe is the YAML file beside it.
        needs: of the claim, the arms that the recipe must have.

    Raises:
        SystemExit: with one line a mistake; before anything is trained, where that can be seen.
    """
    source, names = Path(script), [field.name for field in dataclasses.fields(kind)]
    parser = argparse.ArgumentParser(
        description=sys.modules[kind.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="key=value",
        help=f"a setting of the claim ({', '.join(names)}), key.path=value to change the recipe, "
        "run=DIR to judge a finished run of any recipe, output=DIR for the folder of the run",
    )
    settings, overrides, folder = list[str](), list[str](), Path("runs") / source.stem
    run: Path | None = None
    for argument in parser.parse_args().arguments:
        key, _, value = argument.partition("=")
        if key == "output":
            folder = Path(value)
        elif key == "run":
            run = Path(value)
        else:
            (settings if key in names else overrides).append(argument)
    try:
        claim = configured(kind, settings)
        if run and overrides:
            raise ValueError(f"run={run} is trained already: {overrides[0]} would change nothing")
        if run and not (run / "report.json").exists():
            raise ValueError(f"run={run}: expected a finished run, found no report.json")
        at = run / "recipe.yaml" if run else source.with_suffix(".yaml")
        recipe = flatreg.load_recipe(at, overrides)
        missing = set(needs(claim) if needs else ()) - set(recipe.arms())
        if missing:
            raise ValueError(f"{source.name}: the recipe has no arm {', '.join(sorted(missing))}")
        result = claim(Trained.by(recipe, run or folder))
        write_claim(claim, result, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error
    print(claim_text(result))
    print(f"claim     {folder / 'claim.md'}")


def configured(kind: type[Claim], settings: Sequence[str]) -> Claim:
    """The claim with these settings, `key=value` each.

    Raises:
        ValueError: every mistake, one a line.
    """
    try:
        return kind(**parse_settings(settings))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join(lines)) from error
