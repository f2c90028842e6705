"""Images in files: folders of classes, and sets of Hugging Face, decoded to uint8 arrays."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm.auto import tqdm

from flatreg.data.files import check_ordinary, one_line, printable
from flatreg.data.images import Source, Splits, UnreadImages, resize
from flatreg.terms.protocol import CONFIG, Count

_TEST = ("test", "val", "validation")
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_ITERABLE = ("hfids", "tfds", "wds")


def unread_files(
    files: Sequence[str] | Callable[[int], tuple[Any, str]],
    labels: Tensor,
    *,
    size: int,
    channels: int,
    name: str,
) -> UnreadImages:
    """Images that lie in files; reading decodes them and resizes them to `size` pixels.

    `files` are their paths, or a function of a position that gives a path or stream of the image
    and its name in errors. `channels` is 1 (grey, ITU-R 601 luma of a coloured image) or 3. The
    result's `read` raises a ValueError that names a file which is no image, has more than 8 bits a
    channel, several frames, or so many pixels that Pillow takes it for an attack.
    """

    def read(positions: Tensor) -> Tensor:
        out = torch.empty(len(positions), channels, size, size, dtype=torch.uint8)
        progress = tqdm(positions.tolist(), f"decode {name}", leave=False, disable=None)
        for row, at in enumerate(progress):
            source, called = files(at) if callable(files) else (files[at], files[at])
            try:
                planes = _decoded(source, channels)
                out[row] = resize(rearrange(planes, "h w c -> 1 c h w"), size)[0]
            except Exception as error:  # a damaged file has Pillow raise errors of any kind
                reason = one_line(error) or type(error).__name__
                raise ValueError(f"{printable(called)}: not decoded: {reason}") from error
        return out

    return UnreadImages(labels, read)


def _decoded(source: Any, channels: int) -> Tensor:
    """The one image of a file or stream, as bytes `(height, width, channels)`."""
    if isinstance(source, str):
        check_ordinary(Path(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; pixels decode, or do not
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            # I, I;16 and F: Pillow would cut such values off at 255. Of 16 bits in colour it
            # takes the upper 8.
            if (mode := image.mode)[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
                raise ValueError(f"expected 8 bits a channel, got Pillow's mode {mode} of more")
            # Cameras write a second picture beside the one: MPO.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError(f"expected one image, got {getattr(image, 'n_frames', 0)} frames")
            whole = image.convert("RGBA") if "transparency" in image.info else image
            pixels = np.array(whole.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels))


_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _class_files(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Classes, and path and class of every image, in the order of torchvision's `ImageFolder`.

    Raises:
        ValueError: there are no classes, or no images of one; a folder is met again, as where a
            link leads back; something cannot be looked at, or is no file.
    """
    entries, called = _entries(folder), printable(folder)
    if lost := sorted(e.name for e in entries if e.is_symlink() and not os.path.exists(e.path)):
        raise ValueError(f"{called}: the link {printable(lost[0])} leads nowhere: remove it")
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f"{called}: Couldn't find any class folder in {called}")
    samples: list[tuple[str, str]] = []
    empty = []
    for name in classes:
        found = sorted(files_below(Path(folder, name), set(), _SUFFIXES))
        samples += [(os.path.join(place, file), name) for place, file in found]
        empty += [] if found else [name]
    if empty:
        names = ", ".join(map(printable, empty))
        raise ValueError(f"{called}: Found no valid file for the classes {names}.")
    return classes, samples


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{printable(folder)}: not read: {one_line(error.strerror)}") from error


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
            f"{printable(folder)}: a link to a folder that is read already, whose images would "
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
            raise ValueError(f"{printable(entry.path)}: {one_line(error.strerror)}") from error
        yield str(folder), entry.name


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Folder(Source):
    """Image files in PATH/train/CLASS and PATH/test/CLASS, decoded into memory.

    Where there is no `test`, it is `val`, then `validation`. The files are those that
    torchvision's `ImageFolder` finds (jpg, png, ppm, bmp, pgm, tif, webp, at any depth). A file
    holds one image of 8 bits a channel; what is transparent loses its transparency.

    Args:
        path: of the folder.
        size: height and width in pixels: the shorter side is resized to it (bilinear, antialiased),
            the rest cropped.
        channels: 3, or 1 for grey.
        validation, limit, test_limit: see `flatreg.data.Source`.
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
        return _folder_splits(self, root / "train", test, name=root.name)


def _first_folder(root: Path, names: Sequence[str], field: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise ValueError(f"{field}: expected one of {', '.join(names)} in {root}, found none")
    return found


def _folder_splits(
    source: Folder | Timm, train: Path, test: Path, *, name: str, natural: bool = False
) -> Splits:
    """Splits of two folders with a folder a class; in natural order 10 comes after 9."""
    classes, unread = [], []
    for folder in (train, test):
        names, samples = _class_files(folder)
        if natural:
            from timm.utils.misc import natural_key  # half a second to import

            samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
            names = sorted(names, key=natural_key)
        number = {label: place for place, label in enumerate(names)}
        files, labels = zip(*samples, strict=True)
        classes.append(names)
        numbers, called = torch.tensor([number[label] for label in labels]), f"{name} {folder.name}"
        size, channels = source.size, source.channels
        unread.append(unread_files(files, numbers, size=size, channels=channels, name=called))
    _check_same_classes(train.parent, *classes)
    return source.splits(*unread, shape=(source.channels, source.size, source.size))


def _check_same_classes(where: object, train: list[str], test: list[str]) -> None:
    """Refuse splits whose classes differ: their numbers would not mean the same."""
    if train != test:
        only = (sorted(set(a) - set(b)) for a, b in ((train, test), (test, train)))
        missing = " and ".join(
            f"{printable(', '.join(names[:3]))}{', ...' if len(names) > 3 else ''} only for {split}"
            for names, split in zip(only, ("training", "test"), strict=True)
            if names
        )
        raise ValueError(f"{where}: expected the same classes in both splits, got {missing}")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Timm(Source):
    """What `timm.data.create_dataset` names, decoded into memory.

    "hfds/OWNER/SET" is a set of Hugging Face's `datasets`, fetched where it is missing. No code of
    a set is run, and timm's tar files are not read: it keeps their index as a pickle. A name
    without a slash ("folder") is a `Folder` at `root` with splits of any name, its classes and
    files in natural order (10 after 9), as timm has them.

    Args:
        name: as above.
        root: the folder; for hfds where fetched files are kept, by default where `datasets` does.
        train_split, test_split: timm takes synonyms too (val, valid, eval).
        input_key: of hfds, the column of images; "image" by default.
        target_key: of hfds, the column of labels; "label" by default.
        size, channels, validation, limit, test_limit: as `flatreg.data.Folder`.
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
            ValueError: as `Folder.load`; or the package that reads the set is missing, or labels
                are not published.
        """
        if "/" not in self.name:
            root = Path(self.root or "").expanduser()
            if not (self.root and root.is_dir()):
                raise ValueError(
                    f"data.root: expected a folder of images, found none at {self.root}"
                )
            folders = []
            for split in (self.train_split, self.test_split):
                synonyms = next((names for names in _SYNONYMS if split in names), ())
                folders.append(_first_folder(root, (split, *synonyms), "data.root"))
            return _folder_splits(self, *folders, name=self.name, natural=True)
        package = find_spec("datasets")
        if not (package and package.origin):  # a folder of that name has no origin
            raise ValueError(f"data.name: {self.name} needs a package: pip install datasets")
        splits = (self.train_split, self.test_split)
        readers = [self._reader(split) for split in splits]
        _check_same_classes(f"data: {self.name}", *(list(r.class_to_idx) for r in readers))
        unread = (self._unread(*pair) for pair in zip(readers, splits, strict=True))
        return self.splits(*unread, shape=(self.channels, self.size, self.size))

    def _reader(self, split: str) -> Any:
        """The reader below timm's dataset, which would skip what does not decode."""
        from timm.data import create_dataset  # where it is needed: half a second

        keys = {"input_key": self.input_key, "target_key": self.target_key}
        given = {key: value for key, value in keys.items() if value}
        root = str(Path(self.root).expanduser()) if self.root else None
        try:
            return create_dataset(self.name, root=root, split=split, **given).reader
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"data: {self.name}, split {split}: {reason}") from error

    def _unread(self, reader: Any, split: str) -> UnreadImages:
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

        name = f"{self.name} {split}"
        return unread_files(opened, labels, size=self.size, channels=self.channels, name=name)
