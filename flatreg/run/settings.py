"""Settings as text: a YAML file, and `key=value` on the command line.

The command line answers a misspelt setting from here, so this file imports neither torch nor
pydantic.
"""

from __future__ import annotations

import codecs
import math
import re
import stat
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from flatreg.data.text import CONTROL, one_line

_BYTES = 100_000  # of a file; a recipe has about 1,500
_DEPTH = 20
_VALUES = 5_000  # with what aliases (*a) and merges (<<) repeat
_SHOWN = 80  # characters of a value in a message
_LARGEST = 2**63
_MOST = 10_000  # no size or count of a network is larger; memory and time would be
_LONGEST = 200
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}


class RecipeError(ValueError):
    """A recipe or a setting that cannot be read; one line a mistake."""


class Settings(NamedTuple):
    """Nested mappings and lists, and where each of their places was written.

    Attributes:
        places: by path, such as ("penalties", 0, "eps"); "recipe.yaml:12", or "epochs=3" where the
            command line says it.
        changes: what the command line says, by path: "epochs=3".
    """

    values: dict[str, Any]
    places: dict[tuple[str | int, ...], str]
    changes: Mapping[tuple[str | int, ...], str] = MappingProxyType({})

    def place(self, path: Sequence[str | int], default: str) -> str:
        """Where `path` was written, else what it is part of; `default` where nothing is known.

        Of a section that the command line changes within, also the changes: the mistake may be one.
        """
        whole, ends = tuple(path), range(len(path), 0, -1)
        place = next((p for end in ends if (p := self.places.get(whole[:end]))), default)
        below = (at for at in self.changes if whole and at != whole and at[: len(whole)] == whole)
        return ", ".join([place, *(self.changes[at] for at in below)])


def told(error: Exception) -> str:
    """The mistake, in one line; of a recipe every mistake, one a line."""
    if isinstance(error, RecipeError):
        return "\n".join(one_line(line, 1000) for line in str(error).split("\n"))
    known = (ValueError, OSError, RuntimeError, TypeError, MemoryError, ArithmeticError)
    if isinstance(error, known) and str(error):
        return one_line(error, 1000)
    what = f"{type(error).__name__}: {error}"
    return f"unexpected {one_line(what, 300)} (--traceback shows where)"


class _Loader(yaml.SafeLoader):
    """Plain values with names as keys, each of them once; few enough, and not nested deeply."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _DEPTH:
            line = parent.start_mark.line + 1 if parent else 1
            raise _AtLine(f"expected at most {_DEPTH} levels", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and count what it is with its aliases and merges written out."""
        node = super().get_single_node()
        if node is not None and _count(node, {}, set()) > _VALUES:
            raise _wrong(node, f"expected at most {_VALUES:,} values, aliases written out")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, lambda: super(_Loader, self).construct_object(node, deep=deep))
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise _wrong(node, f"not YAML for a recipe: the tag {one_line(node.tag, _SHOWN)}")
        return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping, of whose keys YAML itself would take the last of each name."""
        seen = set()
        for key, _ in node.value:  # before merge keys (<<) put theirs beside them
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(key, "expected a name as key, got a list or a mapping")
            shown = one_line(key.value, _SHOWN)
            if key.value in seen:
                raise _wrong(key, f"the key {shown!r} stands there twice")
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise _wrong(key, f"expected a name as key, got {shown}: put it in quotes")
            seen.add(key.value)
        mapping = super().construct_mapping(node, deep=deep)
        if not all(isinstance(key, str) for key in mapping):
            raise _wrong(node, "expected names as keys of what is merged")
        return mapping


# A date, 1:30 and = are text: no setting is a date, and no one writes 90 as 1:30.
_Loader.yaml_implicit_resolvers = {
    first: [
        pair
        for pair in pairs
        if pair[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _wrong(node: Any, what: str) -> RecipeError:
    return _AtLine(what, node.start_mark.line + 1)


class _AtLine(RecipeError):
    """A mistake at a line of a text, before the name of the file is known."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


def _scalar(node: yaml.ScalarNode, construct: Any) -> Any:
    if node.tag not in _TAGS:
        raise _wrong(node, f"not YAML for a recipe: the tag {one_line(node.tag, _SHOWN)}")
    shown = one_line(node.value, _SHOWN)
    if node.tag.endswith((":int", ":float")) and ":" in node.value:
        return node.value  # sixties
    if node.tag.endswith(":int") and re.fullmatch("[-+]?0[0-7_]+", node.value):
        raise _wrong(node, f"expected a number without zeros before it, got {shown}")  # octal
    try:
        value = construct()
    except (ValueError, KeyError, OverflowError, AttributeError) as error:
        kind = node.tag.rpartition(":")[2]
        raise _wrong(node, f"expected a value of the tag {kind}, got {shown}") from error
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < _LARGEST):
        raise _wrong(node, f"expected a finite number below 2^63, got {shown}")
    if isinstance(value, str) and CONTROL.search(value):
        raise _wrong(node, f"expected text without control characters, got {shown}")
    return value


def _count(node: yaml.Node, known: dict[int, int], within: set[int]) -> int:
    """Values of a node, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in within:
        raise _wrong(node, "an alias stands inside of what it stands for")
    if id(node) not in known:
        within.add(id(node))
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known, within) for part in parts)
        within.discard(id(node))
    return known[id(node)]


def _lines(node: yaml.Node, path: tuple[str | int, ...], found: dict[Any, int]) -> None:
    """Line of every place of a document, by its path."""
    found.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _lines(item, (*path, number), found)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            place = (*path, key.value)
            found[place] = key.start_mark.line + 1
            _lines(value, place, found)


def _load(text: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """Value of a YAML text, and the line of every place.

    Raises:
        RecipeError: it is not YAML of plain values; with the `line` where that is known.
    """
    try:
        loader = _Loader(text)
        node, lines = loader.get_single_node(), dict[tuple[str | int, ...], int]()
        if node is None:
            return None, lines
        value = _written_out(loader.construct_document(node))
        _lines(node, (), lines)
        return value, lines
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        what = f"not YAML: {one_line(problem, 200)}"
        raise _AtLine(what, mark.line + 1 if mark else 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, max(0, error.position)) + 1
        raise _AtLine(f"not YAML: {one_line(error.reason)}", line) from error


def _written_out(value: Any) -> Any:
    """The value with a copy for each alias: a setting that changes one place changes no other."""
    if isinstance(value, dict):
        return {key: _written_out(item) for key, item in value.items()}
    return [_written_out(item) for item in value] if isinstance(value, list) else value


def _read(path: Path) -> str:
    """Text of a file, which is of a size that a person can have written.

    Raises:
        RecipeError: it is no file, cannot be read, is too large or not UTF-8.
    """
    try:
        mode = path.stat()
        if not stat.S_ISREG(mode.st_mode):
            inside = next((f": write {one}" for one in sorted(path.glob("*.yaml"))), "")
            kind = f"a folder{inside}" if stat.S_ISDIR(mode.st_mode) else "a pipe or a device"
            raise RecipeError(f"{path}: expected a file, it is {kind}")
        with path.open("rb") as stream:
            raw = stream.read(_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except RecipeError:
        raise
    except ValueError as error:  # a name with a zero byte
        raise RecipeError(f"{path}: {error}") from error
    if len(raw) > _BYTES:
        raise RecipeError(f"{path}: expected a recipe of at most {_BYTES:,} bytes")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RecipeError(f"{path}: expected UTF-8, it is UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: expected UTF-8, got other bytes") from error


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Content of a YAML file, changed by `key.path=value` overrides (list items by number).

    Raises:
        RecipeError: the file cannot be read, is not YAML or no mapping; or an override is not of
            that form, or leads to no place in the file.
    """
    settings, text = parse_settings(overrides), _read(Path(path))
    try:
        raw, lines = _load(text)
    except _AtLine as error:
        raise RecipeError(f"{path}:{error.line}: {error}") from error
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        cure = "write a recipe; if a run has written this file, delete it and run its recipe again"
        raise RecipeError(f"{path}: expected a mapping, got {got}: {cure}")
    places = {key: f"{path}:{line}" for key, line in lines.items() if key}
    written = {one.partition("=")[0]: one_line(one, _SHOWN) for one in overrides}
    for key, value in settings.items():
        set_at(raw, key, value)
        at = _path(key)
        places = {k: place for k, place in places.items() if k[: len(at)] != at}  # it replaces them
        places[at] = f"{path}, {written[key]}"
    changes = {at: written[key] for key in settings if (at := _path(key)) in places}
    return Settings(raw, places, changes)


def parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Values of `key=value` settings by their keys; the value is YAML, and the last one counts.

    >>> parse_settings(["epochs=2", "evaluation.eps=8/255", "model.args={depth: 10}"])
    {'epochs': 2, 'evaluation.eps': '8/255', 'model.args': {'depth': 10}}

    Raises:
        RecipeError: one is not of that form.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise RecipeError(f"expected key=value, got {_quoted(override)}")
        settings.pop(key, None)  # they are applied in the order of the command line
        settings[key] = _parse(override, text)
    return settings


def parse_over(text: str) -> tuple[str, list[Any]]:
    """Key and values of `key=value,value,...`; what follows `=` is the inside of a YAML list.

    >>> parse_over("penalties.0.strength=0.1,1")
    ('penalties.0.strength', [0.1, 1])
    >>> parse_over("model.args.channels=[8,16],[16,32]")
    ('model.args.channels', [[8, 16], [16, 32]])

    Raises:
        RecipeError: it is not of that form.
    """
    key, equals, values = text.partition("=")
    if not (key and equals and values.strip()):
        raise RecipeError(f"expected key=value,value,..., got {_quoted(text)}")
    parsed: list[Any] = _parse(text, f"[{values}]")
    return key, parsed


def set_at(raw: Any, path: str, value: Any) -> None:
    """Put `value` at a dotted path of nested mappings and lists; missing mappings are made.

    Raises:
        RecipeError: there is no such place.
    """
    *parents, last = _path(path)
    try:
        for key in parents:
            raw = raw.setdefault(str(key), {}) if isinstance(raw, dict) else raw[key]
        raw[str(last) if isinstance(raw, dict) else last] = value
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        shown = one_line(path, _SHOWN)
        raise RecipeError(f"{shown}: no such place in the recipe") from error


def _path(dotted: str) -> tuple[str | int, ...]:
    """Parts of a dotted path; a number is that of a list item."""
    parts = dotted.split(".")
    return tuple(int(p) if p.isascii() and p.isdigit() and len(p) < 9 else p for p in parts)


def _parse(override: str, text: str) -> Any:
    if len(text) > _BYTES:
        raise RecipeError(f"{_quoted(override)}: expected at most {_BYTES:,} characters")
    try:
        return _load(text)[0]
    except RecipeError as error:
        what = str(error)
        what = "the value is not YAML" if what.startswith("not YAML: ") else what
        raise RecipeError(f"{_quoted(override)}: {what}") from error


def _quoted(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return repr(shown)


def path_in(raw: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """Path of a mistake in the file; pydantic's own path also names the kinds of a union."""
    path: list[int | str] = []
    for position, key in enumerate(location):
        if isinstance(raw, dict) and key in raw:
            raw = raw[key]
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        elif position < len(location) - 1 or (isinstance(raw, dict) and raw.get("kind") == key):
            continue
        path.append(key)
    return path


def plain_values(value: Any, place: str = "") -> Any:
    """Numbers, booleans, names, lists and maps as they are; numbers that YAML read as text too.

    Raises:
        ValueError: it is something else, or too large.
    """
    at = f"{place}: " if place else ""
    if isinstance(value, Mapping):
        for key in value:
            if not str(key).isidentifier():
                hint = ": write a space after the colon" if ":" in str(key) else ""
                raise ValueError(f"{at}expected a name, got {one_line(key, _SHOWN)!r}{hint}")
        return {str(key): plain_values(item, f"{place}{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item, place) for item in value]
    if isinstance(value, str):
        if len(value) > _LONGEST:
            raise ValueError(f"{at}expected a name, got {len(value)} characters")
        with suppress(ValueError):  # YAML takes 1e-3 for text
            return plain_values(float(value), place)
        return value
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"{at}expected a number, true, false, a name, a list or a mapping, "
            f"got {type(value).__name__}"
        )
    if not (math.isfinite(value) and abs(value) <= _MOST):
        raise ValueError(f"{at}expected a number of at most {_MOST}, got {value:.3g}")
    return value
