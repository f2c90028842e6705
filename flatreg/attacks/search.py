"""A queue of searches that keeps the batch full: one job is one (sample, target, restart).

A sample leaves the batch, with all its jobs, at the moment it is fooled; the next job takes its
place. Each job counts its own steps, so that jobs of every age share a pass. What a job does
depends on its sample and its number alone: verdicts do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackResult, Callback
from flatreg.attacks.query import QueriedModel, QueryResult
from flatreg.models.precision import class_indices
from flatreg.threat import (
    Norm,
    check_eps,
    check_norm,
    check_unit_range,
    distance,
    per_sample,
    random_point,
    rounding,
)

_REFILL = 8  # new jobs enter when an eighth of the batch is free: joining tensors costs as well


@dataclass
class Jobs:
    """Searches under way, one a row.

    Attributes:
        row: position of the sample in the batch that is attacked.
        index: identity of the sample, which keys its random streams.
        number: which of the sample's searches this is.
        step: points tried before this one.
        inputs, labels, eps: of the sample; eps broadcasts over `inputs`.
        target: class to reach, -1 for any.
        x: the point to try next.
    """

    row: Tensor
    index: Tensor
    number: Tensor
    step: Tensor
    inputs: Tensor
    labels: Tensor
    eps: Tensor
    target: Tensor
    x: Tensor


Memory = TypeVar("Memory")  # a dataclass of tensors, or None


class Search(Protocol[Memory]):
    """How one job looks for an adversarial image."""

    @property
    def looks(self) -> int:
        """Points a job tries at most."""

    @property
    def loss(self) -> LossName:
        """What it climbs."""

    @property
    def gradients(self) -> bool:
        """Whether it needs gradients."""

    @property
    def may_leave_ball(self) -> bool:
        """Whether it may try points outside the ball, which then fool nobody."""

    def begin(self, jobs: Jobs) -> Memory:
        """Set the first points of new jobs; return what each will remember, one a row."""

    def advance(self, jobs: Jobs, memory: Memory, look: QueryResult) -> None:
        """Learn from the look at `jobs.x`, in place, and set the points to try next."""


def run(
    search: Search[Any],
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str,
    restarts: int = 1,
    targets: int | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
    nearest: bool = False,
) -> AttackResult:
    """Run `search` on every sample, `restarts` times for each of its targets.

    Arguments as in `flatreg.attacks.pgd`. A sample has `restarts` jobs for each of its `targets`
    likeliest other classes, or for any class where that is left out. With `nearest` nobody leaves,
    and the closest adversarial image met is returned.

    Raises:
        ValueError: inputs outside [0,1], a bad eps or norm, no restart, no target, no step.
    """
    known = check_norm(norm)
    check_eps(eps, known)
    check_unit_range(inputs)
    if restarts < 1:
        raise ValueError(f"restarts must be >= 1, got {restarts}")
    labels = class_indices(labels, "an attack")
    if search.looks < 1:
        raise ValueError(f"expected a search of one point at least, got {search.looks}")
    victim, inputs = QueriedModel(model, batch_size), inputs.detach()
    outcome = _Outcome(
        victim, inputs, labels, known, may_leave_ball=search.may_leave_ball, nearest=nearest
    )
    if not len(inputs):
        return outcome.result()
    pool = _Pool(victim, inputs, labels, per_sample(eps, inputs), restarts, targets, indices)
    early_stop = early_stop and not nearest
    jobs = pool.take(pool.capacity)
    memory = search.begin(jobs)
    while len(jobs.row):
        last = jobs.step == search.looks - 1
        look = victim.look(
            jobs.x,
            jobs.labels,
            search.loss,
            targets=None if targets is None else jobs.target,
            gradient=search.gradients and not bool(last.all()),
        )
        outcome.take_in(jobs, look.wrong, last)
        if callback is not None:
            left = int((search.looks - 1 - jobs.step).sum()) + pool.waiting * search.looks
            callback(jobs.row, jobs.step, jobs.x, left)
        gone = last | outcome.fooled[jobs.row] if early_stop else last
        if bool(gone.any()):
            jobs, memory, look = (_keep(part, ~gone) for part in (jobs, memory, look))
        if len(jobs.row):
            search.advance(jobs, memory, look)
            jobs.step = jobs.step + 1
        free = pool.capacity - len(jobs.row)
        if pool.waiting and free * _REFILL >= pool.capacity:
            fresh = pool.take(free, skip=outcome.fooled if early_stop else None)
            if len(fresh.row):
                begun = search.begin(fresh)
                jobs, memory = _join(jobs, fresh), _join(memory, begun)
    return outcome.result()


class _Outcome:
    """What the looks have shown of each sample so far.

    Attributes:
        images: the adversarial image met last, before the first of them the last point tried by the
            last job (of a search that strays, within the ball: of the last job that tried one);
            with `nearest` the closest adversarial one.
        fooled: whether one was met, and confirmed where the model searched stands for another.
    """

    def __init__(
        self,
        victim: QueriedModel,
        inputs: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        may_leave_ball: bool,
        nearest: bool,
    ) -> None:
        self.victim, self.norm, self.may_leave_ball, self.nearest = (
            victim,
            norm,
            may_leave_ball,
            nearest,
        )
        self.slack = rounding(inputs, norm)
        self.images, self.fooled = inputs.clone(), torch.zeros_like(labels, dtype=torch.bool)
        self.of_job = torch.full_like(labels, -1)  # whose point the image of a survivor is
        self.closest = torch.full(
            labels.shape, torch.inf, dtype=torch.float64, device=labels.device
        )

    def take_in(self, jobs: Jobs, wrong: Tensor, last: Tensor) -> None:
        """Learn from a look at the jobs' points, some of them the last of their job."""
        hit, tried = wrong, last
        if self.may_leave_ball or self.nearest:
            length = distance(jobs.x, jobs.inputs, self.norm)
            tried = length <= jobs.eps.flatten() + self.slack
            hit = hit & tried
        hit = hit.masked_scatter(hit, self.victim.confirms(jobs.x[hit], jobs.labels[hit]))
        if self.nearest:
            hit = _closer(hit, jobs.row, length, self.closest)
        hit = self._one_each(jobs.row, hit)
        self.fooled[jobs.row[hit]] = True
        if not self.nearest:
            tried = tried & ~self.fooled[jobs.row]
            self.of_job.scatter_reduce_(0, jobs.row[tried], jobs.number[tried], "amax")
            tried = tried & (jobs.number == self.of_job[jobs.row])  # whatever shares the batch
            self.images[jobs.row[tried]] = jobs.x[tried]
        self.images[jobs.row[hit]] = jobs.x[hit]

    def result(self) -> AttackResult:
        """What the search comes to."""
        passes = self.victim.forwards, self.victim.backwards
        return AttackResult(self.images, self.fooled.long() - 1, *passes)

    def _one_each(self, row: Tensor, mask: Tensor) -> Tensor:
        """`mask`, of each sample the first of its jobs only: two writes to one image would mix."""
        place = torch.arange(len(row), device=row.device)
        first = torch.full_like(self.fooled, len(row), dtype=torch.long)
        first.scatter_reduce_(0, row[mask], place[mask], "amin")
        return mask & (first[row] == place)


def _closer(hit: Tensor, row: Tensor, length: Tensor, closest: Tensor) -> Tensor:
    """Which hits are nearer than their sample's closest so far, which becomes theirs, in place."""
    hit = hit & (length < closest[row])
    closest.scatter_reduce_(0, row[hit], length[hit], "amin")
    return hit & (length == closest[row])


class _Pool:
    """Jobs that wait: the first of every sample, then the second of every sample, and so on."""

    def __init__(
        self,
        victim: QueriedModel,
        inputs: Tensor,
        labels: Tensor,
        eps: Tensor,
        restarts: int,
        targets: int | None,
        indices: Sequence[int] | None,
    ) -> None:
        self.inputs, self.labels, self.eps = inputs, labels, eps
        n = len(inputs)
        index = torch.arange(n) if indices is None else torch.as_tensor(list(indices))
        self.index = index.to(labels.device)
        self.targets = torch.full_like(labels, -1)[:, None]
        if targets is not None:
            self.targets = _likeliest(victim, inputs, labels, targets)
        self.jobs_each = restarts * self.targets.shape[1]
        self.capacity = victim.batch_size or n
        self.waiting, self._next = n * self.jobs_each, 0

    def take(self, count: int, skip: Tensor | None = None) -> Jobs:
        """Start up to `count` jobs, none of samples in `skip` `(n,)`."""
        n = len(self.inputs)
        waiting = torch.arange(self._next, n * self.jobs_each, device=self.labels.device)
        if skip is not None:
            waiting = waiting[~skip[waiting % n]]
        taken = waiting[:count]
        self.waiting = len(waiting) - len(taken)
        self._next = int(taken[-1]) + 1 if len(taken) else n * self.jobs_each
        row, number = taken % n, taken // n
        target = self.targets[row, number % self.targets.shape[1]]
        x = self.inputs[row]
        return Jobs(
            row,
            self.index[row],
            number,
            torch.zeros_like(row),
            x,
            self.labels[row],
            self.eps[row],
            target,
            x,
        )


def _likeliest(victim: QueriedModel, inputs: Tensor, labels: Tensor, targets: int) -> Tensor:
    """The classes other than the label with the largest logits, `(batch, targets)`."""
    logits = victim.logits(inputs)
    if targets < 1:
        raise ValueError(f"targets must be >= 1, got {targets}")
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(targets, logits.shape[1] - 1), dim=1).indices


def _keep(rows: Any, mask: Tensor) -> Any:
    """Keep the rows of a tensor, or of a dataclass of tensors, where `mask` is true."""
    if isinstance(rows, Tensor):
        return rows[mask]
    if rows is None:
        return None
    return type(rows)(*(_keep(getattr(rows, field.name), mask) for field in fields(rows)))


def _join(one: Any, other: Any) -> Any:
    """Put the rows of `other` below those of `one`."""
    if isinstance(one, Tensor):
        return torch.cat([one, other])
    if one is None:
        return None
    names = [field.name for field in fields(one)]
    return type(one)(*(_join(getattr(one, name), getattr(other, name)) for name in names))


def random_starts(jobs: Jobs, norm: Norm, seed: int, among: Tensor | None = None) -> None:
    """Move the jobs `among` these `(m,)` to a random point of their ball, a stream a job number."""
    x = jobs.inputs.clone()
    for number in sorted(set(jobs.number.tolist())):
        here = jobs.number == number
        rows = here if among is None else here & among
        if bool(rows.any()):
            x[rows] = random_point(
                jobs.inputs[rows],
                jobs.eps[rows],
                norm,
                seed=seed,
                stream=number,
                indices=jobs.index[rows].tolist(),
            )
    jobs.x = x
