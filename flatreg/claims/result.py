"""What a claim is judged on, and what comes out: numbers, conditions met or not, a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as record
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from scipy.stats import spearmanr
from torch import Tensor, nn

from flatreg.data.loading import subset
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.models.state import untouched
from flatreg.threat import to_unit_range

if TYPE_CHECKING:
    from flatreg.data.images import ImageArrays, Splits


SCHEMA = 1
PAPER = (
    "Walter, Adilova, Vreeken, Kamp, When Flatness Does (Not) Guarantee Adversarial Robustness, "
    "2025, arXiv:2510.14231"
)
FEWEST = 20  # samples without which a share or a median decides nothing
Verdict = Literal["reproduced", "partly", "not reproduced"]


@record(frozen=True, eq=False)
class Trained:
    """Trained models with their data and evaluations; the threat and the samples are the latter's.

    Attributes:
        models: by arm.
        splits: training images for manifolds, test images for everything else.
        evaluations: by arm, on the same samples.
        titles: what figures and tables call an arm; left out, its name.
    """

    models: Mapping[str, nn.Module]
    splits: Splits
    evaluations: Mapping[str, Evaluation]
    titles: Mapping[str, str] | None = None

    @property
    def threat(self) -> Evaluation:
        """Any of the evaluations: eps, norm, seed and indices are those of all."""
        return next(iter(self.evaluations.values()))

    def title(self, arm: str) -> str:
        """What an arm is called."""
        return (self.titles or {}).get(arm, arm)

    def each(self) -> Iterator[tuple[str, nn.Module]]:
        """Title and model of every arm, in eval mode meanwhile and untouched afterwards."""
        for arm, model in self.models.items():
            with untouched(model):
                yield self.title(arm), model

    def test_batch(self, samples: int, like: nn.Module) -> tuple[Tensor, Tensor]:
        """Some of the evaluated test images, in [0,1], and labels, in the model's dtype and place.

        Args:
            samples: how many, at most.
            like: the model.
        """
        indices = self.threat.indices
        rows = subset(len(indices), samples, self.threat.seed)
        return _batch(self.splits.test, [indices[row] for row in rows], like)


@dataclass(frozen=True)
class Check:
    """A condition fixed beforehand.

    Attributes:
        subject: an arm, or the part of the claim it belongs to.
        criterion: the condition.
        found: what came of it.
        holds: whether it does.
    """

    subject: str
    criterion: str
    found: str
    holds: bool


@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings"))
class ClaimResult:
    """A claim judged; `schema` is raised when a field changes its meaning.

    Attributes:
        kind: of the claim.
        statement: what is claimed, in one sentence.
        paper: where.
        setting: what it was judged on.
        checks: all conditions.
        numbers: by arm and quantity.
        arrays: what the figure shows, by arm and name.
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
    def verdict(self) -> Verdict:
        """Read off the checks: see `verdict_of`."""
        return verdict_of(self.checks)

    def subjects(self) -> dict[str, bool]:
        """Whether every check of a subject holds, by subject."""
        names = dict.fromkeys(check.subject for check in self.checks)
        return {n: all(c.holds for c in self.checks if c.subject == n) for n in names}


def verdict_of(checks: list[Check]) -> Verdict:
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


@record(frozen=True, eq=False)
class Findings:
    """What was found on one arm.

    Attributes:
        checks: conditions.
        numbers: by quantity.
        arrays: for the figure, by name.
    """

    checks: list[Check]
    numbers: dict[str, Estimate]
    arrays: dict[str, list[float]]


def result_of(
    kind: str,
    statement: str,
    trained: Trained,
    samples: int,
    found: Mapping[str, Findings],
    across: Sequence[Check] = (),
) -> ClaimResult:
    """Put together what was found by arm, and `across` arms."""
    threat = trained.threat
    n = min(samples, len(threat.indices))
    return ClaimResult(
        schema=SCHEMA,
        kind=kind,
        statement=statement,
        paper=PAPER,
        setting=f"{threat.norm} eps {threat.eps:.4g}, {n} test images an arm, seed {threat.seed}",
        checks=[*(check for one in found.values() for check in one.checks), *across],
        numbers={title: one.numbers for title, one in found.items()},
        arrays={title: one.arrays for title, one in found.items()},
    )


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


def _batch(data: ImageArrays, indices: list[int], like: nn.Module) -> tuple[Tensor, Tensor]:
    parameter = next(like.parameters(), torch.empty(0))
    images = to_unit_range(data.images[indices].to(parameter.device))
    return images.to(parameter.dtype), data.labels[indices].to(parameter.device).long()


def share_of(hits: Tensor) -> Estimate:
    """Share of `(n,)` booleans that are true."""
    return Estimate.share(int(hits.sum()), len(hits))
