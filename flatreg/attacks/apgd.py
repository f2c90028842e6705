"""Auto-PGD: momentum, and a step size that halves where progress stalls.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatreg.attacks.losses import LossName
from flatreg.attacks.result import AttackResult, check_threat, climb, keep_rows
from flatreg.threat import per_sample, project, uniform_noise

_MOMENTUM = 0.75  # the paper's alpha
_RISING = 0.75  # the paper's rho: share of steps of an interval that must have raised the loss


@dataclass
class _State:
    """The samples that are not fooled yet, each with its own step size and best point."""

    row: Tensor
    inputs: Tensor
    labels: Tensor
    eps: Tensor
    x: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    step: Tensor
    rises: Tensor
    checked_value: Tensor
    halved: Tensor


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


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: LossName = "rescaled_cross_entropy",
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> AttackResult:
    """Attack by APGD from random starts; a sample leaves the batch the moment it is fooled.

    Arguments, result and errors as in `flatreg.attacks.pgd`; the step size is the method's own.
    """
    radius, labels = check_threat(inputs, eps, norm), labels.long()
    if restarts < 1:
        raise ValueError(f"restarts must be >= 1, got {restarts}")
    indices = range(len(inputs)) if indices is None else indices
    found = inputs.detach().clone()
    fooled_by = torch.full_like(labels, -1)
    passes = 0
    for restart in range(restarts):
        row = (fooled_by < 0).nonzero().flatten()
        if not len(row):
            break
        chosen = [indices[r] for r in row.tolist()]
        noise = uniform_noise(inputs[row], seed=seed, stream=restart, indices=chosen)
        x = project(inputs[row].detach() + radius[row] * noise, inputs[row], radius[row])
        state, fooled = _start(model, row, x, inputs[row].detach(), labels[row], radius[row], loss)
        last_mark, marks = 0, checkpoints(steps)
        for step in range(1, steps + 2):
            passes += len(state.row)
            found[state.row] = state.x
            fooled_by[state.row[fooled]] = 0
            state = keep_rows(state, ~fooled)
            if step > steps or not len(state.row):
                break
            _move(state, momentum=_MOMENTUM if step > 1 else 1.0)
            fooled = _look(model, state, loss)
            if step in marks:
                _review(state, interval=step - last_mark)
                last_mark = step
    return AttackResult(found, fooled_by, passes, passes)


def _start(
    model: nn.Module,
    row: Tensor,
    x: Tensor,
    inputs: Tensor,
    labels: Tensor,
    eps: Tensor,
    loss: LossName,
) -> tuple[_State, Tensor]:
    value, gradient, fooled = climb(model, x, labels, loss)
    zeros = torch.zeros_like(labels)
    state = _State(
        row, inputs, labels, eps, x, x, gradient, value, x, gradient, value,
        step=2 * eps, rises=zeros, checked_value=value, halved=zeros.bool(),
    )  # fmt: skip
    return state, fooled


def _move(state: _State, momentum: float) -> None:
    straight = project(state.x + state.step * state.gradient.sign(), state.inputs, state.eps)
    moved = state.x + momentum * (straight - state.x) + (1 - momentum) * (state.x - state.previous)
    state.previous, state.x = state.x, project(moved, state.inputs, state.eps)


def _look(model: nn.Module, state: _State, loss: LossName) -> Tensor:
    """Evaluate the new points and keep the best of each sample."""
    value, state.gradient, fooled = climb(model, state.x, state.labels, loss)
    state.rises = state.rises + (value > state.value)
    state.value = value
    better = value > state.best_value
    at = per_sample(better, state.x).bool()
    state.best = torch.where(at, state.x, state.best)
    state.best_gradient = torch.where(at, state.gradient, state.best_gradient)
    state.best_value = torch.where(better, value, state.best_value)
    return fooled


def _review(state: _State, interval: int) -> None:
    """Where progress stalled, halve the step and go back to the best point.

    The next rise is counted against the point that was left, as in the authors' code.
    """
    few_rises = state.rises < _RISING * interval
    no_gain = ~state.halved & (state.best_value <= state.checked_value)
    state.halved = few_rises | no_gain
    at = per_sample(state.halved, state.x).bool()
    state.step = torch.where(at, state.step / 2, state.step)
    state.x = torch.where(at, state.best, state.x)
    state.gradient = torch.where(at, state.best_gradient, state.gradient)
    state.checked_value, state.rises = state.best_value, torch.zeros_like(state.rises)
