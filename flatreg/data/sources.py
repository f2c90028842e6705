"""Every kind of data that a recipe can name; all are read into memory, mostly as uint8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flatreg.data.arrays import Array, Digits
from flatreg.data.image_files import Folder, Timm
from flatreg.data.images import ImageArrays, Source, Splits, augment
from flatreg.data.torchvision import Torchvision

Data = Annotated[Digits | Array | Torchvision | Timm | Folder, Field(discriminator="kind")]


def source_name(data: Mapping[str, Any]) -> str:
    """What a table calls the data of a recipe: its name, its file or folder, or its kind.

    >>> source_name({"kind": "torchvision", "name": "FashionMNIST", "root": "data"})
    'FashionMNIST'
    >>> source_name({"kind": "array", "path": "sets/small.npz"})
    'small'
    """
    if data["kind"] == "array":
        return Path(data["path"]).stem
    if data["kind"] == "timm" and "/" not in data["name"]:  # which says "folder", not which
        return Path(data["root"]).name
    places = (Path(data[key]).name for key in ("name", "path", "root") if data.get(key))
    return next((place for place in places if place), data["kind"])


__all__ = [
    "Array",
    "Data",
    "Digits",
    "Folder",
    "ImageArrays",
    "Source",
    "Splits",
    "Timm",
    "Torchvision",
    "augment",
    "source_name",
]
