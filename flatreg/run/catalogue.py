"""What a recipe can name, read off the configuration itself: `flatreg list`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flatreg.attacks.cascade import PRESETS, describe
from flatreg.data.sources import Data
from flatreg.measures.manifold import Manifold
from flatreg.optimizers.methods import Wrapper
from flatreg.terms import Criterion, Penalty
from flatreg.terms.protocol import Schedule

_UNIONS: dict[str, Any] = {
    "criteria": Criterion,
    "penalties": Penalty,
    "schedules": Schedule,
    "manifolds": Manifold,
    "wrappers": Wrapper,
    "data": Data,
}
TOPICS = (*_UNIONS, "attacks")
_WIDTH = 100
_LEGEND = "Settings without = are needed; of choices a|b after = the first is the default."


def listing(topic: str | None = None) -> str:
    """The kinds that a recipe can name, each with its first docstring line and its settings.

    Args:
        topic: one of `TOPICS`; all of them by default.

    Returns:
        Lines of at most 100 columns.

    Raises:
        ValueError: there is no such topic.
    """
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"topic: expected one of {', '.join(TOPICS)}, got {topic!r}")
    sections = [_section(name) for name in ([topic] if topic else TOPICS)]
    return "\n\n".join([*sections, _LEGEND] if topic != "attacks" else sections)


def members(union: Any) -> dict[str, type]:
    """The classes of a discriminated union by their kind."""
    return {_fields(member)["kind"].default: member for member in get_args(get_args(union)[0])}


def _section(topic: str) -> str:
    if topic == "attacks":
        entries = {
            name: (" > ".join(map(describe, stages)), "") for name, stages in PRESETS.items()
        }
    else:
        entries = {
            kind: ((inspect.getdoc(member) or "").split("\n")[0], ", ".join(_settings(member)))
            for kind, member in members(_UNIONS[topic]).items()
        }
    column = 4 + max(map(len, entries))
    lines = [topic]
    for kind, texts in entries.items():
        wrapped = [line for text in texts for line in _wrapped(text, _WIDTH - column)]
        lines.append(f"  {kind}".ljust(column) + wrapped[0])
        lines += [" " * column + line for line in wrapped[1:]]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _fields(member: Any) -> dict[str, FieldInfo]:
    """Of a model or of a pydantic dataclass."""
    is_model = issubclass(member, BaseModel)
    fields: dict[str, FieldInfo] = member.model_fields if is_model else member.__pydantic_fields__
    return fields


def _settings(member: type) -> Iterator[str]:
    """Settings as a recipe spells them: first those that are needed, last those of all kinds."""
    fields = {
        name: field
        for name, field in _fields(member).items()
        if name != "kind" and not field.exclude and field.repr
    }
    own = inspect.get_annotations(member)
    order = sorted(fields, key=lambda name: (not fields[name].is_required(), name not in own))
    for name in order:
        field, choices = fields[name], _choices(fields[name].annotation)
        if not field.is_required():
            default = _spelled(field.get_default(call_default_factory=True))
            choices = [default, *(choice for choice in choices if choice != default)]
            yield f"{name}={'|'.join(choices)}"
        else:
            yield f"{name} (one of {', '.join(choices)})" if choices else name


def _choices(annotation: Any) -> list[str]:
    """What a setting can be, where a recipe spells it by a name; nothing for a plain number."""
    alternatives = list(_alternatives(annotation))
    named = [a for a in alternatives if not isinstance(a, type) or hasattr(a, "kind")]
    return [_spelled(a) for a in alternatives] if named else []


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Values of literals, and types, that an annotation admits; None is left to be a default."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    elif origin is Literal:
        yield from get_args(annotation)
    elif annotation is not NoneType:
        yield origin or annotation


def _spelled(value: Any) -> str:
    """As in a recipe: a kind by its name, a type by its own."""
    if hasattr(value, "kind"):
        return str(value.kind)
    return value.__name__ if isinstance(value, type) else str(value)
