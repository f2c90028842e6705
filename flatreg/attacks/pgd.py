r"""Projected gradient descent: :math:`x \leftarrow \Pi(x + a\, d(x))`, d the steepest direction.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueryResult, loss_and_gradient
from flatreg.attacks.search import Jobs, random_points, run
from flatreg.data.configuration import number, switch, whole
from flatreg.threat import (
    DenseNorm,
    Norm,
    check_norm,
    per_sample,
    project,
    steepest_direction,
    steepest_step,
)


@dataclass(frozen=True, kw_only=True)
class _Descent:
    steps: int
    step_size: float
    random_start: bool
    loss: LossName
    norm: Norm
    seed: int
    gradients: bool = True
    may_leave_ball: bool = False

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, jobs: Jobs) -> None:
        among = (jobs.number > 0) | self.random_start
        jobs.x = random_points(jobs, self.norm, self.seed, among=among)

    def step(self, jobs: Jobs, memory: None, answer: QueryResult) -> None:
        moved = steepest_step(jobs.x, answer.gradient, self.step_size * jobs.eps, self.norm)
        jobs.x = project(moved, jobs.inputs, jobs.eps, self.norm)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 10,
    step_size: float = 0.25,
    restarts: int = 1,
    random_start: bool = False,
    loss: LossName = "margin",
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Attack by projected gradient descent.

    Args:
        model: images in [0,1] to logits; attacked in the mode it is in, its `.grad`s untouched.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units, scalar or `(batch,)`.
        steps: gradient steps of each restart.
        step_size: in units of eps. An L1 step fills the pixels of largest gradient to the end of
            the box.
        restarts: the first starts at the image unless `random_start`, the others at random.
        random_start: start at a random point of the ball.
        loss: what to maximise; see `flatreg.attacks.losses`.
        **options: see `flatreg.attacks.AttackOptions`.

    Returns:
        The images tried last, what fooled them, and the counted passes.

    Raises:
        TypeError: an option that no attack has.
        ValueError: inputs outside [0,1], a bad eps, norm, loss or step size, no restart, no step
            without a random start; logits without a gradient.
    """
    common = complete(options, "pgd")
    search = _Descent(
        steps=whole("steps", steps, 0 if switch("random_start", random_start) else 1),
        step_size=number("step_size", step_size, "(0, inf)"),
        random_start=random_start,
        loss=loss,
        norm=check_norm(common["norm"]),
        seed=common["seed"],
    )
    return run(search, model, inputs, labels, common, eps=eps, restarts=restarts)


def pgd_last_iterate(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    start: Tensor,
    norm: DenseNorm,
) -> Tensor:
    """Last iterate of PGD on the cross-entropy from `start`, for all samples, fooled or not.

    Arguments as in `pgd`, unchecked.
    """
    radius = per_sample(eps, inputs)
    for _ in range(steps):
        _, gradient, _ = loss_and_gradient(model, start, labels, "cross_entropy")
        moved = start + step_size * radius * steepest_direction(gradient, norm)
        start = project(moved, inputs, radius, norm)
    return start


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    loss: LossName = "margin",
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Take one step of length eps along the steepest direction; a weak control.

    Arguments, result and errors as in `flatreg.attacks.pgd`.
    """
    common = complete(options, "fgsm")
    return pgd(model, inputs, labels, eps=eps, steps=1, step_size=1.0, loss=loss, **common)


def noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    draws: int = 100,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Try `draws` independent points of `flatreg.threat.random_point`; needs no gradients.

    The points are those that `flatreg.attacks.pgd` of the same seed starts its restarts from.
    Arguments, result and errors as there.

    Raises:
        ValueError: also fewer than 1 draw.
    """
    draws = whole("draws", draws, 1)
    common = complete(options, "noise")
    return pgd(model, inputs, labels, eps=eps, steps=0, random_start=True, restarts=draws, **common)
