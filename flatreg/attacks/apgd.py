"""Auto-PGD: momentum, and a step size that halves where progress stalls.

Linf and L2: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", ICML 2020, algorithm 1. L1: Croce and Hein, "Mind the box: l1-APGD
for sparse adversarial attacks on image classifiers", ICML 2021, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueryResult, loss_and_gradient
from flatreg.attacks.search import Jobs, first_jobs, random_points, run
from flatreg.data.configuration import whole
from flatreg.threat import DenseNorm, Norm, check_norm, per_sample, project, steepest_direction

_MOMENTUM = 0.75  # the paper's alpha
_RISING = 0.75  # the paper's rho: part of the steps of an interval that must have raised the loss
_DENSITY = 0.2  # L1: part of the pixels that the first steps move
_SPARSER = 1.5  # L1: a step moves this much fewer pixels than the best point has moved
_SMALLEST = 10.0  # L1: the step size falls to this part of the radius at most
_EARLY = ((0.3, 3.0), (0.3, 2.0))  # L1, the first phases: part of the steps, radius / eps


@dataclass
class _Memory:
    gradient: Tensor  # at the point that the next step starts from
    previous: Tensor  # the point before, for the momentum
    value: Tensor  # loss at the query before, which the next one must exceed to be a rise
    best: Tensor  # point of largest loss in this phase, its gradient and its loss
    best_gradient: Tensor
    best_value: Tensor
    step_size: Tensor  # in units of twice the radius (L1: of the radius)
    rises: Tensor  # how often the loss has risen since the last review
    reviewed_value: Tensor  # largest loss at the last review
    halved: Tensor  # whether the last review halved the step size
    density: Tensor  # L1: part of the pixels that the next step moves
    reviewed_pixels: Tensor  # L1: how many pixels the best point had moved at the last review


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step size is reviewed: gaps of 0.22, then 0.03 less, at least 0.06.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    marks, position, gap = [], 0.0, 0.22
    while position + gap < 1:
        position += gap
        marks.append(round(position * steps))
        gap = max(gap - 0.03, 0.06)
    return list(dict.fromkeys(marks))  # of few steps some fall together


@dataclass(frozen=True)
class AutoDescent:
    """The search: `steps` of each job on `loss`, from a random point keyed by `seed`."""

    steps: int
    loss: LossName
    norm: Norm
    seed: int
    gradients: bool = True

    @property
    def may_leave_ball(self) -> bool:
        """Whether it is L1, whose first phases search larger balls."""
        return self.norm == "l1"

    @property
    def queries(self) -> int:
        """Number of points, the start included."""
        return self.steps + 1

    def timetable(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each query: its radius in units of eps; does a phase begin; steps since the review.

        The last is 0 at queries after which nothing is reviewed.
        """
        phases = [(self.queries, 1.0)]
        if self.norm == "l1" and self.steps >= 10:
            early = [(int(part * self.steps), radius) for part, radius in _EARLY]
            phases = [*early, (self.queries - sum(queries for queries, _ in early), 1.0)]
        radii, begins, reviewed = [], [], []
        for queries, radius in phases:
            every = max(int(0.04 * self.steps), 1)
            marks = range(every, queries, every) if self.norm == "l1" else checkpoints(queries - 1)
            before = {mark: mark - last for last, mark in zip([0, *marks], marks, strict=False)}
            radii += [radius] * queries
            begins += [True] + [False] * (queries - 1)
            reviewed += [before.get(step, 0) for step in range(queries)]
        # One entry more than there are queries: jobs read that of the query to come.
        return (
            like.new_tensor([*radii, 1.0]),
            torch.tensor([*begins, False], device=like.device),
            torch.tensor([*reviewed, 0], device=like.device),
        )

    def init(self, jobs: Jobs) -> _Memory:
        """Start at random points."""
        radii, *_ = self.timetable(jobs.x)
        jobs.x = random_points(jobs, self.norm, self.seed, radius=radii[0] * jobs.eps)
        return self.begun(jobs)

    def begun(self, jobs: Jobs) -> _Memory:
        """Memory of jobs that have not queried their first point `jobs.x`."""
        # Fields may share a tensor: `step` assigns new ones and writes into none.
        lowest = torch.full(jobs.row.shape, -torch.inf).to(jobs.x)
        none, nowhere = torch.zeros_like(jobs.row), torch.zeros_like(jobs.x)
        return _Memory(
            gradient=nowhere,
            previous=jobs.x,
            value=lowest,
            best=jobs.x,
            best_gradient=nowhere,
            best_value=lowest,
            step_size=torch.ones_like(lowest),
            rises=none,
            reviewed_value=lowest,
            halved=none.bool(),
            density=torch.full_like(lowest, _DENSITY),
            reviewed_pixels=torch.full_like(lowest, jobs.x[0].numel()),
        )

    def step(self, jobs: Jobs, memory: _Memory, answer: QueryResult) -> None:
        """Review the step size where it is time, and step."""
        radii, begins, reviewed = self.timetable(jobs.x)
        first, steps_reviewed = begins[jobs.step], reviewed[jobs.step]
        _record(jobs, memory, answer, first)
        radius = jobs.eps * per_sample(radii[jobs.step], jobs.x)
        if self.norm == "l1":
            _review_sparse(jobs, memory, first, steps_reviewed > 0)
            moved = _sparse_step(jobs.x, memory, radius)
            moved = project(moved, jobs.inputs, radius, "l1")
        else:
            _review(jobs, memory, steps_reviewed)
            size = (2 * per_sample(memory.step_size, jobs.x)) * radius
            moved = jobs.x + size * steepest_direction(memory.gradient, self.norm)
            moved = project(moved, jobs.inputs, radius, self.norm)
            # The first step of a phase has none before it. The momentum is the way from where the
            # last step started, also where a review has just gone back to the best point.
            momentum = per_sample(torch.where(first, 1.0, _MOMENTUM), jobs.x)
            moved = jobs.x + momentum * (moved - jobs.x)
            moved = moved + (1 - momentum) * (jobs.x - memory.previous)
            moved = project(moved, jobs.inputs, radius, self.norm)
        memory.previous, jobs.x = jobs.x, moved
        entering = begins[jobs.step + 1]
        if bool(entering.any()):  # the next phase starts from the best point, in a smaller ball
            after = jobs.eps * per_sample(radii[jobs.step + 1], jobs.x)
            restart = project(memory.best, jobs.inputs, after, self.norm)
            jobs.x = torch.where(per_sample(entering, moved).bool(), restart, moved)


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = None,
    loss: LossName = "rescaled_cross_entropy",
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Attack by APGD from random starts.

    Arguments, result and errors as in `flatreg.attacks.pgd`; the step size is the method's own.
    With `targets` it aims at each of that many likeliest other classes in turn, `restarts` times.
    """
    common = complete(options, "apgd")
    steps, norm = whole("steps", steps, 1), check_norm(common["norm"])
    search = AutoDescent(steps, loss, norm, common["seed"])
    return run(search, model, inputs, labels, common, eps=eps, restarts=restarts, targets=targets)


def apgd_maximum(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    start: Tensor,
    norm: DenseNorm,
) -> Tensor:
    """Points of largest cross-entropy that APGD meets from `start`, for all samples, fooled or not.

    Arguments as in `apgd`, unchecked. The last point is only passed forward.
    """
    search = AutoDescent(steps, "cross_entropy", norm, seed=0)
    jobs = replace(first_jobs(inputs, labels, eps), x=start)
    memory = search.begun(jobs)
    for _ in range(steps):
        answer = QueryResult(*loss_and_gradient(model, jobs.x, labels, search.loss))
        search.step(jobs, memory, answer)
        jobs.step = jobs.step + 1
    value, *_ = loss_and_gradient(model, jobs.x, labels, search.loss, gradient=False)
    higher = per_sample(value > memory.best_value, inputs).bool()
    return torch.where(higher, jobs.x, memory.best)


def _record(jobs: Jobs, memory: _Memory, answer: QueryResult, first: Tensor) -> None:
    """Update the best point; where a phase begins, forget the phase before.

    Points of a larger ball are not compared with those of a smaller one.
    """
    memory.rises = torch.where(first, 0, memory.rises + (answer.value > memory.value))
    memory.value, memory.gradient = answer.value, answer.gradient
    better = first | (answer.value > memory.best_value)
    at = per_sample(better, jobs.x).bool()
    memory.best = torch.where(at, jobs.x, memory.best)
    memory.best_gradient = torch.where(at, answer.gradient, memory.best_gradient)
    memory.best_value = torch.where(better, answer.value, memory.best_value)
    memory.reviewed_value = torch.where(first, answer.value, memory.reviewed_value)
    memory.halved = memory.halved & ~first
    memory.step_size = torch.where(first, 1.0, memory.step_size)


def _review(jobs: Jobs, memory: _Memory, steps: Tensor) -> None:
    """Halve the step size and go back to the best point where progress stalled.

    `steps` `(m,)` are those since the last review; 0 where none is due.
    """
    due = steps > 0
    few_rises = memory.rises < _RISING * steps
    # A step size just halved gets one interval more: a smaller step needs longer to gain.
    no_gain = ~memory.halved & (memory.best_value <= memory.reviewed_value)
    stalled = due & (few_rises | no_gain)
    memory.halved = torch.where(due, stalled, memory.halved)
    memory.step_size = torch.where(stalled, memory.step_size / 2, memory.step_size)
    # `value` is not set back: the next query counts as a rise against the point that was left, as
    # in the authors' code, and not against the best one.
    _go_back(jobs, memory, stalled)
    memory.reviewed_value = torch.where(due, memory.best_value, memory.reviewed_value)
    memory.rises = torch.where(due, 0, memory.rises)


def _review_sparse(jobs: Jobs, memory: _Memory, first: Tensor, due: Tensor) -> None:
    """Set how many pixels the next steps move: fewer than the best point has moved so far.

    While the best point gets sparser, the search goes on from it at the full step size. Where it
    does not, the step size is divided by 1.5.
    """
    count = jobs.x[0].numel()
    pixels = (memory.best != jobs.inputs).flatten(1).sum(1).to(memory.density)
    # The first review of a phase compares with all pixels, and so finds nearly any point sparser.
    memory.reviewed_pixels = torch.where(first, float(count), memory.reviewed_pixels)
    sparser = due & (pixels < 0.95 * memory.reviewed_pixels)
    shorter = (memory.step_size / _SPARSER).clamp_min(1 / _SMALLEST)
    memory.step_size = torch.where(due & ~sparser, shorter, memory.step_size)
    memory.step_size = torch.where(sparser, 1.0, memory.step_size)
    memory.density = torch.where(due, pixels / count / _SPARSER, memory.density)
    memory.reviewed_pixels = torch.where(due, pixels, memory.reviewed_pixels)
    _go_back(jobs, memory, sparser)


def _go_back(jobs: Jobs, memory: _Memory, where: Tensor) -> None:
    """Step from the best point next: its gradient is known, so that no query is spent on it."""
    at = per_sample(where, jobs.x).bool()
    jobs.x = torch.where(at, memory.best, jobs.x)
    memory.gradient = torch.where(at, memory.best_gradient, memory.gradient)


def _sparse_step(x: Tensor, memory: _Memory, radius: Tensor) -> Tensor:
    """Move the part `density` of the pixels, those of largest gradient, all by the same amount."""
    slope = memory.gradient.abs().flatten(1)
    count = slope.shape[1]
    kept = (memory.density * count).long().clamp(1, count)
    threshold = slope.sort(1, descending=True).values.gather(1, kept[:, None] - 1)
    # Pixels that tie with the last one move too; those without a gradient never do.
    chosen = ((slope >= threshold) & (slope > 0)).reshape(x.shape).to(x)
    amount = chosen.flatten(1).sum(1).clamp_min(1)
    size = per_sample(memory.step_size / amount, x) * radius  # its L1 length is step_size x radius
    return x + size * chosen * memory.gradient.sign()
