"""Data that a trained model did not see in its training: what `--data` stands for, and fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from flatreg.data.files import check_apart
from flatreg.data.image_files import Timm
from flatreg.data.images import Splits
from flatreg.data.sources import Data, Digits
from flatreg.data.text import did_you_mean, one_line
from flatreg.data.torchvision import Files, Name
from flatreg.models.hub import is_stored
from flatreg.run.checkpoints import read_built
from flatreg.run.places import DATA_FORMS
from flatreg.run.recipe_sections import Model

_OF_STREAMS = ("crop_pct", "interpolation")
_MOST_WORKERS = 8


def as_trained(
    arms: Sequence[Path], source: Data, data: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of data for trained arms: images are cut as those of their training were.

    Args:
        arms: folders of checkpoints.
        source: data of their training.
        data: the short form of others; None for the same.
        given: settings of data that were asked for, which go first.

    Raises:
        ValueError: the arms were trained on images that were cut in different ways, or `given` asks
            for images in memory, which are not cropped, and the training cropped them.
    """
    built = [read_built(arm) for arm in arms]
    ways: dict[str, list[Any]] = {
        "size": [max(one.image_size) for one in built],
        "channels": [one.channels for one in built],
        "crop_pct": [one.crop_pct for one in built],
        "interpolation": [one.interpolation for one in built],
    }
    for key, values in ways.items():
        if key not in given and len(set(values)) > 1:
            raise ValueError(
                f"data: the arms were trained with {key} {', '.join(map(str, values))}: write "
                f"data.{key}=, or evaluate them one by one"
            )
    cut = {key: values[0] for key, values in ways.items()}
    workers = given.get("workers", None if getattr(source, "workers", 0) else 0)
    if given.get("workers") == 0 and cut.get("crop_pct", 1) != 1:
        raise ValueError(
            f"data.workers=0 does not crop, the training did, to {cut['crop_pct']:g}: write "
            "data.workers=1 or more"
        )
    raw: dict[str, Any]
    if data is not None:
        raw = short_form(data, _streamed(cut, workers), every=True)
        if raw["kind"] == "digits" and isinstance(source, Digits):
            raw["test"] = source.test
        return raw
    raw = TypeAdapter(Data).dump_python(source, mode="json")
    if workers and "workers" in raw:
        raw |= {key: cut[key] for key in _OF_STREAMS if key in cut}
    return raw


def cut_of(model: Model, workers: object = None) -> dict[str, Any]:
    """How timm cuts the images in files that it evaluates a model on: nothing, if it has none."""
    config = model.recorded()
    cut: dict[str, Any] = {}
    if shape := config.get("input_size"):
        cut = {"size": shape[-1], "crop_pct": config["crop_pct"]}
        if is_stored(model.name) and shape[0] in (1, 3):
            cut["channels"] = shape[0]
    if config.get("interpolation") in ("bilinear", "bicubic"):
        cut["interpolation"] = config["interpolation"]
    return _streamed(cut, workers)


def _streamed(cut: dict[str, Any], workers: object) -> dict[str, Any]:
    """As `cut` says, by `workers`, by default as many as processors; 0 reads them into memory."""
    if workers == 0:
        return {key: value for key, value in cut.items() if key not in _OF_STREAMS}
    return cut | {"workers": workers or min(_MOST_WORKERS, os.cpu_count() or 1)}


def short_form(data: str, cut: Mapping[str, Any], *, every: bool = False) -> dict[str, Any]:
    """The settings that `--data` stands for.

    Images in files are cut as `cut` says. With `every`, those of a known size are resized to its
    `size` too, and where it has 3 channels, grey ones are repeated.
    """
    size = {"size": cut["size"]} if every and "size" in cut else {}
    colour = {"channels": 3} if every and cut.get("channels") == 3 else {}
    if data == "digits":
        return {"kind": "digits"} | size
    if data.endswith(".npz"):
        return {"kind": "array", "path": data} | colour
    if data and Path(data).expanduser().is_dir():
        return {"kind": "folder", "path": data} | {**cut}
    if data.startswith("hfds/"):
        return {"kind": "timm", "name": data} | {**cut}
    name, colon, root = data.partition(":")
    names = (one for part in get_args(Name) for one in get_args(part) or (part,))
    sets = {one.lower(): one for one in names}
    if colon and root and name.lower() in sets:
        varies = sets[name.lower()] in (*get_args(Files), "Imagenette")
        files = {key: value for key, value in cut.items() if key != "channels"}
        own = {"kind": "torchvision", "name": sets[name.lower()], "root": root}
        return own | (files if varies else size | colour)
    near = did_you_mean(name, sets.values()) if colon else ""
    near = f"; did you mean {data}:ROOT?" if data.lower() in sets else near
    raise ValueError(f"--data: expected {DATA_FORMS}; got {one_line(data, 80)!r}{near}")


def check_data(arm: Path, splits: Splits, *, sized: bool) -> None:
    """Refuse data that are not of the kind that the model of an arm was trained on.

    Raises:
        ValueError: as `check_classes`; the images have other channels, or, unless their size was
            asked for (`sized`), another size.
    """
    built, shape = read_built(arm), tuple(splits.test.shape)
    check_classes(built.class_names, built.num_classes, splits)
    seen = 1 if sized else len(built.shape)
    if built.shape[:seen] != shape[:seen]:
        own, others = ("x".join(map(str, one)) for one in (built.shape, shape))
        raise ValueError(
            f"data: expected images of {own}, as the model was trained on, got {others}: "
            "write data.size= for another size of images that have one"
        )


def check_unseen(source: Data, asked: Data, split: str) -> None:
    """Refuse a test or validation split that takes in images of the training.

    Raises:
        ValueError: `asked` are the data of the training, `source`, held back in another way, or the
            split that was trained on.
    """
    names = {"test": ("test",), "validation": ("validation", "limit", "test")}.get(split, ())
    of = ("kind", "name", "path", "root", "train_split")
    if any(getattr(source, name, None) != getattr(asked, name, None) for name in of):
        return
    if split == "test" and isinstance(asked, Timm) and isinstance(source, Timm):
        check_apart([source.train_split], [asked.test_split])
    for name in names:
        held_back, others = getattr(source, name, None), getattr(asked, name, None)
        if held_back != others:
            raise ValueError(
                f"data.{name}: expected {held_back}, as in the training, got {others}: images "
                f"that were trained on would count as {split} images"
            )


def check_classes(own: tuple[str, ...] | None, num_classes: int, splits: Splits) -> None:
    """Refuse data whose class numbers do not mean what they mean to a model.

    Raises:
        ValueError: they are known not to: by names, or by how many there are.
    """
    others = splits.class_names
    wrong = splits.num_classes > num_classes
    if others:
        wrong = own != others if own else len(others) != num_classes
    if wrong:
        names = [f" ({one_line(', '.join(one), 60)})" if one else "" for one in (own, others)]
        raise ValueError(
            f"data: expected the {num_classes} classes of the model{names[0]}, got "
            f"{splits.num_classes}{names[1]}"
        )
