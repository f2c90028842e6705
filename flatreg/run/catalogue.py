"""What a recipe can name: `flatreg list`.

The kinds, their first docstring lines and their settings are read off the classes and kept in
`catalogue.json`, so that the command line lists them without importing torch. After a change of a
kind, `python -m flatreg.run.catalogue` writes the file again; a test compares it with the classes.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from flatreg.data.text import did_you_mean

TOPICS = ("criteria", "penalties", "schedules", "manifolds", "wrappers", "data", "attacks")
FILE = Path(__file__).with_name("catalogue.json")
_WIDTH = 100
_LEGEND = "Settings without = are needed; of choices a|b after = the first is the default."


def listing(topic: str | None = None) -> str:
    """Text of the kinds of one of `TOPICS`, or of all; at most 100 columns wide.

    Raises:
        ValueError: there is no such topic.
    """
    sections = [_section(name, found) for name, found in kinds(topic).items()]
    return "\n\n".join([*sections, _LEGEND] if topic != "attacks" else sections)


def kinds(topic: str | None = None) -> dict[str, dict[str, list[str]]]:
    """Of one of `TOPICS`, or of all: by kind the first docstring line and the settings.

    Raises:
        ValueError: there is no such topic.
    """
    if topic is not None and topic not in TOPICS:
        near = did_you_mean(topic, TOPICS)
        raise ValueError(f"topic: expected one of {', '.join(TOPICS)}, got {topic!r:.80}{near}")
    found: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: found[name] for name in ([topic] if topic else TOPICS)}


def _section(topic: str, kinds: dict[str, list[str]]) -> str:
    column = 4 + max(map(len, kinds))
    lines = [topic]
    for kind, texts in kinds.items():
        wrap = textwrap.TextWrapper(_WIDTH - column, break_on_hyphens=False).wrap
        wrapped = [one for text in texts for one in wrap(text)]
        lines.append(f"  {kind}".ljust(column) + wrapped[0])
        lines += [" " * column + line for line in wrapped[1:]]
    return "\n".join(lines)


def read_classes() -> dict[str, dict[str, list[str]]]:
    """Content of `catalogue.json`: by topic and kind, the first docstring line and the settings."""
    from flatreg.attacks.cascade import PRESETS, describe
    from flatreg.data.sources import Data
    from flatreg.measures.manifold import Manifold
    from flatreg.optimizers import methods
    from flatreg.optimizers.methods import Wrapper
    from flatreg.terms import Criterion, Penalty
    from flatreg.terms.protocol import Schedule

    unions: dict[str, Any] = {
        "criteria": Criterion,
        "penalties": Penalty,
        "schedules": Schedule,
        "manifolds": Manifold,
        "wrappers": Wrapper,
        "data": Data,
    }
    found: dict[str, dict[str, list[str]]] = {}
    for topic, union in unions.items():
        found[topic] = {}
        for member in get_args(get_args(union)[0]):
            kind = _fields(member)["kind"].default
            # The settings of a wrapper have their docstring at the method of the same name.
            explained = getattr(methods, kind, member)
            first_line = (inspect.getdoc(explained) or "").split("\n")[0]
            found[topic][kind] = [first_line, ", ".join(_settings(member))]
    found["attacks"] = {
        name: [" > ".join(map(describe, stages))] for name, stages in PRESETS.items()
    }
    return found


def settings_at(kind: Any, location: Sequence[int | str]) -> list[str]:
    """Names of the settings at a place of pydantic, below one of `kind`."""
    for key in location:
        inner: Any = None
        for one in members(kind):
            fields = _fields(one)
            if get_origin(one) in (list, dict):
                inner = inner or get_args(one)[-1]
            elif key in fields and inner is None:
                inner = fields[str(key)].annotation
            elif "kind" in fields and fields["kind"].default == key:
                inner = one
        kind = kind if inner is None else inner
    return [name for one in members(kind) for name in _fields(one)]


def members(annotation: Any) -> list[Any]:
    """The types of which an annotation admits one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [inner for one in get_args(annotation) for inner in members(one)]
    return [annotation]


def _fields(member: Any) -> dict[str, Any]:
    """Fields of a pydantic model or dataclass; of another type none."""
    fields: dict[str, Any] = getattr(member, "__pydantic_fields__", {})
    return fields


def _settings(member: type) -> Iterator[str]:
    """Settings as a recipe spells them: first those that are needed, last those of all kinds."""
    fields, own = _fields(member), inspect.get_annotations(member)
    order = sorted(fields, key=lambda name: (not fields[name].is_required(), name not in own))
    for name in order:
        if name == "kind" or fields[name].exclude or not fields[name].repr:
            continue
        field, choices = fields[name], _choices(fields[name].annotation)
        if not field.is_required():
            default = _spelled(field.get_default(call_default_factory=True))
            choices = [default, *(choice for choice in choices if choice != default)]
            yield f"{name}={'|'.join(choices)}"
        else:
            yield f"{name} (one of {', '.join(choices)})" if choices else name


def _choices(annotation: Any) -> list[str]:
    """What a setting can be, where a recipe spells it by a name; nothing for a plain number.

    None is left to be a default.
    """
    alternatives = [
        value
        for one in members(annotation)
        for value in (get_args(one) if get_origin(one) is Literal else [get_origin(one) or one])
        if value is not NoneType
    ]
    named = [a for a in alternatives if not isinstance(a, type) or hasattr(a, "kind")]
    return [_spelled(a) for a in alternatives] if named else []


def _spelled(value: Any) -> str:
    """As in a recipe: a kind by its name, a type by its own."""
    if hasattr(value, "kind"):
        return str(value.kind)
    return value.__name__ if isinstance(value, type) else str(value)


if __name__ == "__main__":
    FILE.write_text(json.dumps(read_classes(), indent=1) + "\n", encoding="utf-8")
