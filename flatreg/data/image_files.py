"""Images in files: folders of classes, and sets of Hugging Face, decoded to uint8 arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from flatreg.data.configuration import configuration
from flatreg.data.files import check_apart, check_ordinary, check_rows_apart
from flatreg.data.images import Source, Splits, UnreadImages, resize
from flatreg.data.progress import progress_bar
from flatreg.data.streamed import Column, Opened, Paths, Shape, StreamedImages, decoded
from flatreg.data.tar_files import folders_in_tar, shards, web_dataset
from flatreg.data.text import natural_key, one_line, shown
from flatreg.terms.protocol import Count

_TEST = ("test", "val", "validation")
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_ITERABLE = ("hfids", "tfds")

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]


@configuration
class FileSource(Source):
    """What every kind of data takes whose images lie in files.

    Args:
        workers: 0 decodes all images into memory, before the training. Above, images stay in their
            files, and so many processes decode them as they are needed, for a training and for an
            evaluation alike. They are then resized and cropped by timm's transforms.
        crop_pct: of images that stream, in (0, 1]: the shorter side is resized to size / crop_pct
            before the centre is cropped. A training crops in this way too, unless it has
            `augment.scale`. By default that of pretrained weights in a recipe, else 0.875, as in
            timm. In memory it is 1.
        interpolation: of images that stream; by default that of pretrained weights in a recipe,
            else "bilinear".
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    workers: Annotated[int, Field(ge=0, le=256)] = 0
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: Interpolation | None = None

    @model_validator(mode="after")
    def _streams_what_streams(self) -> Self:
        for name in ("crop_pct", "interpolation"):
            if not self.workers and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for images that stream: set workers above 0, or delete it"
                )
        return self

    def unread(
        self, files: Sequence[str] | Opened, labels: Tensor, *, size: int, channels: int, name: str
    ) -> UnreadImages:
        """Images that lie in files, to be streamed, or decoded and resized to `size` pixels.

        `files` are their paths, or a function of a position that gives a path or stream of the
        image and its name in errors. `channels` is 1 (grey, ITU-R 601 luma of a coloured image) or
        3. The result's `read` raises a ValueError that names a file which is no image, has more
        than 8 bits a channel, several frames, or so many pixels that Pillow takes it for an attack.
        """
        opened = files if callable(files) else Paths(files)

        def read(positions: Tensor) -> Tensor:
            out = torch.empty(len(positions), channels, size, size, dtype=torch.uint8)
            bar = progress_bar(f"decode {name}", len(positions), over=positions.tolist())
            for row, at in enumerate(bar):
                source, called = opened(at)
                try:
                    pixels = np.array(decoded(source, channels))
                    planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels))
                    out[row] = resize(rearrange(planes, "h w c -> 1 c h w"), size)[0]
                except Exception as error:  # a damaged file has Pillow raise errors of any kind
                    reason = one_line(error) or type(error).__name__
                    raise ValueError(f"{shown(called)}: not decoded: {reason}") from error
            return out

        if not self.workers:
            return UnreadImages(labels, read)
        cut = Shape(size, channels, self.crop_pct, self.interpolation or "bilinear")
        return UnreadImages(
            labels, read, partial(StreamedImages, opened, labels, cut, self.workers)
        )


_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _class_files(
    folder: Path, met: set[tuple[int, int]]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Classes, and path and class of every image, in the order of torchvision's `ImageFolder`.

    `met` are the folders that were read, by their numbers, as for `files_below`.

    Raises:
        ValueError: there are no classes, or no images of one; a folder is met again, as where a
            link leads back; something cannot be looked at, or is no file.
    """
    entries, called = _entries(folder), shown(folder)
    if lost := sorted(e.name for e in entries if e.is_symlink() and not os.path.exists(e.path)):
        raise ValueError(f"{called}: the link {shown(lost[0])} leads nowhere: remove it")
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f"{called}: Couldn't find any class folder in {called}")
    samples: list[tuple[str, str]] = []
    empty = []
    for name in classes:
        found = sorted(files_below(Path(folder, name), met, _SUFFIXES))
        samples += [(os.path.join(place, file), name) for place, file in found]
        empty += [] if found else [name]
    if empty:
        names = ", ".join(map(shown, empty))
        raise ValueError(f"{called}: Found no valid file for the classes {names}.")
    return classes, samples


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{shown(folder)}: not read: {one_line(error.strerror)}") from error


def files_below(
    folder: Path, met: set[tuple[int, int]], suffixes: tuple[str, ...] = ("",)
) -> Iterator[tuple[str, str]]:
    """Folder and name of every file at any depth that ends so; `met` are folders, by their numbers.

    Raises:
        ValueError: a folder is met again, as where a link leads back; something cannot be looked
            at, or is no file.
    """
    about = folder.stat()
    if (about.st_dev, about.st_ino) in met:
        raise ValueError(
            f"{shown(folder)}: a link to a folder that is read already, whose images would "
            "count twice: remove it"
        )
    met.add((about.st_dev, about.st_ino))
    for entry in _entries(folder):
        try:
            if entry.is_dir():
                yield from files_below(Path(entry.path), met, suffixes)
                continue
            if not entry.name.lower().endswith(suffixes):
                continue
            if not entry.is_file():  # a pipe, or a link that leads nowhere
                check_ordinary(Path(entry.path))
        except OSError as error:
            raise ValueError(f"{shown(entry.path)}: {one_line(error.strerror)}") from error
        yield str(folder), entry.name


@configuration
class Folder(FileSource):
    """Image files in PATH/train/CLASS and PATH/test/CLASS, in memory or streamed.

    Where there is no `test`, it is `val`, then `validation`. The files are those that
    torchvision's `ImageFolder` finds (jpg, png, ppm, bmp, pgm, tif, webp, at any depth). A file
    holds one image of 8 bits a channel; what is transparent loses its transparency.

    Args:
        path: of the folder.
        size: height and width in pixels: the shorter side is resized to it (bilinear, antialiased),
            the rest cropped.
        channels: 3, or 1 for grey.
        workers, crop_pct, interpolation, validation, limit, test_limit: see
            `flatreg.data.image_files.FileSource`.
    """

    path: str
    size: Count
    channels: Literal[1, 3] = 3
    kind: Literal["folder"] = "folder"

    def load(self) -> Splits:
        """Find, decode and resize.

        Raises:
            ValueError: a split or the images of a class are missing, the splits have different
                classes, a file is no image (it is named), a link leads nowhere or back, or as
                `Source.splits`.
        """
        root = Path(self.path).expanduser()
        if not (root / "train").is_dir():
            raise ValueError(f"data.path: expected PATH/train/CLASS/*, found no {root / 'train'}")
        test = _first_folder(root, _TEST, "data.path")
        check_apart([root / "train"], [test])
        return _folder_splits(self, root / "train", test, name=root.name, apart=True)

    def load_test(self) -> Splits:
        """The images to evaluate a model on, without training images where there are none.

        These may lie in PATH/CLASS, too.

        Raises:
            ValueError: as `load`.
        """
        root = Path(self.path).expanduser()
        if (root / "train").is_dir():
            return self.load()
        test = next((root / name for name in _TEST if (root / name).is_dir()), root)
        if not test.is_dir():
            raise ValueError(f"data.path: expected a folder of images, found none at {shown(root)}")
        classes = sum(entry.is_dir() for entry in test.iterdir())  # one image each is read twice
        source = replace(self, limit=max(1, classes), validation=0.0)
        both = _folder_splits(source, test, test, name=root.name, apart=False)
        return both._replace(train=both.test.at(torch.arange(0)))


def _first_folder(root: Path, names: Sequence[str], field: str, *, or_tar: bool = False) -> Path:
    folders = [root / name for name in names if (root / name).is_dir()]
    packed = [root / f"{name}.tar" for name in names if (root / f"{name}.tar").is_file()]
    if not (found := folders + packed * or_tar):
        raise ValueError(f"{field}: expected one of {', '.join(names)} in {root}, found none")
    return found[0]


def _folder_splits(
    source: Folder | Timm, train: Path, test: Path, *, name: str, apart: bool, natural: bool = False
) -> Splits:
    """Splits of two folders with a folder a class; in natural order 10 comes after 9.

    `apart`: no folder may be of both, by a link.
    """
    classes, unread, size, channels = [], [], source.size, source.channels
    met = set[tuple[int, int]]()
    for folder in (train, test):
        met = met if apart else set()
        called = f"{name} {folder.name}"
        files: Sequence[str] | Opened
        labels: Sequence[str]
        if folder.is_dir():
            names, samples = _class_files(folder, met)
            if natural:
                samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
            files, labels = zip(*samples, strict=True)
        else:
            files, labels = folders_in_tar(folder, called)
            names = sorted(set(labels))
        if natural:
            names = sorted(names, key=natural_key)
        number = {label: place for place, label in enumerate(names)}
        classes.append(names)
        numbers = torch.tensor([number[label] for label in labels])
        unread.append(source.unread(files, numbers, size=size, channels=channels, name=called))
    _check_same_classes(train.parent, *classes)
    return source.splits(*unread, shape=(channels, size, size), class_names=classes[0])


def _check_same_classes(where: object, train: list[str], test: list[str]) -> None:
    """Refuse splits whose classes differ: their numbers would not mean the same."""
    if train != test:
        only = (sorted(set(a) - set(b)) for a, b in ((train, test), (test, train)))
        missing = " and ".join(
            f"{shown(', '.join(names[:3]))}{', ...' if len(names) > 3 else ''} only for {split}"
            for names, split in zip(only, ("training", "test"), strict=True)
            if names
        )
        raise ValueError(f"{where}: expected the same classes in both splits, got {missing}")


@configuration
class Timm(FileSource):
    """What `timm.data.create_dataset` names, in memory or streamed.

    "hfds/OWNER/SET" is a set of Hugging Face's `datasets`, fetched where it is missing; no code of
    a set is run. "wds/" are the shards of a WebDataset at `root`, on a disk of this machine: see
    `flatreg.data.tar_files`. A name without a slash ("folder") is a `Folder` at `root` with splits
    of any name, its classes and files in natural order (10 after 9), as timm has them; a split may
    be a file SPLIT.tar of such folders.

    Args:
        name: as above.
        root: the folder; for hfds where fetched files are kept, by default where `datasets` does.
        train_split, test_split: timm takes synonyms too (val, valid, eval); of wds also
            "train-{0000..0127}.tar".
        input_key: of hfds, the column of images; "image" by default. Of wds, the suffixes of
            images; "jpg;png;webp;jpeg" by default.
        target_key: of hfds, the column of labels; "label" by default. Of wds, what `.json` calls
            the label; by default it is in `.cls`.
        size, channels, workers and the others: as `flatreg.data.Folder`.
    """

    name: str
    root: str | None = None
    size: Count
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
            instead = f": write hfds/{rest}" if prefix.lower() == "hfids" else ""
            raise ValueError(
                f"expected a set with random access (a folder, wds/, hfds/...), got {name}: an "
                f"iterable{instead}"
            )
        if slash and prefix.lower() == "torch":
            raise ValueError(f"torch/ is kind: torchvision here, with its name for {rest!r}")
        if slash and prefix.lower() not in ("hfds", "wds"):
            raise ValueError(
                f"expected a name without a slash, wds/, or hfds/OWNER/SET, got {name!r}"
            )
        return name

    def load(self) -> Splits:
        """Find, decode and resize.

        Raises:
            ValueError: as `Folder.load`; or the package that reads the set is missing, or labels
                are not published.
        """
        return self._load(apart=True)

    def load_test(self) -> Splits:
        """The same, to evaluate a model on: both splits may have the same images."""
        return self._load(apart=False)

    def _load(self, *, apart: bool) -> Splits:
        splits = (self.train_split, self.test_split)
        if not self.name.lower().startswith("hfds/"):
            root = Path(self.root or "").expanduser()
            if not (self.root and root.is_dir()):
                raise ValueError(f"data.root: expected a folder of data, found none at {self.root}")
            if "/" in self.name:
                return self._shards(root, apart=apart)
            found = []
            for split in splits:
                names = (split, *next((names for names in _SYNONYMS if split in names), ()))
                found.append(_first_folder(root, names, "data.root", or_tar=True))
            if apart:
                check_apart(found[:1], found[1:])
            return _folder_splits(self, *found, name=self.name, apart=apart, natural=True)
        package = find_spec("datasets")
        if not (package and package.origin):  # a folder of that name has no origin
            raise ValueError(f"data.name: {self.name} needs a package: pip install datasets")
        if apart:
            check_apart(splits[:1], splits[1:])
        readers = [self._reader(split) for split in splits]
        if apart and any(set("[+") & set(split) for split in splits):
            check_rows_apart(readers[0].dataset.info.splits, *splits)
        classes = [list(reader.class_to_idx) for reader in readers]
        _check_same_classes(f"data: {self.name}", *classes)
        unread = map(self._unread, readers, splits)
        shape = (self.channels, self.size, self.size)
        return self.splits(*unread, shape=shape, class_names=classes[0])

    def _shards(self, root: Path, *, apart: bool) -> Splits:
        splits = (self.train_split, self.test_split)
        files = [shards(root, split) for split in splits]
        if apart:
            check_apart(*files)
        keys = {"image_key": self.input_key, "target_key": self.target_key}
        unread, size, channels = [], self.size, self.channels
        for split, named in zip(splits, files, strict=True):
            what = f"{root.name} {split}"
            opened, labels = web_dataset(named, what, **keys)
            unread.append(self.unread(opened, labels, size=size, channels=channels, name=what))
        return self.splits(*unread, shape=(channels, size, size))

    def _reader(self, split: str) -> Any:
        """The reader below timm's dataset, which would skip what does not decode."""
        # Up to timm 1.0.30 a function that makes readers takes the name in lower case.
        from timm.data.readers.reader_hfds import ReaderHfds  # where it is needed: half a second

        keys = {"input_key": self.input_key, "target_key": self.target_key}
        given = {key: value for key, value in keys.items() if value}
        root = str(Path(self.root).expanduser()) if self.root else None
        try:
            return ReaderHfds(self.name.partition("/")[2], root=root, split=split, **given)
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error, None)}"
            raise ValueError(f"data: {self.name}, split {split}: {reason}") from error

    def _unread(self, reader: Any, split: str) -> UnreadImages:
        """Images in a column: bytes, or the path of a file."""
        found = list(reader.dataset[reader.label_key])
        if not all(isinstance(label, int) and label >= 0 for label in found):
            raise ValueError(
                f"data: {self.name}, split {split}: expected class numbers in {reader.label_key}; "
                "some are missing, negative (not published) or of another form"
            )
        labels = torch.tensor(found, dtype=torch.long)
        opened, name = Column(reader, f"{self.name}, split {split}"), f"{self.name} {split}"
        return self.unread(opened, labels, size=self.size, channels=self.channels, name=name)
