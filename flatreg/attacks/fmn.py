r"""Fast minimum norm: a ball that shrinks where the point is adversarial and grows where it is not.

.. math:: x \leftarrow \Pi_{\|x - x_0\| \le r}(x + a\, r\, d(x)), \qquad
          r \leftarrow \|x - x_0\| - L(x) / \|\nabla L(x)\|_*

with L the negative margin, d the steepest direction of the norm, and a falling with the steps.
Pintor, Roli, Brendel, Biggio, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints", NeurIPS 2021, algorithm 1. What differs, and why:

- The radius follows the linear estimate to the end. Once an adversarial point is known it changes
  by a part gamma at most, 0.5 at first, and stays below the distance of the closest; the paper
  multiplies it by 1 +- gamma, 0.05 at first. Until one is known the estimate is stretched more and
  more, and leaves out the pixels held by the box: the paper's is too short there, and found
  nothing for some samples of affine models.
- The step is the steepest of the norm, in units of the radius, and not L2-normalised in pixels; and
  no longer than the linear estimate asks for until a point is found. It takes no tuning to images
  and norms, and reaches the corners that Linf asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueriedModel, QueryResult
from flatreg.attacks.search import Jobs, random_points, run
from flatreg.data.configuration import whole
from flatreg.models.precision import class_indices
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
_CHANGE = (0.5, 1e-4)  # first and last part by which the radius may change: the paper's gamma
_OVERSHOOT = (1.1, 0.1)  # factor of the linear estimate of the way left, and its growth a step
_HALVINGS = 10  # passes of the bisection


@dataclass
class _Memory:
    radius: Tensor  # of the ball the next point lies in
    found: Tensor  # whether an adversarial point is known
    closest: Tensor  # distance of the closest one; infinite until then


@dataclass(frozen=True, kw_only=True)
class MinimumNorm:
    """The search.

    Attributes:
        steps: of each job.
        norm: of the balls.
        nearest: search for the closest point, and not only for one within eps.
        jobs_each: jobs of a lower number start at the image, the others at random.
        seed: of the random starts.
        distances: `(samples, jobs)`: where given, the distance of the closest adversarial point
            that each job knows is written there, before its last step.
    """

    steps: int
    norm: Norm
    nearest: bool
    jobs_each: int
    seed: int
    distances: Tensor | None = None
    loss: LossName = "margin"
    gradients: bool = True
    may_leave_ball: bool = True

    @property
    def queries(self) -> int:
        """Number of points, the start included."""
        return self.steps + 1

    def init(self, jobs: Jobs) -> _Memory:
        """Start at the image: its gradient says how large the ball of a random start must be."""
        zero = torch.zeros(len(jobs.x)).to(jobs.x)
        return _Memory(radius=zero, found=zero.bool(), closest=zero + torch.inf)

    def step(self, jobs: Jobs, memory: _Memory, answer: QueryResult) -> None:
        """Set the radius by the linear estimate, and step to the ball's boundary."""
        annealed = (1 + torch.cos(math.pi * jobs.step.to(jobs.x) / self.steps)) / 2  # 1 to 0
        # Without the pixels at the end of the box that the gradient points to: they cannot move, so
        # that with them the linear estimate of the way to the boundary would be too short.
        held = ((answer.gradient > 0) & (jobs.x >= 1)) | ((answer.gradient < 0) & (jobs.x <= 0))
        gradient = torch.where(held, 0, answer.gradient)
        slope = dual_length(gradient, self.norm)
        way = -answer.value / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        memory.found = memory.found | (way < 0)
        # Where a curved loss makes the estimate too short, overshooting more at each step ends the
        # approach; once an adversarial point is known the radius is bounded from both sides.
        factor = _OVERSHOOT[0] + _OVERSHOOT[1] * jobs.step.to(way)
        way = torch.where(memory.found, way, factor * way)
        self._adapt(jobs, memory, way, _CHANGE[1] + (_CHANGE[0] - _CHANGE[1]) * annealed)
        if self.distances is not None:
            self.distances[jobs.row, jobs.number] = memory.closest
        size = (_STEP[1] + (_STEP[0] - _STEP[1]) * annealed) * memory.radius
        if self.nearest:  # no further than the estimate, so that the first one met is close
            size = torch.where(memory.found, size, torch.minimum(size, way))
        radius = per_sample(memory.radius, jobs.x)
        moved = steepest_step(jobs.x, gradient, per_sample(size, jobs.x), self.norm)
        jobs.x = project(moved, jobs.inputs, radius, self.norm)
        # After the query at the image, restarts go to a random point of the ball it has led to.
        among = (jobs.step == 0) & (jobs.number >= self.jobs_each)
        if bool(among.any()):
            points = random_points(jobs, self.norm, self.seed, among=among, radius=radius)
            jobs.x = torch.where(per_sample(among, points).bool(), points, jobs.x)

    def _adapt(self, jobs: Jobs, memory: _Memory, way: Tensor, change: Tensor) -> None:
        """Set the radius to the estimated distance of the boundary.

        Args:
            jobs: of any age.
            memory: of theirs.
            way: estimated distance from the point to the boundary `(m,)`, negative where the point
                is adversarial and the boundary nearer to the image.
            change: part by which the radius may change `(m,)`.
        """
        length = distance(jobs.x, jobs.inputs, self.norm).to(way)
        adversarial, least = way < 0, _CHANGE[1]
        closer = torch.where(adversarial, length, torch.inf)
        memory.closest = torch.minimum(memory.closest, closer)
        # Until an adversarial point is known the estimate alone decides: a bound on the change
        # would not let the ball, which starts at radius 0, grow at all.
        radius = length + way
        low = torch.where(memory.found, (1 - change) * memory.radius, 0)
        high = torch.where(memory.found, (1 + change) * memory.radius, torch.inf)
        radius = torch.minimum(torch.maximum(radius, low), high)
        # Whatever the estimate says, the ball shrinks a little after an adversarial point and grows
        # a little after another one (from the point itself, where the box holds it inside the
        # ball), so that the radius never stands still on the wrong side of the boundary.
        radius = torch.where(
            adversarial,
            torch.minimum(radius, (1 - least) * memory.radius),
            torch.maximum(radius, (1 + least) * torch.minimum(memory.radius, length)),
        )
        # No point as far away as the closest adversarial one can improve on it.
        radius = torch.minimum(radius, (1 - least) * memory.closest)
        eps = jobs.eps.flatten()
        # With eps given the search still goes out as far as it takes, and comes back: where
        # gradients mislead, the way into the ball leads past it.
        low = 0 * eps if self.nearest else eps
        memory.radius = torch.maximum(radius, low).clamp_max(whole_box(jobs.inputs, self.norm))


def fmn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = None,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Search for the closest adversarial image, or, with `eps`, for the first one within eps.

    Arguments, result and errors as in `flatreg.attacks.pgd`; the step size is the method's own. The
    first search starts at the image itself, restarts at a random point as far away as the margin,
    made linear, changes sign. With `targets` it aims at each of that many likeliest other classes
    in turn, `restarts` times.

    With `eps` a sample is dropped once it is fooled within eps, and the ball never shrinks below
    eps. Without, all searches go on to the last step; the segment from the image to the closest
    adversarial one is then bisected in 10 forward passes, so that `flatreg.threat.distance` of what
    is returned is that of the boundary. `fooled` says whether an adversarial image was met at all;
    elsewhere the image is returned.
    """
    common, labels = complete(options, "fmn"), class_indices(labels, "an attack", len(inputs))
    targets = None if targets is None else whole("targets", targets, 1)
    norm, jobs_each, counted = check_norm(common["norm"]), targets or 1, 0
    if targets and restarts > 1 and len(inputs):
        # Restarts begin at the number of targets, of which there are no more than other classes.
        classes = QueriedModel(model).logits(inputs[:1]).shape[1]
        jobs_each, counted = min(targets, classes - 1), 1
    nearest, steps = eps is None, whole("steps", steps, 1)
    search = MinimumNorm(
        steps=steps, norm=norm, nearest=nearest, jobs_each=jobs_each, seed=common["seed"]
    )
    result = run(
        search,
        model,
        inputs,
        labels,
        common,
        eps=whole_box(inputs, norm) if eps is None else eps,
        restarts=restarts,
        targets=targets,
        nearest=nearest,
    )
    result = replace(result, forwards=result.forwards + counted)
    return _polish(model, inputs, labels, result, common["batch_size"]) if nearest else result


def _polish(
    model: nn.Module, inputs: Tensor, labels: Tensor, result: AttackResult, batch_size: int | None
) -> AttackResult:
    """Bisect the segment from the image to what was found, where that is not the image itself."""
    moved = (result.inputs != inputs).flatten(1).any(1)
    rows = (result.fooled & moved).nonzero().flatten()
    if not len(rows):
        return result
    queried, images, near = QueriedModel(model, batch_size), result.inputs.clone(), inputs[rows]
    away, labels = images[rows] - near, labels[rows]
    low, high = torch.zeros(len(rows)).to(images), torch.ones(len(rows)).to(images)
    # The search ends next to the boundary: the bracket opens there, and its width doubles until its
    # lower end keeps the label. Bisection from the image would spend its passes on the way.
    gap, bracketed = high / 2**_HALVINGS, low.bool()
    for _ in range(_HALVINGS):
        at = torch.where(bracketed, (low + high) / 2, (high - gap).clamp_min(0))
        x = (near + per_sample(at, near) * away).clamp(0, 1)
        wrong = queried.logits(x).argmax(1) != labels
        images[rows[wrong]] = x[wrong]
        low, high = torch.where(wrong, low, at), torch.where(wrong, at, high)
        gap, bracketed = 2 * gap, bracketed | ~wrong
    return replace(result, inputs=images, forwards=result.forwards + queried.forwards)
