"""The card on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter

from flatreg.atomic import write_whole
from flatreg.geometry.card import SCHEMA, GeometryCard
from flatreg.geometry.text import card_text

_CARD = TypeAdapter(GeometryCard)


def write_card(card: GeometryCard, folder: Path, figures: Mapping[str, str]) -> None:
    """Write `card.json` and `card.md`; `figures` maps file names to captions."""
    write_whole(folder / "card.json", _CARD.dump_json(card, indent=1).decode())
    write_whole(
        folder / "card.md",
        f"# Geometry of {card.model}\n\n```\n{card_text(card)}\n```\n\n{pictures(figures)}\n",
    )


def read_card(folder: Path) -> GeometryCard:
    """Read `card.json` back.

    Raises:
        ValueError: it has another schema.
    """
    text = (folder / "card.json").read_text()
    found = json.loads(text).get("schema")
    if found != SCHEMA:
        raise ValueError(f"{folder}/card.json: expected schema {SCHEMA}, got {found}")
    return _CARD.validate_json(text)


def pictures(figures: Mapping[str, str]) -> str:
    """Markdown of figures, given as file name to caption."""
    return "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items())
