"""Auto-PGD: momentum, and a step size that halves where progress stalls.

Linf and L2: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", ICML 2020, algorithm 1. L1: Croce and Hein, "Mind the box: l1-APGD
for sparse adversarial attacks on image classifiers", ICML 2021, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackResult, Callback
from flatreg.attacks.query import QueryResult
from flatreg.attacks.search import Jobs, random_starts, run
from flatreg.threat import Norm, check_norm, per_sample, project, steepest_direction

_MOMENTUM = 0.75  # the paper's alpha
_RISING = 0.75  # the paper's rho: share of steps of an interval that must have raised the loss
_DENSITY = 0.2  # L1: share of pixels the first steps move
_SPARSER = 1.5  # L1: a step moves this much fewer pixels than the best point has moved
_SMALLEST = 10.0  # L1: the step size falls to this part of the radius at most
_RADII = ((0.3, 3.0), (0.3, 2.0), (0.4, 1.0))  # L1: share of the steps, radius in units of eps


@dataclass
class _Memory:
    """What a job remembers: the step before, the best point, how well it has been going."""

    gradient: Tensor
    previous: Tensor
    value: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    step_size: Tensor
    rises: Tensor
    checked_value: Tensor
    halved: Tensor
    density: Tensor
    checked_pixels: Tensor


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
    return marks


@dataclass(frozen=True)
class _AutoDescent:
    steps: int
    loss: LossName
    norm: Norm
    seed: int
    gradients: bool = True

    @property
    def may_leave_ball(self) -> bool:
        return self.norm == "l1"

    @property
    def looks(self) -> int:
        return self.steps + 1

    @property
    def phases(self) -> list[tuple[int, float]]:
        """Number of looks and radius, in units of eps, of each phase."""
        if self.norm != "l1" or self.steps < 10:
            return [(self.looks, 1.0)]
        early = [(int(share * self.steps), radius) for share, radius in _RADII[:-1]]
        return [*early, (self.looks - sum(n for n, _ in early), 1.0)]

    def timetable(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each look: its radius in units of eps; does a phase begin; steps since the review.

        The last is 0 where nothing is reviewed. One entry more than there are looks.
        """
        radii, begins, reviewed = [], [], []
        for looks, radius in self.phases:
            every = max(int(0.04 * self.steps), 1)
            marks = range(every, looks, every) if self.norm == "l1" else checkpoints(looks - 1)
            before = {mark: mark - last for last, mark in zip([0, *marks], marks, strict=False)}
            radii += [radius] * looks
            begins += [True] + [False] * (looks - 1)
            reviewed += [before.get(step, 0) for step in range(looks)]
        end = like.new_tensor([*radii, 1.0])
        device = like.device
        return (
            end,
            torch.tensor([*begins, False], device=device),
            torch.tensor([*reviewed, 0], device=device),
        )

    def begin(self, jobs: Jobs) -> _Memory:
        eps, radius = jobs.eps, self.phases[0][1]
        jobs.eps = radius * eps
        random_starts(jobs, self.norm, self.seed)
        jobs.eps = eps
        x, lowest = jobs.x, torch.full(jobs.eps.shape[:1], -torch.inf).to(jobs.x)
        none, zero = torch.zeros_like(jobs.labels), torch.zeros_like(x)
        pixels = torch.full_like(lowest, x[0].numel() if len(x) else 1)
        return _Memory(
            gradient=zero,
            previous=x,
            value=lowest,
            best=x,
            best_gradient=zero,
            best_value=lowest,
            step_size=torch.ones_like(lowest),
            rises=none,
            checked_value=lowest,
            halved=none.bool(),
            density=torch.full_like(lowest, _DENSITY),
            checked_pixels=pixels,
        )

    def advance(self, jobs: Jobs, memory: _Memory, look: QueryResult) -> None:
        radii, begins, reviewed = self.timetable(jobs.x)
        first, steps_reviewed = begins[jobs.step], reviewed[jobs.step]
        _learn(jobs, memory, look, first)
        radius = jobs.eps * per_sample(radii[jobs.step], jobs.x)
        if self.norm == "l1":
            _review_sparse(jobs, memory, first, steps_reviewed > 0)
            moved = _sparse_step(jobs.x, memory, radius)
            moved = project(moved, jobs.inputs, radius, "l1")
        else:
            _review(jobs, memory, first, steps_reviewed)
            size = (2 * per_sample(memory.step_size, jobs.x)) * radius
            moved = jobs.x + size * steepest_direction(memory.gradient, self.norm)
            moved = project(moved, jobs.inputs, radius, self.norm)
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
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = None,
    loss: LossName = "rescaled_cross_entropy",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Attack by APGD from random starts; a sample leaves the batch the moment it is fooled.

    Arguments, result and errors as in `flatreg.attacks.pgd`; the step size is the method's own.
    With `targets` it aims at each of that many likeliest other classes in turn, `restarts` times.
    """
    search = _AutoDescent(steps, loss, check_norm(norm), seed)
    return run(
        search,
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        restarts=restarts,
        targets=targets,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
    )


def _learn(jobs: Jobs, memory: _Memory, look: QueryResult, first: Tensor) -> None:
    """Take in the look at `jobs.x`; where a phase begins, forget what came before."""
    memory.rises = torch.where(first, 0, memory.rises + (look.value > memory.value))
    memory.value, memory.gradient = look.value, look.gradient
    better = first | (look.value > memory.best_value)
    at = per_sample(better, jobs.x).bool()
    memory.best = torch.where(at, jobs.x, memory.best)
    memory.best_gradient = torch.where(at, look.gradient, memory.best_gradient)
    memory.best_value = torch.where(better, look.value, memory.best_value)
    memory.checked_value = torch.where(first, look.value, memory.checked_value)
    memory.halved = memory.halved & ~first
    memory.step_size = torch.where(first, 1.0, memory.step_size)


def _review(jobs: Jobs, memory: _Memory, first: Tensor, steps: Tensor) -> None:
    """Where progress stalled, halve the step and go back to the best point.

    The next rise is counted against the point that was left, as in the authors' code.
    """
    due = steps > 0
    few_rises = memory.rises < _RISING * steps
    no_gain = ~memory.halved & (memory.best_value <= memory.checked_value)
    stalled = due & (few_rises | no_gain)
    memory.halved = torch.where(due, stalled, memory.halved)
    memory.step_size = torch.where(stalled, memory.step_size / 2, memory.step_size)
    _go_back(jobs, memory, stalled)
    memory.checked_value = torch.where(due, memory.best_value, memory.checked_value)
    memory.rises = torch.where(due, 0, memory.rises)


def _review_sparse(jobs: Jobs, memory: _Memory, first: Tensor, due: Tensor) -> None:
    """Move fewer pixels at a time; while the best point gets sparser, restart from it at full step.

    Elsewhere shorten the step.
    """
    count = jobs.x[0].numel()
    pixels = (memory.best != jobs.inputs).flatten(1).sum(1).to(memory.density)
    memory.checked_pixels = torch.where(first, float(count), memory.checked_pixels)
    sparser = due & (pixels < 0.95 * memory.checked_pixels)
    shorter = (memory.step_size / _SPARSER).clamp_min(1 / _SMALLEST)
    memory.step_size = torch.where(due & ~sparser, shorter, memory.step_size)
    memory.step_size = torch.where(sparser, 1.0, memory.step_size)
    memory.density = torch.where(due, pixels / count / _SPARSER, memory.density)
    memory.checked_pixels = torch.where(due, pixels, memory.checked_pixels)
    _go_back(jobs, memory, sparser)


def _go_back(jobs: Jobs, memory: _Memory, where: Tensor) -> None:
    at = per_sample(where, jobs.x).bool()
    jobs.x = torch.where(at, memory.best, jobs.x)
    memory.gradient = torch.where(at, memory.best_gradient, memory.gradient)


def _sparse_step(x: Tensor, memory: _Memory, radius: Tensor) -> Tensor:
    """Move the share `density` of the pixels, those of largest gradient, all by the same amount."""
    slope = memory.gradient.abs().flatten(1)
    count = slope.shape[1]
    kept = (memory.density * count).long().clamp(1, count)
    threshold = slope.sort(1, descending=True).values.gather(1, kept[:, None] - 1)
    chosen = ((slope >= threshold) & (slope > 0)).reshape(x.shape).to(x)
    amount = chosen.flatten(1).sum(1).clamp_min(1)
    size = per_sample(memory.step_size / amount, x) * radius
    return x + size * chosen * memory.gradient.sign()
