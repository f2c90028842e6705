r"""Projected gradient descent: :math:`x \leftarrow \Pi(x + a \operatorname{sign} \nabla \ell(x))`.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.result import AttackResult, check_threat, climb, keep_rows
from flatreg.threat import per_sample, project, uniform_noise


@dataclass
class _State:
    """The samples that are not fooled yet."""

    row: Tensor
    x: Tensor
    inputs: Tensor
    labels: Tensor
    eps: Tensor


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
) -> AttackResult:
    """Attack by projected gradient descent; a sample leaves the batch the moment it is fooled.

    Args:
        model: images in [0,1] to logits; attacked in the mode it is in, its `.grad`s untouched.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units, scalar or `(batch,)`.
        norm: "linf".
        steps: gradient steps of each restart.
        step_size: as a share of eps.
        restarts: the first starts at the image unless `random_start`, the others at random.
        random_start: begin at a uniform point of the ball.
        loss: what to climb; see `flatreg.attacks.losses`.
        seed: of the random starts, together with `indices`.
        indices: identity of each sample (its dataset index), which keys its random stream;
            left out, its position in the batch.

    Returns:
        The images tried last, what fooled them, and the counted passes.

    Raises:
        ValueError: inputs outside [0,1], eps outside [0,1], another norm, no restart.
    """
    radius, labels = check_threat(inputs, eps, norm), labels.long()
    if restarts < 1:
        raise ValueError(f"restarts must be >= 1, got {restarts}")
    indices = range(len(inputs)) if indices is None else indices
    found = inputs.detach().clone()
    fooled_by = torch.full_like(labels, -1)
    forwards = backwards = 0
    for restart in range(restarts):
        row = (fooled_by < 0).nonzero().flatten()
        state = _State(row, inputs[row].detach(), inputs[row].detach(), labels[row], radius[row])
        if random_start or restart:
            chosen = [indices[r] for r in row.tolist()]
            noise = uniform_noise(state.x, seed=seed, stream=restart, indices=chosen)
            state.x = project(state.x + state.eps * noise, state.inputs, state.eps)
        for _ in range(steps):
            if not len(state.row):
                break
            _, gradient, fooled = climb(model, state.x, state.labels, loss)
            forwards, backwards = forwards + len(state.row), backwards + len(state.row)
            found[state.row] = state.x
            fooled_by[state.row[fooled]] = 0
            moved = state.x + step_size * state.eps * gradient.sign()
            state.x = project(moved, state.inputs, state.eps)
            state = keep_rows(state, ~fooled)
        if len(state.row):
            with torch.no_grad():
                fooled = model(state.x).argmax(1) != state.labels
            found[state.row] = state.x
            fooled_by[state.row[fooled]] = 0
            forwards += len(state.row)
    return AttackResult(found, fooled_by, forwards, backwards)


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
    """Yield `start` and every iterate after it, for all samples, whether fooled or not.

    Arguments as in `pgd`, unchecked; `step_size` is a share of eps too.
    """
    radius = per_sample(eps, inputs)
    yield start
    for _ in range(steps):
        _, gradient, _ = climb(model, start, labels, loss)
        start = project(start + step_size * radius * gradient.sign(), inputs, radius)
        yield start
