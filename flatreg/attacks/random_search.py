r"""Random search: a random step from the best point so far, kept where the margin falls.

Rastrigin, "The convergence of the random search method in the extremal control of a many parameter
system", 1963, with steps of radius :math:`\epsilon / \sqrt{k}` at query k; a weak control.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueryResult
from flatreg.attacks.search import Jobs, random_points, run
from flatreg.data.configuration import whole
from flatreg.threat import Norm, check_norm, per_sample, project


@dataclass
class _Memory:
    best: Tensor  # point of largest loss so far, and its loss
    value: Tensor


@dataclass(frozen=True)
class _RandomSearch:
    queries: int
    norm: Norm
    seed: int
    loss: LossName = "margin"
    gradients: bool = False
    may_leave_ball: bool = False

    def init(self, jobs: Jobs) -> _Memory:
        jobs.x = random_points(jobs, self.norm, self.seed, stream=jobs.step)
        return _Memory(jobs.x, torch.full(jobs.row.shape, -torch.inf).to(jobs.x))

    def step(self, jobs: Jobs, memory: _Memory, answer: QueryResult) -> None:
        better = answer.value > memory.value
        memory.best = torch.where(per_sample(better, jobs.x).bool(), jobs.x, memory.best)
        memory.value = torch.where(better, answer.value, memory.value)
        stream = jobs.step + 1  # one a query, so that no two draw the same numbers
        roots = torch.tensor([(k + 1) ** 0.5 for k in stream.tolist()], dtype=torch.float64)
        radius = jobs.eps / per_sample(roots, jobs.x)
        moved = random_points(
            jobs, self.norm, self.seed, centres=memory.best, radius=radius, stream=stream
        )
        jobs.x = project(moved, jobs.inputs, jobs.eps, self.norm)


def random_search(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    queries: int = 100,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Attack by random search in the ball; needs no gradients.

    The first query is `flatreg.threat.random_point`; a smaller budget is the beginning of a larger
    one. Arguments, result and errors as in `flatreg.attacks.pgd`.

    Raises:
        ValueError: also fewer than 1 query.
    """
    queries = whole("queries", queries, 1)
    common = complete(options, "random_search")
    search = _RandomSearch(queries, check_norm(common["norm"]), common["seed"])
    return run(search, model, inputs, labels, common, eps=eps)
