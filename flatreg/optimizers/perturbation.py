"""A perturbation and its undoing: the two rules applied to the parameters of an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatreg.optimizers.ascent import Ascent, Slot
from flatreg.optimizers.gradient import GradientRule
from flatreg.optimizers.vector import displace, shards, undo

Gradients = list[Tensor | None]
Saved = list[tuple[Tensor, Tensor]]
Noted = list[tuple[weakref.ref[Tensor], int]]


class Member(NamedTuple):
    """A parameter of the optimizer, the radius of its group, and what the wrapper knows of it."""

    weight: Tensor
    rho: float
    slot: Slot


def take_gradients(parameters: Sequence[Tensor]) -> Gradients:
    """The `.grad` of all parameters, which are left without."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


def note_gradients(parameters: Sequence[Tensor]) -> Noted:
    """The gradients present and their versions, which count changes in place; keeps none alive."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [(weakref.ref(g), g._version) for g in grads]


def are_untouched(parameters: Sequence[Tensor], noted: Noted) -> bool:
    """Whether the gradients present are those noted, and nobody has written to them."""
    now = [(g(), version) for g, version in note_gradients(parameters)]
    return len(now) == len(noted) and all(
        g is n() and version == v for (g, version), (n, v) in zip(now, noted, strict=True)
    )


@torch.no_grad()
def perturb(
    ascent: Ascent,
    members: Sequence[Member],
    gradients: Gradients,
    *,
    owned: bool,
    loss_scale: Tensor | float = 1.0,
    average: Callable[[Sequence[Tensor]], None] | None = None,
) -> Saved:
    """Move the weights to w + e(w); `restore` brings them back.

    Args:
        ascent: the rule.
        members: parameters; those outside the scope stay where they are.
        gradients: one for each, or None where a pass did not reach it; noise takes their place
            where the rule wants it.
        owned: the memory of the gradients may be used up. Gradients that DDP has reduced may be
            views into its buckets, which must not be written.
        loss_scale: what the gradients were multiplied by.
        average: averages tensors over processes, in place.

    Raises:
        ValueError: a gradient is sparse.
    """
    saved: Saved = []
    rows = [
        (member, direction)
        for member, gradient in zip(members, gradients, strict=True)
        if member.slot.perturbed and member.weight.requires_grad
        if (direction := _direction(ascent, member, gradient, owned, average is not None))
        is not None
    ]
    if not rows:
        return saved
    moved, directions = [m for m, _ in rows], [d for _, d in rows]
    weights = [m.weight for m in moved]
    if average is not None:
        average(directions)
    scales = ascent(weights, directions, [m.slot for m in moved], loss_scale)
    try:
        displace(shards(weights), shards(directions), _radii(scales, moved), saved)
    except BaseException:
        undo(saved)
        raise
    torch.clear_autocast_cache()  # it may hold copies of the weights as they were
    return saved


@torch.no_grad()
def restore(saved: Saved) -> None:
    """Bring back, bit for bit, the weights that `perturb` moved."""
    undo(saved)
    saved.clear()  # what comes next may need the memory
    torch.clear_autocast_cache()


@torch.no_grad()
def combine(rule: GradientRule, members: Sequence[Member], plain: Gradients) -> None:
    """Apply the rule to the gradients `plain` of the first pass and `.grad` of the second.

    A parameter that only one of the passes reached has a zero gradient in the other.
    """
    if not rule.combines:
        return
    rows = []
    for (weight, _, slot), gradient in zip(members, plain, strict=True):
        if gradient is None and weight.grad is None:
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        rows.append((torch.zeros_like(weight.grad) if gradient is None else gradient, weight, slot))
    if rows:
        grads = [weight.grad for _, weight, _ in rows if weight.grad is not None]
        rule.combine([g for g, _, _ in rows], grads, [slot for _, _, slot in rows])


@torch.no_grad()
def between(rule: GradientRule, members: Sequence[Member]) -> None:
    """Apply the rule to `.grad` on a step without perturbation."""
    rows = [(m.weight.grad, m.slot) for m in members if m.weight.grad is not None]
    if rows:
        rule.between([g for g, _ in rows], [slot for _, slot in rows])


def _direction(
    ascent: Ascent, member: Member, gradient: Tensor | None, owned: bool, averaged: bool
) -> Tensor | None:
    """What the ascent rule may overwrite; None leaves the weight where it is."""
    weight = member.weight
    if not ascent.uses_gradient:
        return torch.randn_like(weight)
    if gradient is None:  # another process may have one
        return torch.zeros_like(weight) if averaged else None
    if gradient.is_sparse:
        raise ValueError("sharpness-aware steps need dense gradients, got sparse ones")
    owned = owned and gradient.dtype == weight.dtype
    return gradient if owned else gradient.to(weight.dtype, copy=True)


def _radii(scales: Sequence[Tensor], members: Sequence[Member]) -> list[Tensor]:
    """Products of scale and rho, one tensor for each distinct pair."""
    products: dict[tuple[int, float], Tensor] = {}
    for scale, member in zip(scales, members, strict=True):
        key = (id(scale), float(member.rho))
        if key not in products:
            products[key] = scale * member.rho
    return [products[id(s), float(m.rho)] for s, m in zip(scales, members, strict=True)]
