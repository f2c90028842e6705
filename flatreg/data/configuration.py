"""What is its own configuration, and the words for a mistake in one.

The command line reads recipes by it, so this file imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from functools import wraps
from numbers import Real
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from flatreg.data.text import did_you_mean, one_line

_Kind = TypeVar("_Kind")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, Field)
)
def configuration(kind: type[_Kind]) -> type[_Kind]:
    """Make a class a frozen dataclass that checks its settings; a mistake is an error of one line.

    >>> @configuration
    ... class Ball:
    ...     eps: float = Field(gt=0)
    >>> Ball(epz=1)
    Traceback (most recent call last):
        ...
    ValueError: Ball: epz: there is no such setting; did you mean eps?
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(kind)
    initialise = made.__init__

    @wraps(initialise)
    def __init__(self: Any, *by_position: Any, **settings: Any) -> None:
        if by_position:
            got = _shown(by_position[0])
            raise TypeError(f"{kind.__name__}: expected settings by name, got {got}")
        try:
            initialise(self, **settings)
        except ValidationError as error:
            names = [field.name for field in dataclasses.fields(made)]
            raise ValueError(f"{kind.__name__}: {first_mistake(error, names)}") from None
        for name, given in settings.items():  # pydantic reads True as 1
            if isinstance(given, bool) and type(getattr(self, name)) in (int, float):
                raise ValueError(f"{kind.__name__}: {name}: expected a number, got {given}")

    made.__init__ = __init__
    checked: type[_Kind] = made
    return checked


def whole(name: str, value: Any, least: int) -> int:
    """The setting `name` as a whole number from `least` on; 2.0 is one.

    Raises:
        ValueError: it is none.

    >>> whole("steps", 2.5, 1)
    Traceback (most recent call last):
        ...
    ValueError: steps: expected a whole number from 1, got 2.5
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or value < least or value % 1:
        raise ValueError(f"{name}: expected a whole number from {least}, got {_shown(value)}")
    return int(value)


def number(name: str, value: Any, interval: str) -> float:
    """The setting `name`, if it is a number of `interval`, written as in "(0, 1]".

    Raises:
        ValueError: it is none.

    >>> number("p_init", 1.5, "(0, 1]")
    Traceback (most recent call last):
        ...
    ValueError: p_init: expected a number in (0, 1], got 1.5
    """
    low, high = map(float, interval[1:-1].split(","))
    valid = isinstance(value, Real) and not isinstance(value, bool)
    valid = valid and (low < value if interval[0] == "(" else low <= value)
    if not valid or not (value < high if interval[-1] == ")" else value <= high):
        raise ValueError(f"{name}: expected a number in {interval}, got {_shown(value)}")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """The setting `name` as True or False; a text such as "no" would count as true.

    Raises:
        ValueError: it is neither.

    >>> switch("bfloat16", "no")
    Traceback (most recent call last):
        ...
    ValueError: bfloat16: expected True or False, got 'no'
    """
    if value not in (True, False):
        raise ValueError(f"{name}: expected True or False, got {_shown(value)}")
    return bool(value)


def first_mistake(error: ValidationError, known: Iterable[str] = ()) -> str:
    """`PLACE: what is wrong` of the first mistake, in one line; `known` as for `mistake`."""
    # A misspelt name says more than that the right one is missing.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] not in _UNKNOWN)
    place = one_line(".".join(map(str, first["loc"])), 120)
    return one_line(": ".join(filter(None, [place, mistake(first, known)])), 500)


def mistake(found: Any, known: Iterable[str] = ()) -> str:
    """What is wrong, of a mistake that pydantic found: expected what, got what.

    Args:
        found: one of `ValidationError.errors()`.
        known: names of the settings there, for the hint where a name is not one of them.
    """
    kind, given = found["type"], found["input"]
    if kind in _UNKNOWN:
        return f"there is no such setting{did_you_mean(found['loc'][-1], known)}"
    if kind == "union_tag_invalid":
        expected, tag = found["ctx"]["expected_tags"], found["ctx"]["tag"]
        near = did_you_mean(tag, re.findall(r"'(\w+)'", expected))
        return f"expected kind {one_line(expected)}; got {one_line(tag, 80)!r}{near}"
    if kind in ("union_tag_not_found", "model_attributes_type"):
        return "expected a mapping with a kind"
    if dataclasses.is_dataclass(given) and "class_name" in found.get("ctx", {}):
        return f"expected {found['ctx']['class_name']}, got {_shown(given)}"
    if kind in ("model_type", "dataclass_type", "dict_type"):
        return f"expected a mapping, got {_shown(given)}"
    message = str(found["msg"]).removeprefix("Value error, ")
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument", "value_error"):
        return message
    if isinstance(given, dict):
        return f"{message}, got a mapping"
    if kind in ("literal_error", "enum"):
        hint = did_you_mean(given, re.findall(r"'([^']+)'", found["ctx"]["expected"]))
    elif kind in ("list_type", "sequence_str"):
        hint = f": write [{'' if given is None else one_line(given, 80)}]"
    else:
        hint = ""
    return f"{message}, got {_shown(given)}{hint}"


def _shown(value: object) -> str:
    return one_line(repr(value), 80)
