"""torchvision's classification sets that come with a training and a test split."""

from __future__ import annotations

import gzip
import math
import zlib
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.data.files import check_ordinary
from flatreg.data.image_files import FileSource, files_below
from flatreg.data.images import ImageArrays, Splits, check_memory, unread_arrays
from flatreg.data.text import one_line
from flatreg.terms.protocol import Count

Family = Literal["MNIST", "FashionMNIST", "KMNIST"]
Arrays = Literal["USPS", "CIFAR10", "CIFAR100", "SVHN", "STL10"]
Files = Literal["GTSRB", "OxfordIIITPet", "Flowers102", "Food101", "DTD", "FGVCAircraft"]
Name = Literal[Family, Arrays, Files, "Imagenette"]


class _Reader(NamedTuple):
    """How torchvision is asked for the two splits, and where it keeps files and labels."""

    train: dict[str, Any]
    test: dict[str, Any]
    labels: str
    files: str | None  # None: the images are an array, in `data`
    unchecked: str | None = None  # where its files lie, if torchvision compares none with an md5


_TRAIN: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_TRAINVAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "trainval"}, {"split": "test"})

# The MNIST family is missing: `read_idx` reads it, gzipped or not.
# torchvision's CIFAR readers unpickle the official batches, and nothing else: their constructor
# compares every file with a fixed md5 first (`_check_integrity`) and refuses the folder otherwise.
_READERS: dict[str, _Reader] = {
    "USPS": _Reader(*_TRAIN, "targets", None, "usps*.bz2"),
    "CIFAR10": _Reader(*_TRAIN, "targets", None),
    "CIFAR100": _Reader(*_TRAIN, "targets", None),
    "SVHN": _Reader(*_SPLIT, "labels", None),
    "STL10": _Reader(*_SPLIT, "labels", None),
    "GTSRB": _Reader(*_SPLIT, "_samples", "_samples", "gtsrb"),
    "OxfordIIITPet": _Reader(*_TRAINVAL, "_labels", "_images", "oxford-iiit-pet"),
    "Flowers102": _Reader(*_SPLIT, "_labels", "_image_files"),
    "Food101": _Reader(*_SPLIT, "_labels", "_image_files", "food-101"),
    "DTD": _Reader(*_SPLIT, "_labels", "_image_files", "dtd"),
    "FGVCAircraft": _Reader(*_TRAINVAL, "_labels", "_image_files", "fgvc-aircraft-*"),
    "Imagenette": _Reader(
        {"split": "train"}, {"split": "val"}, "_samples", "_samples", "imagenette*"
    ),
}
_FAMILY = get_args(Family)
_STEMS = [
    f"{split}-{part}-ubyte"
    for split in ("train", "t10k")
    for part in ("images-idx3", "labels-idx1")
]


@configuration
class Torchvision(FileSource):
    """A set of `torchvision.datasets`, in memory or streamed.

    | name                                 | training, test split | pixels | classes          |
    |--------------------------------------|----------------------|--------|------------------|
    | MNIST, FashionMNIST, KMNIST          | train, t10k          | 28     | 10               |
    | USPS                                 | train, test          | 16     | 10               |
    | CIFAR10, CIFAR100                    | train, test          | 32     | 10, 100          |
    | SVHN, STL10                          | train, test          | 32, 96 | 10               |
    | GTSRB, Flowers102, Food101, DTD      | train, test          | vary   | 43, 102, 101, 47 |
    | OxfordIIITPet, FGVCAircraft          | trainval, test       | vary   | 37, 100          |
    | Imagenette                           | train, val           | vary   | 10               |

    CIFAR is pickled: torchvision loads its files only if their md5 is that of the official ones.
    The idx files of the MNIST family may be gzipped, in ROOT/NAME/raw or in ROOT itself: Debian's
    package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist.

    Args:
        name: of the set, as above.
        root: folder in which torchvision keeps it.
        size: as `flatreg.data.Folder`; by default they stay as they are. Needed where they vary.
        channels: 3 repeats the channel of grey images, for a model that takes colour.
        download: fetch what is missing.
        workers, crop_pct, interpolation: see `flatreg.data.image_files.FileSource`. Sets whose
            pixels do not vary are arrays, and do not stream.
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
        if self.workers and (self.name in _FAMILY or not _READERS[self.name].files):
            raise ValueError(
                f"workers: expected 0, as the images of {self.name} are one array in memory, got "
                f"{self.workers}: delete it"
            )
        return self

    def load(self) -> Splits:
        """Read, decode and resize.

        Raises:
            ValueError: the files are missing or damaged, or as `Source.splits`.
        """
        if self.name in _FAMILY:
            return self._from_arrays(*self._read_family())
        reader = _READERS[self.name]
        both = [self._construct(split) for split in (reader.train, reader.test)]
        if reader.files is None:
            names = _class_names(both[0])
            return self._from_arrays(*(_arrays(one, reader.labels) for one in both), names=names)
        assert self.size  # for the type checker: `_has_a_size` asked for it
        unread = (
            self.unread(*self._files(dataset, reader), size=self.size, channels=3, name=self.name)
            for dataset in both
        )
        names = _class_names(both[0])
        return self.splits(*unread, shape=(3, self.size, self.size), class_names=names)

    def _read_family(self) -> tuple[ImageArrays, ImageArrays]:
        root = Path(self.root).expanduser()
        folders = [root / self.name / "raw", root]
        files = _find_idx(folders)
        if files is None and self.download:
            self._construct({"train": True})
            files = _find_idx(folders)
        if files is None:
            raise ValueError(
                f"data: found no {self.name} (train-images-idx3-ubyte, or with .gz, and the rest) "
                f"in {folders[0]} or {root}: set root, or download: true"
            )
        return _read_split(*files[:2]), _read_split(*files[2:])

    def _construct(self, split: dict[str, Any]) -> Any:
        from torchvision import datasets  # type: ignore[import-untyped] # a second to import

        dataset, root = getattr(datasets, self.name), Path(self.root).expanduser()
        reader = _READERS.get(self.name)
        for place in root.glob(reader.unchecked) if reader and reader.unchecked else ():
            if place.is_dir():
                deque(files_below(place, set()), maxlen=0)  # a pipe among them would be waited for
            elif place.exists():
                check_ordinary(place)
        try:
            return dataset(str(root), **split, download=self.download)
        except (
            *(OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError),
            *(zlib.error, MemoryError, AttributeError, AssertionError),
        ) as error:
            message = f"found no complete {self.name} in {root}: set root, or download: true"
            if self.download:
                message = f"{self.name} could not be fetched: {one_line(error, None)}"
            raise ValueError(f"data: {message}") from error

    def _files(self, dataset: Any, reader: _Reader) -> tuple[list[str], Tensor]:
        """Paths and labels, as torchvision keeps them: two lists, or one of pairs."""
        files, labels = getattr(dataset, str(reader.files)), getattr(dataset, reader.labels)
        if not files:
            raise ValueError(
                f"data: found no images of {self.name} in {self.root}: set root, or download: true"
            )
        if reader.labels == reader.files:
            files, labels = zip(*files, strict=True)
        return [str(path) for path in files], torch.tensor(labels)

    def _from_arrays(
        self, train: ImageArrays, test: ImageArrays, *, names: list[str] | None = None
    ) -> Splits:
        kinds = [tuple(data.images.shape[1:]) for data in (train, test)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"data: {self.name}: expected images of one shape in both splits, got {kinds[0]} "
                f"for training and {kinds[1]} for test: fetch it again"
            )
        channels, height, width = kinds[0]
        shape = (self.channels or channels, self.size or height, self.size or width)
        unread = (
            unread_arrays(data, size=self.size, channels=self.channels, name=self.name)
            for data in (train, test)
        )
        return self.splits(*unread, shape=shape, class_names=names)


def _class_names(dataset: Any) -> list[str]:
    """By class number; of several names of a class the first."""
    names = getattr(dataset, "classes", None) or []
    return [name if isinstance(name, str) else str(name[0]) for name in names]


def _arrays(dataset: Any, labels: str) -> ImageArrays:
    """Images n x h x w, n x h x w x 3 or n x 3 x h x w, and labels, as torchvision has them."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return ImageArrays(images.contiguous(), torch.as_tensor(getattr(dataset, labels)).long())


def _find_idx(folders: list[Path]) -> list[Path] | None:
    """The four files (training images and labels, then test) in the first folder with all four."""
    for folder in folders:
        found = [
            next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
            for stem in _STEMS
        ]
        files = [path for path in found if path]
        if len(files) == len(_STEMS):
            return files
    return None


def _read_split(images: Path, labels: Path) -> ImageArrays:
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(
            f"{labels}: expected {len(pixels)} labels, one an image, got {len(classes)}"
        )
    if not pixels.numel():
        raise ValueError(f"{images}: expected images, got shape {tuple(pixels.shape)}")
    if (last := int(classes.max())) > 9:
        raise ValueError(f"{labels}: expected labels from 0 to 9, got {last}: fetch it again")
    return ImageArrays(pixels[:, None], classes.long())


def read_idx(path: Path, axes: int) -> Tensor:
    """Read an idx file of bytes.

    Two zero bytes, 8 (unsigned byte), the number of axes; each axis' length as four bytes, the
    highest first; the values. http://yann.lecun.com/exdb/mnist/

    Raises:
        ValueError: it is no such file, is cut off, has other axes, or would fill the memory.
    """
    header = 4 + 4 * axes
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(header)
            if len(head) < header or head[:4] != bytes((0, 0, 8, axes)):
                raise ValueError(f"{path}: expected an idx file of bytes with {axes} axes")
            shape = [int(length) for length in np.frombuffer(head, ">u4", axes, 4)]
            count = math.prod(shape)
            check_memory(f"the values of {path.name}, shape {shape},", count)
            raw = stream.read(count + 1)  # to the end: there a checksum is compared
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise ValueError(f"{path}: not read: {one_line(error)}: fetch it again") from error
    if len(raw) != count:
        got = len(raw) if len(raw) < count else "more"
        raise ValueError(f"{path}: expected {count} values, shape {shape}, got {got}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(shape).copy())
