"""From image files to uint8 arrays of one size, after a look at the memory they will take."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm.auto import tqdm

from flatreg.data.images import ImageArrays, Size, Source, Splits
from flatreg.terms.protocol import CONFIG

_AT_ONCE = 1000  # images resized between two steps of the progress bar


class Undecoded(NamedTuple):
    """A split whose images are still files.

    Attributes:
        labels: of all images `(n,)`.
        opened: of a position, the path or stream of the image, and what an error calls it.
    """

    labels: Tensor
    opened: Callable[[int], tuple[Any, str]]


def from_files(files: list[str], labels: Tensor) -> Undecoded:
    """A split whose images lie at these paths."""
    return Undecoded(labels, lambda position: (files[position], files[position]))


def check_memory(count: int, channels: int, height: int, width: int) -> None:
    """Refuse images that would take more than half of the machine's memory.

    Args:
        count: images of both splits.
        channels: of an image, one byte a value.
        height: of an image.
        width: of an image.

    Raises:
        ValueError: they would.
    """
    needed, memory = count * channels * height * width, _physical_memory()
    if needed > memory / 2:
        raise ValueError(
            f"data: {count:,} images of {channels}x{height}x{width} take {needed / 2**30:.1f} GiB, "
            f"more than half of this machine's {memory / 2**30:.1f}: "
            "choose a smaller size, or a limit and a test_limit"
        )


def resized(images: Tensor, size: int) -> Tensor:
    """Images with their shorter side resized to `size` (bilinear, antialiased), centre cropped.

    As torchvision's `Resize` and `CenterCrop`, their roundings included.

    Args:
        images: `(n, channels, height, width)`, uint8.
        size: height and width in pixels.

    Returns:
        `(n, channels, size, size)`, uint8.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    tall, wide = height * size // short, width * size // short
    whole = F.interpolate(images, (tall, wide), mode="bilinear", antialias=True)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return whole[:, :, top : top + size, left : left + size]


def resized_all(images: Tensor, size: int | None, name: str) -> Tensor:
    """`resized`, some at a time, under a progress bar called `name`."""
    if size is None or images.shape[2:] == (size, size):
        return images
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    with tqdm(total=len(images), desc=f"resize {name}", leave=False, disable=None) as bar:
        for start in range(0, len(images), _AT_ONCE):
            out[start : start + _AT_ONCE] = resized(images[start : start + _AT_ONCE], size)
            bar.update(min(_AT_ONCE, len(images) - start))
    return out


def decoded_splits(
    source: Source, train: Undecoded, test: Undecoded, *, size: int, channels: int, name: str
) -> Splits:
    """Decode what `source` uses of the images, and of nothing else.

    Args:
        source: says how many, and what is held back.
        train: split.
        test: split.
        size: height and width in pixels, see `resized`.
        channels: 1 (grey, ITU-R 601 luma of a coloured image) or 3.
        name: of the data, for the progress bar.

    Raises:
        ValueError: they take too much memory, a file is no image or has more than 8 bits a channel
            (it is named), `limit` or what is held back is too small for the classes.
    """
    kept, judged = source.chosen(train.labels, test.labels)
    check_memory(len(kept) + len(judged), channels, size, size)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return source.arranged(
        _decoded(train, kept, size, channels, f"{name} train"),
        _decoded(test, judged, size, channels, f"{name} test"),
        classes,
    )


def _decoded(split: Undecoded, chosen: Tensor, size: int, channels: int, name: str) -> ImageArrays:
    out = torch.empty(len(chosen), channels, size, size, dtype=torch.uint8)
    positions = tqdm(chosen.tolist(), f"decode {name}", leave=False, disable=None)
    for row, position in enumerate(positions):
        source, called = split.opened(position)
        try:
            with Image.open(source) as image:
                # I, I;16 and F: Pillow would cut such values off at 255.
                if image.mode[0] in "IF":
                    raise ValueError(f"expected 8 bits a channel, got Pillow's mode {image.mode}")
                pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{called}: not decoded: {' '.join(str(error).split())}") from error
        planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels))
        out[row] = resized(rearrange(planes, "h w c -> 1 c h w"), size)[0]
    return ImageArrays(out, split.labels[chosen].long())


def _physical_memory() -> float:
    """Bytes of this machine's memory; without end where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return float("inf")


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
        validation, limit, test_limit: see `flatreg.data.Source`.
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
        validation, limit, test_limit: see `flatreg.data.Source`.
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
            self,
            undecoded(train, self.train_split),
            undecoded(test, self.test_split),
            size=self.size,
            channels=self.channels,
            name=self.name,
        )

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
