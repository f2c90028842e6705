"""What `Objective` checks: terms when it is made, model and passes on its first batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from flatreg.models.compiled import is_compiled, sharded_parts
from flatreg.models.derivative_check import Leaves, check_derivatives
from flatreg.models.double_backward import is_piecewise_linear, is_reentrant, refuse_double_backward
from flatreg.models.entrance import as_labels, check_no_probabilities
from flatreg.models.forward import Forward, local_module
from flatreg.optimizers.vector import is_sharded
from flatreg.terms.criteria import LossOfTorch
from flatreg.terms.protocol import (
    Adversary,
    DifferentiatesTwice,
    Requirement,
    Term,
    WantsSmoothActivations,
)

# Batches on which a pass is made again: a model may show only later that it cannot repeat one.
REPEATED = frozenset({0, 1, 10, 100})


def check_model(model: object) -> None:
    """Refuse what is no model, as a criterion in its place.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, got {type(model).__name__}: write Objective(model, criterion, "
            "penalties)"
        )


def check_term(term: object) -> None:
    """Refuse what is no term, or requires what is not known.

    Raises:
        TypeError: it is no term.
        ValueError: it requires what is not known.
    """
    if isinstance(term, type) or not isinstance(term, Term):
        got = f"the class {term.__name__}" if isinstance(term, type) else type(term).__name__
        raise TypeError(
            "expected a term, as flatreg.MarginBound(eps=8 / 255), or as the criterion a loss "
            f"module, as nn.CrossEntropyLoss(), got {got}: a term of your own has `requires` and "
            "maps the passes to a loss per sample"
        )
    unknown = sorted(set(term.requires) - set(get_args(Requirement)))
    if unknown:
        raise ValueError(
            f"{type(term).__name__} requires {', '.join(map(repr, unknown))}: expected some of "
            f"{', '.join(map(repr, get_args(Requirement)))}"
        )


def check_places(criterion: Term, penalties: Sequence[Term]) -> None:
    """Refuse a penalty where the criterion should be, and the other way.

    Raises:
        ValueError: the criterion is a penalty; a penalty attacks, or reads attacked images that
            there are none of.
    """
    if hasattr(criterion, "strength"):
        name = type(criterion).__name__
        raise ValueError(
            f"{name} is a penalty, and as the criterion it would replace the cross-entropy: "
            f"write Objective(model, None, [{name}(...)])"
        )
    own, attacks = type(criterion).__name__, isinstance(criterion, Adversary)
    for term in penalties:
        name = type(term).__name__
        if isinstance(term, Adversary):
            raise ValueError(
                f"{name} attacks the batch, which the criterion alone does: among the penalties it "
                f"would be taken at the images of {own}: write Objective(model, {name}(...))"
            )
        if "attacked" in term.requires and not attacks:
            raise ValueError(f"{name} reads the attacked batch, but {own} does not attack")


def check_twice_differentiable(term: Term, model: nn.Module, inputs: Tensor) -> None:
    """Prove that the model has the derivatives that the term takes.

    Raises:
        ValueError: it has not; the message names what to use instead.
    """
    if not term.requires & {"double_backward", "third_derivative"}:
        return
    name, alternative = type(term).__name__, "a term of forward passes"
    if isinstance(term, DifferentiatesTwice):
        alternative = term.forward_only
    refuse_double_backward(model, name, alternative)
    order = 3 if "third_derivative" in term.requires else 2
    of: Leaves = "weights" if "weights" in term.requires else "inputs"
    module = local_module(model)
    check_derivatives(module, inputs, order, of, what=name, alternative=alternative)


def check_pass(terms: Sequence[Term], at: Forward) -> None:
    """Check labels, logits and graph of the first pass, and warn of a kinked network.

    Raises:
        ValueError: labels or logits are not what the terms take, or a gradient in the inputs cannot
            be had.
    """
    as_labels(at.labels, len(at.logits), at.logits.shape[1])
    check_no_probabilities(at.logits.detach())
    reader = next((t for t in terms if not isinstance(t, LossOfTorch)), None)
    soft = at.labels.is_floating_point()
    if reader and soft and bool((at.labels.sum(1) - 1).abs().max() > 1e-3):
        raise ValueError(
            f"{type(reader).__name__} takes labels as probabilities of one class, which sum to 1, "
            f"got sums of {at.labels.sum(1).min():.4g} to {at.labels.sum(1).max():.4g}"
        )
    graded = {"input_gradient", "double_backward"}
    reader = next((t for t in terms if t.requires & graded), None)
    if reader is not None and is_reentrant(at.logits):
        raise ValueError(
            f"{type(reader).__name__} takes a gradient in the inputs, which reentrant "
            "checkpointing does not give: use checkpoint(..., use_reentrant=False)"
        )
    curved = [
        type(term).__name__
        for term in terms
        if isinstance(term, WantsSmoothActivations) and term.wants_smooth_activations
    ]
    if curved and is_piecewise_linear(at.logits):
        warnings.warn(
            f"{curved[0]} sees little more than the kinks of this model's activations "
            '(ReLU or similar): a smooth one, as timm\'s act_layer="silu", gives it a '
            "curvature to act on",
            stacklevel=2,
        )


def check_repeats(at: Forward, model: nn.Module) -> None:
    """Make a pass again, for terms that compare passes.

    Args:
        at: the pass.
        model: as it is trained, wrappers included.

    Raises:
        ValueError: the logits are others.
    """
    if sharded_parts(at.model):  # whose passes must all have a backward pass
        return
    # A compiled wrapper around DDP makes the clean pass alone: it rounds in another way.
    rounding = 5e-2 if is_compiled(model) and not is_compiled(at.model) else 1e-3
    if not at.is_repeatable(rounding):
        raise ValueError(
            "terms that compare passes need a model that repeats a pass, and this one gives "
            "other logits from the same random streams and buffers: what it keeps elsewhere (a "
            "generator, a plain attribute, masks of a compiled wrapper) must become a buffer"
        )


def check_head(at: Forward) -> None:
    """Refuse a pass whose logits are not those of its head, up to rounding.

    Raises:
        ValueError: another layer makes them, as after a switch between two, or dropout behind it.
    """
    if at.head is None or at.head.is_computed or is_sharded([b.weight for b in at.head.branches]):
        return
    with torch.no_grad():
        logits, mapped = at.logits, at.through_head().logits
    rounding = max(1e-3, 16 * torch.finfo(logits.dtype).eps)
    off, size = (mapped - logits).abs().amax(), logits.abs().amax()
    if bool(off > rounding * size):  # false where one is nan
        raise ValueError(
            f"the head {at.head.name!r} does not make the logits any more, off by {off:.3g}: if "
            "the model has switched to another layer, make a new Objective; dropout behind the "
            "head must go before it"
        )


def check_value(term: Term, value: object, size: int) -> Tensor:
    """The value of a term on `size` samples.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not one number, nor one for each sample.
    """
    expected = f"{type(term).__name__}: expected a loss per sample ({size},)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{expected}, got a {type(value).__name__}")
    if value.shape not in (torch.Size(), torch.Size((size,))):
        raise ValueError(f"{expected}, got shape {tuple(value.shape)}")
    return value
