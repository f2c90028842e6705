"""The queue that every attack runs on. It keeps the batch full of searches of many samples.

A job is one search of one sample: for one target class, from one start. A sample is dropped from
the batch, with all its jobs, at the query that fools it, and the next job takes its place. Each job
counts its own steps, so that jobs of any age share a pass. What a job does depends on its sample
and its number alone, so that verdicts do not depend on the batch.

An attack is a `Search`: what one job remembers, where it starts and where it goes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LOSSES, LossName
from flatreg.attacks.options import AttackOptions, AttackResult, identities
from flatreg.attacks.query import QueriedModel, QueryResult
from flatreg.data.configuration import whole
from flatreg.models.entrance import as_labels
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


@dataclass(kw_only=True)
class Jobs:
    """Searches under way, one a row.

    Attributes:
        row: position of the sample in the batch that is attacked.
        index: identity of the sample, which keys its random streams.
        number: which of the sample's searches this is, from 0.
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


Memory = TypeVar("Memory")  # a dataclass of tensors with one row a job, or None


class Search(Protocol[Memory]):
    """How a job searches for an adversarial image. To add an attack, write a frozen dataclass.

    Both methods see many jobs at once, of any age, and treat each row by itself. The queue calls
    `init` once for new jobs. Then it queries the model at `jobs.x` and calls `step` with the answer
    for the jobs that go on, `queries - 1` times at most.
    """

    @property
    def queries(self) -> int:
        """Number of points a job tries at most."""

    @property
    def loss(self) -> LossName:
        """Loss that the query takes, and that the search maximises."""

    @property
    def gradients(self) -> bool:
        """Whether queries take the gradient as well."""

    @property
    def may_leave_ball(self) -> bool:
        """Whether a job may try points outside its ball. These fool nobody."""

    def init(self, jobs: Jobs) -> Memory:
        """Set `jobs.x`, the image itself so far, to the first point; return the first memory."""

    def step(self, jobs: Jobs, memory: Memory, answer: QueryResult) -> None:
        """Update the memory by the answer at `jobs.x`, and set `jobs.x` to the next point."""


def run(
    search: Search[Any],
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    options: AttackOptions,
    *,
    eps: float | Tensor,
    restarts: int = 1,
    targets: int | Tensor | None = None,
    nearest: bool = False,
) -> AttackResult:
    """Run `search` on every sample, `restarts` times for each of its targets.

    Args:
        search: what to run.
        model: images in [0,1] to logits.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        options: all of them: see `complete`.
        eps: radius in [0,1] pixel units, scalar or `(batch,)`.
        restarts: jobs of a sample for each target.
        targets: number of likeliest other classes to aim at, one after the other, or these classes
            `(batch, targets)`; left out, a job aims at any class.
        nearest: return the closest adversarial image met; every job goes on to its last step.

    Raises:
        ValueError: inputs outside [0,1] or in bfloat16, a bad eps, norm or loss, no restart, no
            target, no step.
    """
    norm = check_norm(options["norm"])
    check_eps(eps, norm)
    check_unit_range(inputs)
    if inputs.dtype == torch.bfloat16:
        raise ValueError(
            f"expected images in float32 or float64, got {inputs.dtype}, whose rounding leaves the "
            "ball: attack model.float() and images.float(), or search under torch.autocast"
        )
    restarts = whole("restarts", restarts, 1)
    if search.loss not in [*LOSSES]:  # a list: it may be of any type
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {search.loss!r}")
    if search.queries < 1:
        raise ValueError(f"expected a search of one point at least, got {search.queries}")
    early_stop, callback = options["early_stop"] and not nearest, options["callback"]
    queried = QueriedModel(model, options["batch_size"])
    labels = class_indices(labels, "an attack", len(inputs))
    samples = first_jobs(inputs, labels, eps, options["indices"])
    outcome = _Outcome(queried, samples, norm, measured=search.may_leave_ball, nearest=nearest)
    if not len(inputs):
        return outcome.result()
    pool = _Pool(queried, samples, restarts, targets)
    jobs = pool.take(pool.capacity)
    memory = search.init(jobs)
    while len(jobs.row):
        last = jobs.step == search.queries - 1
        answer = queried.query(
            jobs.x,
            jobs.labels,
            search.loss,
            targets=None if targets is None else jobs.target,
            # Nobody steps from a last point, so that a pass of last points needs no gradient.
            gradient=search.gradients and not bool(last.all()),
        )
        outcome.record(jobs, answer.wrong, last)
        if callback is not None:
            left = int((search.queries - 1 - jobs.step).sum()) + pool.waiting * search.queries
            callback(jobs.row, jobs.step, jobs.x, left)
        # All jobs of a fooled sample end here, those that share the batch with the one that hit.
        done = last | outcome.fooled[jobs.row] if early_stop else last
        # Positions, as each index by a mask would have the host wait for the device.
        keep = (~done).nonzero().flatten()
        if len(keep) < len(done):
            parts = (jobs, memory, answer)
            jobs, memory, answer = (_by_field(lambda t, rows=keep: t[rows], p) for p in parts)
        if len(jobs.row):
            search.step(jobs, memory, answer)
            jobs.step = jobs.step + 1
        free = pool.capacity - len(jobs.row)
        if pool.waiting and free * _REFILL >= pool.capacity:
            fresh = pool.take(free, skip=outcome.fooled if early_stop else None)
            if len(fresh.row):
                # Below the jobs under way: a sample's first job stays before its later ones.
                begun = search.init(fresh)
                pairs = ((jobs, fresh), (memory, begun))
                jobs, memory = (_by_field(lambda *tensors: torch.cat(tensors), *p) for p in pairs)
    return outcome.result()


def first_jobs(
    inputs: Tensor, labels: Tensor, eps: float | Tensor, indices: Sequence[int] | None = None
) -> Jobs:
    """The batch as jobs: of each sample the first, with any target."""
    row = torch.arange(len(inputs), device=labels.device)
    zero = torch.zeros_like(row)
    return Jobs(
        row=row,
        index=torch.tensor(identities(indices, len(inputs)), dtype=row.dtype, device=row.device),
        number=zero,
        step=zero,
        inputs=inputs.detach(),
        labels=labels,
        eps=per_sample(eps, inputs),
        target=zero - 1,
        x=inputs.detach(),
    )


def _by_field(function: Callable[..., Tensor], *parts: Any) -> Any:
    """Apply a function to each field of dataclasses of tensors of one type; None stays None."""
    if parts[0] is None:
        return None
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{n: function(*(getattr(part, n) for part in parts)) for n in names})


class _Outcome:
    """What is known of each sample so far: whether it is fooled, and the image to return.

    Attributes:
        fooled: whether an adversarial image was met, which a `Surrogate` verified.
        images: where fooled, the adversarial image (with `nearest` the closest); elsewhere the last
            point of the sample's last job, or, of a search that may leave the ball, the last that
            lay in it.
    """

    def __init__(
        self, queried: QueriedModel, samples: Jobs, norm: Norm, *, measured: bool, nearest: bool
    ) -> None:
        self.queried, self.norm, self.measured, self.nearest = queried, norm, measured, nearest
        # A point projected onto the ball lies beyond it by a rounding.
        self.slack = rounding(samples.inputs, norm)
        self.images, labels = samples.inputs.clone(), samples.labels
        self.fooled = torch.zeros_like(labels, dtype=torch.bool)
        self.of_job = torch.full_like(labels, -1)  # whose point the image of a survivor is
        self.closest = torch.full_like(labels, torch.inf, dtype=torch.float64)

    def record(self, jobs: Jobs, wrong: Tensor, last: Tensor) -> None:
        """Record a query at the jobs' points, which are the last of their job where `last`."""
        hit, tried, row = wrong, last, jobs.row
        # Distances are taken only where the search does not project onto the ball itself.
        if self.measured or self.nearest:
            length = distance(jobs.x, jobs.inputs, self.norm)
            tried = length <= jobs.eps.flatten() + self.slack
            hit = hit & tried
            if self.nearest:
                hit = hit & (length < self.closest[row])
        places = hit.nonzero().flatten()
        if len(places):
            # It costs passes. A hit that is not verified fools nobody, and its job goes on.
            places = places[self.queried.verified(jobs.x[places], jobs.labels[places])]
            if self.nearest:
                self.closest.scatter_reduce_(0, row[places], length[places], "amin")
                places = places[length[places] == self.closest[row[places]]]
            # Of each sample the first job that hit, in the order of the batch: which of two writes
            # to one image comes last is not defined, and threads may mix them.
            first = torch.full_like(self.of_job, len(row))
            first.scatter_reduce_(0, row[places], places, "amin")
            self.fooled[row[places]] = True
        if not self.nearest:
            # A survivor's image is of the job with the highest number, and not of the job that
            # ended last: the order in which jobs end depends on what shares the batch.
            kept = (tried & ~self.fooled[row]).nonzero().flatten()
            if len(kept):
                self.of_job.scatter_reduce_(0, row[kept], jobs.number[kept], "amax")
                kept = kept[jobs.number[kept] == self.of_job[row[kept]]]
                self.images[row[kept]] = jobs.x[kept]
        if len(places):
            places = places[first[row[places]] == places]
            self.images[row[places]] = jobs.x[places]

    def result(self) -> AttackResult:
        passes = self.queried.forwards, self.queried.backwards
        return AttackResult(self.images, self.fooled.long() - 1, *passes)


def likeliest(queried: QueriedModel, inputs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Classes of largest logit besides the label `(batch, count)`, the largest first.

    Of fewer classes, all. Takes a pass forward a sample.

    Raises:
        ValueError: `count` is no whole number from 1; a label is no class of the model.
    """
    logits = queried.logits(inputs)
    as_labels(labels, *logits.shape)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(whole("targets", count, 1), logits.shape[1] - 1), dim=1).indices


class _Pool:
    """Jobs that wait, from number 0 of every sample up: most samples are fooled by their first."""

    def __init__(
        self, queried: QueriedModel, samples: Jobs, restarts: int, targets: int | Tensor | None
    ) -> None:
        self.samples, self.targets = samples, samples.target[:, None]
        if isinstance(targets, Tensor):
            self.targets = targets
        elif targets is not None:
            self.targets = likeliest(queried, samples.inputs, samples.labels, targets)
        self.total = len(samples.row) * restarts * self.targets.shape[1]
        self.capacity = queried.batch_size or len(samples.row)
        self.waiting, self._next = self.total, 0

    def take(self, count: int, skip: Tensor | None = None) -> Jobs:
        """Start up to `count` jobs, none of samples in `skip` `(n,)`."""
        n = len(self.samples.row)
        # Job j is number j // n of sample j % n.
        waiting = torch.arange(self._next, self.total, device=self.targets.device)
        if skip is not None:
            waiting = waiting[~skip[waiting % n]]
        taken = waiting[:count]
        # Jobs of fooled samples are no longer counted as waiting, and are skipped for good.
        self.waiting = len(waiting) - len(taken)
        self._next = int(taken[-1]) + 1 if len(taken) else self.total
        row, number = taken % n, taken // n
        target = self.targets[row, number % self.targets.shape[1]]
        jobs: Jobs = _by_field(lambda tensor: tensor[row], self.samples)
        return replace(jobs, number=number, target=target)


def random_points(
    jobs: Jobs,
    norm: Norm,
    seed: int,
    *,
    among: Tensor | None = None,
    centres: Tensor | None = None,
    radius: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Random points `(m, ...)`, each from a stream of its sample: `flatreg.threat.random_point`.

    Args:
        jobs: whose samples they are for.
        norm: of the balls.
        seed: of all streams.
        among: `(m,)`: jobs to draw for, by default all; the others get their centre.
        centres: of the balls, by default the images.
        radius: of the balls `(m, 1, ...)`, by default eps.
        stream: `(m,)`: number of each one's stream, by default that of the job.
    """
    centres = jobs.inputs if centres is None else centres
    radius = jobs.eps if radius is None else radius
    stream = jobs.number if stream is None else stream
    points = centres.clone()
    for number in sorted(set((stream if among is None else stream[among]).tolist())):
        rows = stream == number if among is None else (stream == number) & among
        points[rows] = random_point(
            centres[rows],
            radius[rows],
            norm,
            seed=seed,
            stream=number,
            indices=jobs.index[rows].tolist(),
        )
    return points
