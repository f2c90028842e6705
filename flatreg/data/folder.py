"""Folders of images, one a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass

from flatreg.data.decode import decoded_splits, from_files
from flatreg.data.images import Size, Source, Splits
from flatreg.terms import CONFIG

_TEST = ("test", "val", "validation")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Folder(Source):
    """Image files in PATH/train/CLASS and PATH/test/CLASS, decoded into memory.

    Where there is no `test`, it is `val`, then `validation`. The files are those that
    torchvision's `ImageFolder` finds (jpg, png, ppm, bmp, pgm, tif, webp, at any depth).

    Args:
        path: of the folder.
        size: height and width in pixels: the shorter side is resized to it (bilinear, antialiased),
            the rest cropped.
        channels: 3, or 1 for grey.
        hold_back, limit, test_limit: see `flatreg.data.Source`.
    """

    path: str
    size: Size
    channels: Literal[1, 3] = 3
    kind: Literal["folder"] = "folder"

    def load(self) -> Splits:
        """Find, decode and resize.

        Raises:
            ValueError: a split or the images of a class are missing, the splits have different
                classes, a file is no image (it is named), they are too large for the memory, or
                `limit` or what is held back is too small for the classes.
        """
        root = Path(self.path).expanduser()
        if not (root / "train").is_dir():
            raise ValueError(f"data.path: expected PATH/train/CLASS/*, found no {root / 'train'}")
        held = next((root / name for name in _TEST if (root / name).is_dir()), None)
        if held is None:
            raise ValueError(f"data.path: expected one of {', '.join(_TEST)} in {root}, found none")
        train, test = _found(root / "train"), _found(held)
        check_same_classes(self.path, train.classes, test.classes)
        files = (
            from_files([path for path, _ in split.samples], torch.tensor(split.targets))
            for split in (train, test)
        )
        return decoded_splits(self, *files, size=self.size, channels=self.channels, name=root.name)


def check_same_classes(where: str, train: list[str], test: list[str]) -> None:
    """Refuse splits whose classes differ: their numbers would not mean the same.

    Raises:
        ValueError: they do.
    """
    if train != test:
        only = (sorted(set(a) - set(b)) for a, b in ((train, test), (test, train)))
        missing = " and ".join(
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} only for {split}"
            for names, split in zip(only, ("training", "test"), strict=True)
            if names
        )
        raise ValueError(f"{where}: expected the same classes in both splits, got {missing}")


def _found(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped] # a second to import

    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = " ".join(str(error).split()).split(" Supported")[0]
        raise ValueError(f"{folder}: {reason}") from error
