"""Every kind of data that a recipe can name: images in memory, mostly as uint8, or streamed."""

from __future__ import annotations

import lzma
import math
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field

from flatreg.data.configuration import configuration
from flatreg.data.image_files import Folder, Timm
from flatreg.data.images import (
    ImageArrays,
    Source,
    Splits,
    check_memory,
    split_positions,
    unread_arrays,
)
from flatreg.data.text import one_line
from flatreg.data.torchvision import Torchvision


@configuration
class Array(Source):
    """An .npz with `x_train, y_train, x_test, y_test`: uint8 images, or float in [0,1].

    Args:
        path: of the file. Images are n x h x w, n x h x w x channels or n x channels x h x w, of
            one shape and type in both splits; labels are whole numbers from 0.
        channels: 3 repeats the channel of grey images, for a model that takes colour.
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    path: str
    channels: Literal[3] | None = None
    kind: Literal["array"] = "array"

    def load(self) -> Splits:
        """Read and check the file.

        Raises:
            ValueError: it is missing or damaged, its arrays are not those above, the splits have
                images of other channels, sizes or types, or as `Source.splits`.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"data.path: expected an .npz file, found none at {self.path}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of headers that are odd, or damaged
                arrays = _read_npz(path)
        except ValueError as error:
            raise ValueError(f"{self.path}: {one_line(error)}") from error
        except _NOT_READ as error:
            raise ValueError(
                f"{self.path}: not an .npz file, or a damaged one: {one_line(error)}: write it "
                "again, with numpy.savez"
            ) from error
        both = [self._images(*arrays[:2]), self._images(*arrays[2:])]
        kinds = [(tuple(one.images.shape[1:]), one.images.dtype) for one in both]
        if kinds[0] != kinds[1]:
            (train, of_train), (test, of_test) = kinds
            raise ValueError(
                f"{self.path}: expected images of one shape and type in both splits, got "
                f"{of_train} of {train} for training and {of_test} of {test} for test"
            )
        return self.splits(*(unread_arrays(data, channels=self.channels) for data in both))

    def _images(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> ImageArrays:
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[-1] in (1, 3, 4):
            images = rearrange(images, "n h w c -> n c h w")
        if images.ndim != 4 or images.shape[:1] != labels.shape[:1] or not images.size:
            raise ValueError(
                f"{self.path}: expected n images and labels, got {images.shape}, {labels.shape}"
            )
        whole = np.issubdtype(labels.dtype, np.floating) and bool((labels == labels.round()).all())
        if (
            labels.ndim != 1
            or not (whole or np.issubdtype(labels.dtype, np.integer))
            or not 0 <= float(labels.min()) <= float(labels.max()) < 2**31
        ):
            raise ValueError(
                f"{self.path}: labels must be class numbers of shape (n,), got {labels.dtype} of "
                f"shape {labels.shape}, from {float(labels.min()):.12g} to "
                f"{float(labels.max()):.12g}"
            )
        if images.dtype != np.uint8:
            low, high = float(images.min()), float(images.max())
            if not (np.issubdtype(images.dtype, np.floating) and 0 <= low and high <= 1):
                raise ValueError(
                    f"{self.path}: images must be uint8 or float in [0, 1], "
                    f"got {images.dtype} from {low:.3g} to {high:.3g}"
                )
            images = images.astype(np.float32)
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        return ImageArrays(tensor, torch.from_numpy(labels.astype(np.int64)))


_BLOCK = 2**22  # pixels of digits that are resized at once
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# What zipfile and numpy raise of a file that was damaged somewhere.
_NOT_READ = (
    *(BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, SyntaxError),
    *(KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError),
)


def _read_npz(path: Path) -> list[np.ndarray[Any, Any]]:
    """The four arrays; what they claim to be is checked before memory is taken for them."""
    with path.open("rb") as stream:
        if stream.read(6) == b"\x93NUMPY":
            raise ValueError("not an .npz file: it holds one array")
        with ZipFile(stream) as archive:
            found = [entry.filename for entry in archive.infolist()]
            members = [f"{name}.npy" if f"{name}.npy" in found else name for name in _ARRAYS]
            if missing := sorted(set(members) - set(found)):
                raise ValueError(
                    f"expected arrays {', '.join(_ARRAYS)}; missing {', '.join(missing)}"
                )
            if twice := [name for name in members if found.count(name) > 1]:
                raise ValueError(f"expected every array once, {twice[0]} stands there twice")
            for image, name in zip((True, False) * 2, members, strict=True):
                _check_member(archive, name, image)
            whole = sum(archive.getinfo(name).file_size for name in members)
            check_memory(f"the arrays of {path.name}", whole)
            return [_read_member(archive, name) for name in members]


def _check_member(archive: ZipFile, name: str, image: bool) -> None:
    """Refuse an array of another type, or of a shape that its bytes do not have."""
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name} has the version {version} of numpy's format")
        shape, _, dtype = readers[version](member)
        size = entry.file_size - member.tell()
    if dtype.kind not in ("uif" if image else "uifb"):
        expected = "uint8 or float in [0, 1]" if image else "class numbers"
        raise ValueError(f"{name}: expected {expected}, got {dtype} of shape {shape}")
    if (needed := math.prod(shape) * dtype.itemsize) != size:
        raise ValueError(f"{name}: {dtype} of shape {shape} takes {needed} bytes, got {size}")


def _read_member(archive: ZipFile, name: str) -> np.ndarray[Any, Any]:
    with archive.open(name) as member:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # at the end the checksum is compared
            raise ValueError(f"{name} is longer than its shape says")
    return array


@configuration
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, embedded: 8x8 pixels resized to `size`, one channel.

    Args:
        size: height and width in pixels.
        test: part of the images in the test split.
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    size: Annotated[int, Field(ge=8)] = 32
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    kind: Literal["digits"] = "digits"

    def load(self) -> Splits:
        """Resize and split, the same way every time.

        Raises:
            ValueError: as `Source.splits`.
        """
        from sklearn.datasets import load_digits  # here, as it is slow to import

        digits, size = load_digits(), (self.size, self.size)
        images = torch.from_numpy(digits.images)[:, None] / 16
        what = f"{len(images):,} images of 1x{self.size}x{self.size}"
        # As float64 they take eight times as much: in blocks. A training holds two copies.
        check_memory(what, 2 * len(images) * self.size**2)
        pixels = torch.empty(len(images), 1, *size, dtype=torch.uint8)
        at_once = max(1, _BLOCK // self.size**2)
        for start in range(0, len(images), at_once):
            block = images[start : start + at_once]
            block = F.interpolate(block, size, mode="bilinear", align_corners=False)
            block = (block.clamp(0, 1) * 255).round().to(torch.uint8)
            pixels[start : start + at_once] = block
        labels = torch.from_numpy(digits.target)
        whole, places = ImageArrays(pixels, labels), split_positions(labels, self.test)
        return self.splits(*(unread_arrays(whole.at(part)) for part in places))


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
    if data["kind"] == "timm" and not data["name"].lower().startswith("hfds/"):
        return Path(data["root"]).name
    places = (Path(data[key]).name for key in ("name", "path", "root") if data.get(key))
    return next((place for place in places if place), data["kind"])


def split_images(recipe: Mapping[str, Any]) -> str:
    """What a report calls the images that it is about: those of the test split, if it says none.

    >>> split_images({"split": "train"})
    'training images'
    """
    split = recipe.get("split", "test")
    return f"{'training' if split == 'train' else split} images"


def evaluated_on(recipe: Mapping[str, Any]) -> str:
    """What a table calls the data of a report, with the images where they are not the test images.

    >>> evaluated_on({"data": {"kind": "digits"}, "split": "train"})
    'digits (training images)'
    """
    images = split_images(recipe)
    return source_name(recipe["data"]) + ("" if images == "test images" else f" ({images})")
