r"""Random search: a random step from the best point so far, kept where the margin falls.

Rastrigin, "The convergence of the random search method in the extremal control of a many parameter
system", 1963, with steps of radius :math:`\epsilon / \sqrt{k}` at query k; a weak control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackResult, Callback
from flatreg.attacks.query import QueryResult
from flatreg.attacks.search import Jobs, run
from flatreg.threat import Norm, check_norm, per_sample, project, random_point


@dataclass
class _Memory:
    """The best point of a job."""

    best: Tensor
    value: Tensor


@dataclass(frozen=True)
class _RandomSearch:
    queries: int
    norm: Norm
    seed: int
    loss: LossName = "margin"
    gradients: bool = False
    may_leave_ball: bool = False

    @property
    def looks(self) -> int:
        return self.queries

    def begin(self, jobs: Jobs) -> _Memory:
        jobs.x = self.around(jobs.inputs, jobs, torch.zeros_like(jobs.step))
        return _Memory(jobs.x, torch.full(jobs.row.shape, -torch.inf).to(jobs.x))

    def advance(self, jobs: Jobs, memory: _Memory, look: QueryResult) -> None:
        better = look.value > memory.value
        memory.best = torch.where(per_sample(better, jobs.x).bool(), jobs.x, memory.best)
        memory.value = torch.where(better, look.value, memory.value)
        moved = self.around(memory.best, jobs, jobs.step + 1)
        jobs.x = project(moved, jobs.inputs, jobs.eps, self.norm)

    def around(self, centres: Tensor, jobs: Jobs, query: Tensor) -> Tensor:
        """Random points around `centres`, a stream a query."""
        points = centres.clone()
        for stream in sorted(set(query.tolist())):
            rows = query == stream
            points[rows] = random_point(
                centres[rows],
                jobs.eps[rows] / (stream + 1) ** 0.5,
                self.norm,
                seed=self.seed,
                stream=stream,
                indices=jobs.index[rows].tolist(),
            )
        return points


def random_search(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    queries: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Attack by random search in the ball; needs no gradients.

    The first query is `flatreg.threat.random_point`; a smaller budget is the beginning of a larger
    one. Arguments, result and errors as in `flatreg.attacks.pgd`.

    Raises:
        ValueError: also fewer than 1 query.
    """
    if queries < 1:
        raise ValueError(f"queries must be >= 1, got {queries}")
    search = _RandomSearch(queries, check_norm(norm), seed)
    return run(
        search,
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
    )
