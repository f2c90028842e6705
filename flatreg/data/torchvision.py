"""torchvision's classification sets that come with a training and a test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.data.arrays import find_idx, read_split
from flatreg.data.image_files import unread_files
from flatreg.data.images import ImageArrays, Source, Splits, unread_arrays
from flatreg.terms.protocol import CONFIG, Count

Name = Literal[
    "MNIST",
    "FashionMNIST",
    "KMNIST",
    "USPS",
    "CIFAR10",
    "CIFAR100",
    "SVHN",
    "STL10",
    "GTSRB",
    "OxfordIIITPet",
    "Flowers102",
    "Food101",
    "DTD",
    "FGVCAircraft",
    "Imagenette",
]


class _Reader(NamedTuple):
    """How torchvision is asked for the two splits, and where it keeps files and labels."""

    train: dict[str, Any]
    test: dict[str, Any]
    labels: str
    files: str | None  # None: the images are an array, in `data`


_TRAIN: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_TRAINVAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "trainval"}, {"split": "test"})

# The MNIST family is missing: flatreg.data.arrays reads it, gzipped or not.
# torchvision's CIFAR readers unpickle the official batches, and nothing else: their constructor
# compares every file with a fixed md5 first (`_check_integrity`) and refuses the folder otherwise.
_READERS: dict[str, _Reader] = {
    "USPS": _Reader(*_TRAIN, "targets", None),
    "CIFAR10": _Reader(*_TRAIN, "targets", None),
    "CIFAR100": _Reader(*_TRAIN, "targets", None),
    "SVHN": _Reader(*_SPLIT, "labels", None),
    "STL10": _Reader(*_SPLIT, "labels", None),
    "GTSRB": _Reader(*_SPLIT, "_samples", "_samples"),
    "OxfordIIITPet": _Reader(*_TRAINVAL, "_labels", "_images"),
    "Flowers102": _Reader(*_SPLIT, "_labels", "_image_files"),
    "Food101": _Reader(*_SPLIT, "_labels", "_image_files"),
    "DTD": _Reader(*_SPLIT, "_labels", "_image_files"),
    "FGVCAircraft": _Reader(*_TRAINVAL, "_labels", "_image_files"),
    "Imagenette": _Reader({"split": "train"}, {"split": "val"}, "_samples", "_samples"),
}
_FAMILY = ("MNIST", "FashionMNIST", "KMNIST")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Torchvision(Source):
    """A set of `torchvision.datasets`, decoded into memory.

    | name                                 | training, test split | pixels | classes          |
    |--------------------------------------|----------------------|--------|------------------|
    | MNIST, FashionMNIST, KMNIST          | train, t10k          | 28     | 10               |
    | USPS                                 | train, test          | 16     | 10               |
    | CIFAR10, CIFAR100                    | train, test          | 32     | 10, 100          |
    | SVHN, STL10                          | train, test          | 32, 96 | 10               |
    | GTSRB, Flowers102, Food101, DTD      | train, test          | vary   | 43, 102, 101, 47 |
    | OxfordIIITPet, FGVCAircraft          | trainval, test       | vary   | 37, 100          |
    | Imagenette                           | train, val           | vary   | 10               |

    The idx files of the MNIST family may be gzipped, in ROOT/NAME/raw or in ROOT itself: Debian's
    package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist.

    Args:
        name: of the set, as above.
        root: folder in which torchvision looks for it.
        size: height and width in pixels: the shorter side is resized to it (bilinear, antialiased),
            the rest cropped. As they are by default; needed where they vary.
        channels: 3 repeats the channel of grey images, for a model that takes colour.
        download: fetch what is missing.
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    name: Name
    root: str
    size: Count | None = None
    channels: Literal[3] | None = None
    download: bool = False
    kind: Literal["torchvision"] = "torchvision"

    @model_validator(mode="after")
    def _has_a_size(self) -> Torchvision:
        if self.size is None and self.name not in _FAMILY and _READERS[self.name].files:
            raise ValueError(f"size is needed: the images of {self.name} vary in theirs")
        return self

    def load(self) -> Splits:
        """Read, decode and resize.

        Raises:
            ValueError: the files are missing or damaged, too large for the memory, or `limit` or
                `validation` is too small for the classes.
        """
        if self.name in _FAMILY:
            return self._from_arrays(*self._read_family())
        reader = _READERS[self.name]
        both = [self._construct(split) for split in (reader.train, reader.test)]
        if reader.files is None:
            return self._from_arrays(*(_arrays(dataset, reader.labels) for dataset in both))
        assert self.size  # for the type checker: `_has_a_size` asked for it
        shape = (3, self.size, self.size)
        unread = (
            unread_files(*_files(dataset, reader), size=self.size, channels=3, name=self.name)
            for dataset in both
        )
        return self.splits(*unread, shape=shape)

    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _read_family(self) -> tuple[ImageArrays, ImageArrays]:
        root = self._folder()
        folders = [root / self.name / "raw", root]
        files = find_idx(folders)
        if files is None and self.download:
            self._construct({"train": True})
            files = find_idx(folders)
        if files is None:
            raise ValueError(
                f"data: found no {self.name} (train-images-idx3-ubyte, or with .gz, and the rest) "
                f"in {folders[0]} or {root}: set root, or download: true"
            )
        return read_split(*files[:2]), read_split(*files[2:])

    def _construct(self, split: dict[str, Any]) -> Any:
        from torchvision import datasets  # type: ignore[import-untyped] # a second to import

        dataset = getattr(datasets, self.name)
        try:
            return dataset(str(self._folder()), **split, download=self.download)
        except (OSError, RuntimeError) as error:
            if self.download:
                reason = " ".join(str(error).split())
                raise ValueError(f"data: {self.name} could not be fetched: {reason}") from error
            raise ValueError(
                f"data: found no complete {self.name} in {self._folder()}: "
                "set root, or download: true"
            ) from error

    def _from_arrays(self, train: ImageArrays, test: ImageArrays) -> Splits:
        _, channels, height, width = train.images.shape
        shape = (self.channels or channels, self.size or height, self.size or width)
        unread = (
            unread_arrays(data, size=self.size, channels=self.channels, name=self.name)
            for data in (train, test)
        )
        return self.splits(*unread, shape=shape)


def _arrays(dataset: Any, labels: str) -> ImageArrays:
    """Images n x h x w, n x h x w x 3 or n x 3 x h x w, and labels, as torchvision has them."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return ImageArrays(images.contiguous(), torch.as_tensor(getattr(dataset, labels)).long())


def _files(dataset: Any, reader: _Reader) -> tuple[list[str], Tensor]:
    """Paths and labels, as torchvision keeps them: two lists, or one of pairs."""
    if reader.labels == reader.files:
        files, labels = zip(*getattr(dataset, reader.labels), strict=True)
    else:
        files, labels = getattr(dataset, str(reader.files)), getattr(dataset, reader.labels)
    return [str(path) for path in files], torch.tensor(labels)
