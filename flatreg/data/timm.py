"""Data by timm's names: its image folders, and sets of Hugging Face's `datasets`."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass

from flatreg.data.decode import Undecoded, decoded_splits, from_files
from flatreg.data.folder import check_same_classes
from flatreg.data.images import Size, Source, Splits
from flatreg.terms import CONFIG

_ITERABLE = ("hfids", "tfds", "wds")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Timm(Source):
    """What `timm.data.create_dataset` names, decoded into memory.

    A name without a slash ("folder") is an image folder with a folder a split below `root`;
    "hfds/OWNER/SET" a set of Hugging Face's `datasets`, fetched where it is missing. No code of a
    set is run, and timm's tar files are not read: it keeps their index as a pickle.

    Args:
        name: as above.
        root: the folder; for hfds where fetched files are kept, by default where `datasets` does.
        size: height and width in pixels: the shorter side is resized to it (bilinear, antialiased),
            the rest cropped.
        train_split: what to train on.
        test_split: what to test on; timm takes its synonyms too (val, valid, eval).
        input_key: of hfds, the column of images; "image" by default.
        target_key: of hfds, the column of labels; "label" by default.
        channels: 3, or 1 for grey.
        hold_back, limit, test_limit: see `flatreg.data.Source`.
    """

    name: str
    root: str | None = None
    size: Size
    train_split: str = "train"
    test_split: str = "validation"
    input_key: str | None = None
    target_key: str | None = None
    channels: Literal[1, 3] = 3
    kind: Literal["timm"] = "timm"

    @field_validator("name")
    @classmethod
    def _is_map_style(cls, name: str) -> str:
        prefix, slash, rest = name.partition("/")
        if slash and prefix.lower() in _ITERABLE:
            raise ValueError(
                f"expected a set with random access (a folder, hfds/...), got {name}: an iterable"
            )
        if slash and prefix.lower() == "torch":
            raise ValueError(f"torch/ is kind: torchvision here, with its name for {rest!r}")
        if slash and prefix.lower() != "hfds":
            raise ValueError(f"expected a name without a slash, or hfds/OWNER/SET, got {name!r}")
        return name

    def load(self) -> Splits:
        """Find, decode and resize.

        Raises:
            ValueError: the data, one of its splits or the package that reads it is missing, the
                splits have different classes, labels are not published, a file is no image (it is
                named), they are too large for the memory, or `limit` or what is held back is too
                small for the classes.
        """
        hub = "/" in self.name
        package = find_spec("datasets") if hub else None
        if hub and not (package and package.origin):  # a folder of that name has no origin
            raise ValueError(f"data.name: {self.name} needs a package: pip install datasets")
        if not hub and not (self.root and Path(self.root).expanduser().is_dir()):
            raise ValueError(f"data.root: expected a folder of images, found none at {self.root}")
        train, test = self._reader(self.train_split), self._reader(self.test_split)
        if not hub and train.root == test.root:  # timm falls back to the root itself
            raise ValueError(
                f"data: expected folders {self.train_split} and {self.test_split} in {self.root}"
            )
        check_same_classes(f"data: {self.name}", list(train.class_to_idx), list(test.class_to_idx))
        undecoded = self._on_hub if hub else _in_folder
        return decoded_splits(
            self, undecoded(train, self.train_split), undecoded(test, self.test_split),
            size=self.size, channels=self.channels, name=self.name,
        )  # fmt: skip

    def _reader(self, split: str) -> Any:
        """The reader below timm's dataset, which would skip what does not decode."""
        from timm.data import create_dataset  # where it is needed: half a second

        keys = {"input_key": self.input_key, "target_key": self.target_key}
        given = {key: value for key, value in keys.items() if value and "/" in self.name}
        root = str(Path(self.root).expanduser()) if self.root else None
        try:
            return create_dataset(self.name, root=root, split=split, **given).reader
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"data: {self.name}, split {split}: {reason}") from error

    def _on_hub(self, reader: Any, split: str) -> Undecoded:
        """Images in a column: bytes, or the path of a file."""
        labels = torch.tensor(list(reader.dataset[reader.label_key]))
        if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0:
            raise ValueError(
                f"data: {self.name}, split {split}: expected class numbers in {reader.label_key}; "
                "some are negative (not published) or of another form"
            )

        def opened(position: int) -> tuple[Any, str]:
            stream, *_ = reader[position]
            with stream:
                return io.BytesIO(stream.read()), f"{self.name}, split {split}, image {position}"

        return Undecoded(labels, opened)


def _in_folder(reader: Any, split: str) -> Undecoded:
    files, labels = zip(*reader.samples, strict=True)
    return from_files(list(files), torch.tensor(labels))
