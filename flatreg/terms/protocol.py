"""What a term is, and what else `Objective` asks of one: all the protocols in one place.

A term is a criterion or a penalty: frozen, callable, its own configuration.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from torch import Tensor, nn

from flatreg.data.configuration import configuration
from flatreg.models.double_backward import Method
from flatreg.models.forward import Forward
from flatreg.threat import check_eps

Pass = Literal["clean", "attacked"]
Requirement = Literal[
    "clean",
    "attacked",
    "start",
    "whole_batch",
    "indices",
    "features",
    "input_gradient",
    "unit_inputs",
    "weights",
    "double_backward",
    "third_derivative",
]
Forwards = Mapping[str, Forward]
_OVERSHOOT = 0.1  # of a progress whose loop has a few batches more than it thought


def _as_number(value: Any) -> Any:
    """Read "8/255" as a number; leave anything else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(fractions.Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _checked_eps(value: float, info: ValidationInfo) -> float:
    check_eps(value, info.data.get("norm", "linf"))
    return value


Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_as_number), Field(allow_inf_nan=False)]
# Where a term has a norm, it stands before eps, whose range depends on it.
Eps = Annotated[float, BeforeValidator(_as_number), Field(gt=0), AfterValidator(_checked_eps)]
Amount = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Share = Annotated[Number, Field(ge=0, le=1)]


@runtime_checkable
class Term(Protocol):
    """A criterion or a penalty: reads passes of a batch, returns a loss per sample.

    `requires` declares what it reads: the passes `"clean"`, `"attacked"` and, of a criterion that
    gives these images (`flatreg.terms.memory`), `"start"`; `"whole_batch"` (its losses of parts of
    a batch do not add up to that of the batch); `"indices"` (it stores something of each training
    image); `"features"` (the input of the head is captured); `"input_gradient"` (the clean inputs
    are part of the graph); `"unit_inputs"` (it moves images, which must therefore lie in [0,1]);
    `"weights"` (it moves weights, which must therefore be whole); `"double_backward"` (it
    differentiates twice: such a term is a `DifferentiatesTwice`) and `"third_derivative"` (its
    gradient is of third order).
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, given the passes by name."""


@runtime_checkable
class DifferentiatesTwice(Term, Protocol):
    """A term that can require `"double_backward"`, and knows what does without."""

    @property
    def forward_only(self) -> str:
        """The setting, or the other term, that takes forward passes only; for the message."""


@runtime_checkable
class WantsSmoothActivations(Term, Protocol):
    """A term to which a model with ReLU gives little to act on; `Objective` warns of it once."""

    @property
    def wants_smooth_activations(self) -> bool:
        """Whether to warn."""


@runtime_checkable
class Adversary(Protocol):
    """A criterion that trains on attacked images; `Objective` calls `attack` once a batch."""

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attacked images `(batch, ...)`."""


@runtime_checkable
class HandlesMode(Adversary, Protocol):
    """An adversary that sets the mode of the model during its attack, and keeps its statistics.

    For any other adversary `Objective` freezes the BatchNorm statistics around `attack`.
    """

    @property
    def inner_mode(self) -> str:
        """Mode of the model during the attack."""


@runtime_checkable
class Ramped(Protocol):
    """A dataclass whose `beta` grows with the training where `ramp`, whatever its schedule."""

    beta: float
    ramp: bool


def requirements_for(
    method: Method, *requires: Requirement, third: bool = False
) -> frozenset[Requirement]:
    """These requirements, and what the method adds to them."""
    if method != "double_backward":
        return frozenset(requires)
    twice: tuple[Requirement, ...] = ("double_backward", *(("third_derivative",) if third else ()))
    return frozenset((*requires, *twice))


@configuration
class WarmUp:
    """Let the strength of a penalty rise from 0, linearly over the first `fraction` of training."""

    fraction: Fraction
    kind: Literal["WarmUp"] = "WarmUp"

    def __call__(self, term: Any, progress: float) -> Any:
        """The term as it is after a fraction `progress` of the training."""
        return replace(term, strength=term.strength * min(1.0, progress / self.fraction))


@configuration
class EpsWarmUp:
    """Let the ball of a penalty or of an adversary grow to eps over the first `fraction`.

    At progress p of the training the radius is eps max(floor, s(t)), with t = (p - begin) /
    (fraction - begin) cut to [0, 1] and s(t) = t (`"linear"`) or (1 - cos(pi t)) / 2 (`"cosine"`).
    Penalties are measured at the scale of their ball, so their size grows with it. Adversarial
    fine-tuning of weights that were not trained so can fail without a radius that grows
    (https://arxiv.org/abs/2509.23325).

    Args:
        fraction: of the training, from which on the radius is eps.
        begin: fraction of the training up to which the radius stays at its floor, below `fraction`.
        shape: of the growth.
        floor: least radius, in units of eps. float32 images resolve 6e-8: the steps of an eps of a
            thousandth of the usual 8/255 do not vanish.

    Raises:
        ValueError: `begin` is not below `fraction`.
    """

    fraction: Fraction
    begin: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    shape: Literal["linear", "cosine"] = "linear"
    floor: Fraction = 1e-3
    kind: Literal["EpsWarmUp"] = "EpsWarmUp"

    def __post_init__(self) -> None:
        if self.begin >= self.fraction:
            raise ValueError(
                f"begin: expected less than fraction={self.fraction:g}, got {self.begin:g}"
            )

    def __call__(self, term: Any, progress: float) -> Any:
        """The term as it is after a fraction `progress` of the training."""
        t = min(1.0, max(0.0, (progress - self.begin) / (self.fraction - self.begin)))
        grown = t if self.shape == "linear" else (1 - math.cos(math.pi * t)) / 2
        return replace(term, eps=term.eps * max(self.floor, grown))


Schedule = Annotated[WarmUp | EpsWarmUp, Field(discriminator="kind")]


@runtime_checkable
class Scheduled(Term, Protocol):
    """A term whose strength or ball changes over training: a penalty, or an adversary."""

    @property
    def schedule(self) -> WarmUp | EpsWarmUp | None:
        """Maps the term and the progress of training to the term as it is then."""


def scheduled(term: Term, progress: float) -> Term:
    """The term as its schedule and its ramp want it after a fraction `progress` of training.

    A progress that ends a little above 1 counts as 1.

    Raises:
        ValueError: `progress` is no fraction, as a number of epochs.
    """
    if not 0 <= progress <= 1 + _OVERSHOOT:
        raise ValueError(
            "objective.progress: expected the fraction of the training that is done, in [0, 1], "
            f"got {progress:g}: write (epoch + step / len(loader)) / epochs"
        )
    progress = min(progress, 1.0)
    if isinstance(term, Scheduled) and term.schedule is not None:
        term = term.schedule(term, progress)
    if isinstance(term, Ramped) and term.ramp:
        ramped: Any = term
        term = replace(ramped, beta=term.beta * progress, ramp=False)
    return term
