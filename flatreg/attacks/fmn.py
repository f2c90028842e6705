r"""Fast minimum norm: a ball that shrinks where the point is adversarial and grows where it is not.

.. math:: x \leftarrow \Pi_{\|x - x_0\| \le r}(x + a\, r\, d(x)), \qquad
          r \leftarrow \|x - x_0\| - L(x) / \|\nabla L(x)\|_*

with L the negative margin, d the steepest direction of the norm, and a falling with the steps.
Pintor, Roli, Brendel, Biggio, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints", NeurIPS 2021, algorithm 1. What differs, and why:

- The radius follows the linear estimate to the end. Once an adversarial point is known it changes
  by a share gamma at most, 0.5 at first, and stays below the distance of the closest; the paper
  multiplies it by 1 +- gamma, 0.05 at first. Until one is known the estimate is stretched more and
  more, and leaves out the pixels held by the box: the paper's falls short there, and found nothing
  for some samples of affine models.
- The step is the steepest of the norm, in units of the radius, and not L2-normalised in pixels; and
  no longer than the linear estimate asks for until a point is found. It takes no tuning to images
  and norms, and reaches the corners that Linf asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackResult, Callback
from flatreg.attacks.query import QueriedModel, QueryResult
from flatreg.attacks.search import Jobs, random_starts, run
from flatreg.threat import (
    Norm,
    check_norm,
    distance,
    dual_length,
    per_sample,
    project,
    steepest_step,
    whole_box,
)

_STEP = (0.5, 0.01)  # first and last step, in units of the radius
_CHANGE = (0.5, 1e-4)  # first and last share by which the radius may change: the paper's gamma
_OVERSHOOT = (1.1, 0.1)  # factor of the linear estimate of the way left, and its growth a step
_HALVINGS = 10  # passes of the bisection


@dataclass
class _Memory:
    """The radius of a job, whether it has met an adversarial point, the distance of the closest."""

    radius: Tensor
    found: Tensor
    closest: Tensor


@dataclass(frozen=True)
class _MinimumNorm:
    steps: int
    norm: Norm
    nearest: bool
    jobs_each: int  # those of a number below begin at the image
    seed: int
    loss: LossName = "margin"
    gradients: bool = True
    may_leave_ball: bool = True

    @property
    def looks(self) -> int:
        return self.steps + 1

    def begin(self, jobs: Jobs) -> _Memory:
        zero = torch.zeros(len(jobs.x)).to(jobs.x)
        return _Memory(radius=zero, found=zero.bool(), closest=zero + torch.inf)

    def advance(self, jobs: Jobs, memory: _Memory, look: QueryResult) -> None:
        share = (1 + torch.cos(math.pi * jobs.step.to(jobs.x) / self.steps)) / 2  # 1 to 0
        gradient = _free(jobs.x, look.gradient)
        slope = dual_length(gradient, self.norm)
        way = -look.value / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        memory.found = memory.found | (way < 0)
        factor = _OVERSHOOT[0] + _OVERSHOOT[1] * jobs.step.to(way)
        way = torch.where(memory.found, way, factor * way)
        self._adapt(jobs, memory, way, _CHANGE[1] + (_CHANGE[0] - _CHANGE[1]) * share)
        size = (_STEP[1] + (_STEP[0] - _STEP[1]) * share) * memory.radius
        if self.nearest:
            size = torch.where(memory.found, size, torch.minimum(size, way))
        radius = per_sample(memory.radius, jobs.x)
        moved = steepest_step(jobs.x, gradient, per_sample(size, jobs.x), self.norm)
        jobs.x = project(moved, jobs.inputs, radius, self.norm)
        self._restart(jobs, radius)

    def _adapt(self, jobs: Jobs, memory: _Memory, way: Tensor, change: Tensor) -> None:
        """Set the radius to that of the boundary, which is `way` further (negative: nearer)."""
        length = distance(jobs.x, jobs.inputs, self.norm).to(way)
        adversarial, least = way < 0, _CHANGE[1]
        closer = torch.where(adversarial, length, torch.inf)
        memory.closest = torch.minimum(memory.closest, closer)
        radius = length + way
        low = torch.where(memory.found, (1 - change) * memory.radius, 0)
        high = torch.where(memory.found, (1 + change) * memory.radius, torch.inf)
        radius = torch.minimum(torch.maximum(radius, low), high)
        radius = torch.where(
            adversarial,
            torch.minimum(radius, (1 - least) * memory.radius),
            torch.maximum(radius, (1 + least) * torch.minimum(memory.radius, length)),
        )
        radius = torch.minimum(radius, (1 - least) * memory.closest)
        eps = jobs.eps.flatten()
        # With eps given the search still goes out as far as it takes, and comes back: where
        # gradients mislead, the way into the ball leads past it.
        low = 0 * eps if self.nearest else eps
        memory.radius = torch.maximum(radius, low).clamp_max(whole_box(jobs.inputs, self.norm))

    def _restart(self, jobs: Jobs, radius: Tensor) -> None:
        """After the look at the image, which has told how large the ball must be, go anywhere."""
        among = (jobs.step == 0) & (jobs.number >= self.jobs_each)
        if not bool(among.any()):
            return
        eps, moved, jobs.eps = jobs.eps, jobs.x, radius
        random_starts(jobs, self.norm, self.seed, among=among)
        jobs.eps, jobs.x = eps, torch.where(per_sample(among, moved).bool(), jobs.x, moved)


def fmn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor | None = None,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Look for the closest adversarial image, or, with `eps`, for the first one within eps.

    Arguments, result and errors as in `flatreg.attacks.pgd`; the step size is the method's own. The
    first search starts at the image itself, restarts at a random point as far away as the margin,
    made linear, changes sign. With `targets` it aims at each of that many likeliest other classes
    in turn, `restarts` times.

    With `eps` a sample leaves when fooled within it, and the ball never shrinks below it. Without,
    nobody leaves; the segment from the image to the closest adversarial one is bisected in 10
    forward passes, so that `flatreg.threat.distance` of what is returned is that of the boundary;
    `fooled` says whether an adversarial image was met at all, and elsewhere the image is returned.
    """
    known, jobs_each, counted = check_norm(norm), targets or 1, 0
    if targets and restarts > 1 and len(inputs):  # what `run` takes for a restart
        classes = QueriedModel(model).logits(inputs[:1]).shape[1]
        jobs_each, counted = min(targets, classes - 1), 1
    search = _MinimumNorm(steps, known, eps is None, jobs_each, seed)
    result = run(
        search,
        model,
        inputs,
        labels,
        eps=whole_box(inputs, known) if eps is None else eps,
        norm=norm,
        restarts=restarts,
        targets=targets,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
        nearest=eps is None,
    )
    result = replace(result, forwards=result.forwards + counted)
    return _polish(model, inputs, labels, result, batch_size) if eps is None else result


def _free(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, zero at the pixels that stand at the end of the box it points to."""
    held = ((gradient > 0) & (x >= 1)) | ((gradient < 0) & (x <= 0))
    return torch.where(held, 0, gradient)


def _polish(
    model: nn.Module, inputs: Tensor, labels: Tensor, result: AttackResult, batch_size: int | None
) -> AttackResult:
    """Bisect the segment from the image to what was found, where that is not the image itself.

    The search ends next to the boundary: the bracket opens there and doubles until an end of it
    keeps its label; bisection from the image would spend its passes on the way.
    """
    moved = (result.inputs != inputs).flatten(1).any(1)
    rows = (result.fooled & moved).nonzero().flatten()
    if not len(rows):
        return result
    victim, images, near = QueriedModel(model, batch_size), result.inputs.clone(), inputs[rows]
    away, labels = images[rows] - near, labels[rows].long()
    low, high = torch.zeros(len(rows)).to(images), torch.ones(len(rows)).to(images)
    gap, bracketed = high / 2**_HALVINGS, low.bool()
    for _ in range(_HALVINGS):
        at = torch.where(bracketed, (low + high) / 2, (high - gap).clamp_min(0))
        x = (near + per_sample(at, near) * away).clamp(0, 1)
        wrong = victim.logits(x).argmax(1) != labels
        images[rows[wrong]] = x[wrong]
        low, high = torch.where(wrong, low, at), torch.where(wrong, at, high)
        gap, bracketed = 2 * gap, bracketed | ~wrong
    return replace(result, inputs=images, forwards=result.forwards + victim.forwards)
