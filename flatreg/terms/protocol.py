"""What a term is: a criterion or a penalty, frozen, callable, its own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.models.double_backward import Method
from flatreg.models.forward import Forward
from flatreg.threat import check_eps

Pass = Literal["clean", "attacked"]
Requirement = Literal[
    "clean",
    "attacked",
    "features",
    "input_gradient",
    "unit_inputs",
    "weights",
    "double_backward",
]
Forwards = Mapping[str, Forward]

CONFIG = ConfigDict(extra="forbid")


def _fraction(value: Any) -> Any:
    """Read "8/255" as a number; leave anything else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _checked_eps(value: float) -> float:
    check_eps(value)
    return value


Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_fraction), Field(allow_inf_nan=False)]
Eps = Annotated[float, BeforeValidator(_fraction), Field(gt=0), AfterValidator(_checked_eps)]
Strength = Annotated[float, BeforeValidator(_fraction), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


@runtime_checkable
class Term(Protocol):
    """A criterion or a penalty: reads passes of a batch, returns a loss per sample.

    `requires` declares what it reads: the passes `"clean"` and `"attacked"`; `"features"` (the
    input of the head is captured); `"input_gradient"` (the clean inputs are part of the graph);
    `"unit_inputs"` (it moves images about, which must therefore lie in [0,1]); `"weights"` (it
    moves weights, which must therefore be whole); `"double_backward"` (it differentiates twice: see
    `DifferentiatesTwice`).
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""

    def __call__(self, passes: Forwards) -> Tensor:
        """Loss per sample `(batch,)`, given the passes by name."""


@runtime_checkable
class DifferentiatesTwice(Term, Protocol):
    """A term that some models cannot take, because it differentiates twice."""

    @property
    def forward_only(self) -> str:
        """The settings or the term that do without, as the error message names them."""


@runtime_checkable
class WantsSmoothActivations(Protocol):
    """A term that measures a second derivative, which a ReLU network has only at its kinks."""

    @property
    def wants_smooth_activations(self) -> bool:
        """Whether `Objective` warns, once, where the model is piecewise linear."""


@runtime_checkable
class Scheduled(Term, Protocol):
    """A term whose settings may change during the training."""

    @property
    def schedule(self) -> Schedule | None:
        """How they change; None keeps them."""


def requirements_for(method: Method, *requires: Requirement) -> frozenset[Requirement]:
    """These needs, and `"double_backward"` where the method takes it."""
    twice: tuple[Requirement, ...] = ("double_backward",) if method == "double_backward" else ()
    return frozenset((*requires, *twice))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class WarmUp:
    """Let the strength of a penalty rise from 0, linearly over the first `share` of training."""

    share: Share
    kind: Literal["WarmUp"] = "WarmUp"

    def __call__(self, term: Any, progress: float) -> Any:
        """The term as it is after a share `progress` of the training."""
        return replace(term, strength=term.strength * min(1.0, progress / self.share))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EpsWarmUp:
    """Let the ball of a penalty grow from (almost) nothing to eps over the first `share`.

    Penalties are measured at the scale of their ball, so their size grows with it.
    """

    share: Share
    kind: Literal["EpsWarmUp"] = "EpsWarmUp"

    def __call__(self, term: Any, progress: float) -> Any:
        """The term as it is after a share `progress` of the training."""
        factor = min(1.0, progress / self.share)
        # float32 images resolve 6e-8: steps of an eps a thousandth of the usual 8/255 do not vanish
        return replace(term, eps=term.eps * max(factor, 1e-3))


Schedule = Annotated[WarmUp | EpsWarmUp, Field(discriminator="kind")]


def scheduled(term: Term, progress: float) -> Term:
    """The term as its schedule, if it has one, wants it after a share `progress` of training."""
    if not isinstance(term, Scheduled) or term.schedule is None:
        return term
    changed: Term = term.schedule(term, progress)
    return changed


@runtime_checkable
class Adversary(Protocol):
    """A criterion that trains on attacked images; `Objective` calls `attack` once a batch."""

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attacked images `(batch, ...)`."""


@runtime_checkable
class HandlesMode(Adversary, Protocol):
    """An adversary that sets modes and freezes statistics itself while it attacks."""

    @property
    def inner_mode(self) -> str:
        """Mode of the model during the attack: "train" or "eval"."""
