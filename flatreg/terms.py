"""What a term is: a criterion or a penalty, frozen, callable, its own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from flatreg.forward import Forward
from flatreg.threat import check_eps

Pass = Literal["clean", "attacked"]
Need = Literal["clean", "attacked", "features", "input_gradient", "unit_inputs"]
Passes = Mapping[str, Forward]

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


@runtime_checkable
class Term(Protocol):
    """A criterion or a penalty: reads passes of a batch, returns a loss per sample.

    `needs` declares what it reads: the passes `"clean"` and `"attacked"`; `"features"` (the input
    of the head is captured); `"input_gradient"` (the clean inputs are part of the graph);
    `"unit_inputs"` (it moves images about, which must therefore lie in [0,1]).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What the term reads."""

    def __call__(self, passes: Passes) -> Tensor:
        """Loss per sample `(batch,)`, given the passes by name."""


@runtime_checkable
class Adversary(Protocol):
    """A criterion that trains on attacked images; `Objective` calls `attack` once a batch."""

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attacked images `(batch, ...)`."""
