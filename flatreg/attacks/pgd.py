r"""Projected gradient descent: :math:`x \leftarrow \Pi(x + a\, d(x))`, d the steepest direction.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackResult, Callback
from flatreg.attacks.query import QueryResult, loss_and_gradient
from flatreg.attacks.search import Jobs, random_starts, run
from flatreg.threat import Norm, check_norm, per_sample, project, steepest_step


@dataclass(frozen=True)
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
    def looks(self) -> int:
        return self.steps + 1

    def begin(self, jobs: Jobs) -> None:
        random_starts(
            jobs, self.norm, self.seed, among=jobs.number > (-1 if self.random_start else 0)
        )

    def advance(self, jobs: Jobs, memory: None, look: QueryResult) -> None:
        moved = steepest_step(jobs.x, look.gradient, self.step_size * jobs.eps, self.norm)
        jobs.x = project(moved, jobs.inputs, jobs.eps, self.norm)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 10,
    step_size: float = 0.25,
    restarts: int = 1,
    random_start: bool = False,
    loss: LossName = "margin",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Attack by projected gradient descent; a sample leaves the batch the moment it is fooled.

    Args:
        model: images in [0,1] to logits; attacked in the mode it is in, its `.grad`s untouched.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units, scalar or `(batch,)`.
        norm: "linf", "l2" or "l1"; an L1 step fills the pixels of largest gradient to the end of
            the box.
        steps: gradient steps of each restart.
        step_size: as a share of eps.
        restarts: the first starts at the image unless `random_start`, the others at random.
        random_start: begin at a random point of the ball.
        loss: what to climb; see `flatreg.attacks.losses`.
        seed: of the random starts, together with `indices`.
        indices: identity of each sample (its dataset index), which keys its random stream;
            left out, its position in the batch.
        batch_size: samples at a time, halved where memory runs out; left out, all.
        callback: called after every look.
        early_stop: samples leave when fooled; otherwise they go on to the last step.

    Returns:
        The images tried last, what fooled them, and the counted passes.

    Raises:
        ValueError: inputs outside [0,1], a bad eps or norm, no restart; logits without a gradient.
    """
    search = _Descent(steps, step_size, random_start, loss, check_norm(norm), seed)
    return run(
        search,
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        restarts=restarts,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
    )


def pgd_iterates(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    start: Tensor,
    loss: LossName,
) -> Iterator[Tensor]:
    """Yield `start` and every Linf iterate after it, for all samples, whether fooled or not.

    Arguments as in `pgd`, unchecked; `step_size` is a share of eps too.
    """
    radius = per_sample(eps, inputs)
    yield start
    for _ in range(steps):
        _, gradient, _ = loss_and_gradient(model, start, labels, loss)
        start = project(start + step_size * radius * gradient.sign(), inputs, radius, "linf")
        yield start


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    loss: LossName = "margin",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Take one step of length eps along the steepest direction; a weak control.

    Arguments, result and errors as in `flatreg.attacks.pgd`.
    """
    return pgd(
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        steps=1,
        step_size=1.0,
        loss=loss,
        seed=seed,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
    )


def noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    draws: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Try `draws` independent points of `flatreg.threat.random_point`; needs no gradients.

    The points are those that `flatreg.attacks.pgd` of the same seed starts its restarts from.
    Arguments, result and errors as there.

    Raises:
        ValueError: also fewer than 1 draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    return pgd(
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        steps=0,
        random_start=True,
        restarts=draws,
        seed=seed,
        indices=indices,
        batch_size=batch_size,
        callback=callback,
        early_stop=early_stop,
    )
