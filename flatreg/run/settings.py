"""Settings as text: a YAML file, and `key=value` on the command line.

The command line answers a misspelt setting from here, so this file imports neither torch nor
pydantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe or a setting that cannot be read; one line a mistake."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:  # before merge keys (<<) put theirs beside them
            if key.value in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f"line {line}: the key {key.value!r} stands there twice")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Content of a YAML file, changed by `key.path=value` overrides (list items by number).

    Raises:
        RecipeError: the file cannot be read, is not YAML or no mapping; or an override is not of
            that form, or leads to no place in the file.
    """
    settings = parse_settings(overrides)
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping, got {type(raw).__name__}")
    for key, value in settings.items():
        set_at(raw, key, value)
    return raw


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
            raise RecipeError(f"expected key=value, got {override!r}")
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
        raise RecipeError(f"expected key=value,value,..., got {text!r}")
    parsed: list[Any] = _parse(text, f"[{values}]")
    return key, parsed


def set_at(raw: Any, path: str, value: Any) -> None:
    """Put `value` at a dotted path of nested mappings and lists; missing mappings are made.

    Raises:
        RecipeError: there is no such place.
    """
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    try:
        for key in parents:
            raw = raw.setdefault(key, {}) if isinstance(raw, dict) else raw[key]
        raw[last] = value
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: no such place in the recipe") from error


def _parse(override: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(f"{override!r}: {str(error).partition(': ')[2]}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML") from error
