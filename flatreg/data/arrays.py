"""Arrays in one .npz file."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.data.images import ImageArrays, Source, Splits, split_off, with_channels
from flatreg.terms.protocol import CONFIG


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Array(Source):
    """An .npz with `x_train, y_train, x_test, y_test`: uint8 images, or float in [0,1].

    Args:
        path: of the file. Images are n x h x w, n x h x w x channels or n x channels x h x w.
        channels: 3 repeats the channel of grey images, for a model that takes colour.
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    path: str
    channels: Literal[3] | None = None
    kind: Literal["array"] = "array"

    def load(self) -> Splits:
        """Read and check the file.

        Raises:
            ValueError: it is missing, its arrays are not what is said above, or `limit` or what is
                held back is too small for the classes.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"data.path: expected an .npz file, found none at {self.path}")
        with path.open("rb") as stream, self._open(stream) as file:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(file.files)
            if missing:
                raise ValueError(
                    f"{self.path}: expected arrays x_train, y_train, x_test, y_test; "
                    f"missing {', '.join(sorted(missing))}"
                )
            train = self._images(file["x_train"], file["y_train"])
            test = self._images(file["x_test"], file["y_test"])
        classes = 1 + int(max(train.labels.max(), test.labels.max()))
        train, test = self.limited(train, test)
        return self.arranged(self._in_channels(train), self._in_channels(test), classes)

    def _in_channels(self, data: ImageArrays) -> ImageArrays:
        return ImageArrays(with_channels(data.images, self.channels), data.labels)

    def _open(self, stream: BinaryIO) -> Any:
        try:
            file = np.load(stream, allow_pickle=False)
        except (BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{self.path}: not an .npz file: {error}") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{self.path}: not an .npz file: it holds one array")
        return file

    def _images(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> ImageArrays:
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[-1] in (1, 3, 4):
            images = rearrange(images, "n h w c -> n c h w")
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"{self.path}: expected n images and labels, got {images.shape}, {labels.shape}"
            )
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(
                f"{self.path}: labels must be class numbers of shape (n,), "
                f"got {labels.dtype} of shape {labels.shape}"
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, embedded: 8x8 pixels resized to `size`, one channel.

    Args:
        size: height and width in pixels.
        test: share of the images in the test split.
        validation: share of the rest to hold back from training.
        limit, test_limit: how many of the training and test images to use.
    """

    size: Annotated[int, Field(ge=8)] = 32
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    kind: Literal["digits"] = "digits"

    def load(self) -> Splits:
        """Resize and split, the same way every time.

        Raises:
            ValueError: `limit` or what is held back is too small for the classes.
        """
        from sklearn.datasets import load_digits  # a second to import

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] / 16
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        train, test = split_off(ImageArrays(pixels, torch.from_numpy(digits.target)), self.test)
        return self.arranged(*self.limited(train, test), num_classes=10)


_STEMS = [
    f"{split}-{part}-ubyte"
    for split in ("train", "t10k")
    for part in ("images-idx3", "labels-idx1")
]


def find_idx(folders: list[Path]) -> list[Path] | None:
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


def read_split(images: Path, labels: Path) -> ImageArrays:
    """Read one split.

    Raises:
        ValueError: a file is damaged, or they do not belong together.
    """
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(
            f"{labels}: expected {len(pixels)} labels, one an image, got {len(classes)}"
        )
    return ImageArrays(pixels[:, None], classes.long())


def read_idx(path: Path, axes: int) -> Tensor:
    """Read an idx file of bytes.

    Two zero bytes, 8 (unsigned byte), the number of axes; each axis' length as four bytes, the
    highest first; the values. http://yann.lecun.com/exdb/mnist/

    Args:
        path: of the file; one that ends in .gz is decompressed.
        axes: that it must have.

    Raises:
        ValueError: it is no such file, or cut off.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not read: {error}") from error
    header = 4 + 4 * axes
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, axes)):
        raise ValueError(f"{path}: expected an idx file of bytes with {axes} axes")
    shape = [int(length) for length in np.frombuffer(raw, ">u4", axes, 4)]
    if len(raw) != header + math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} values, shape {shape}, got {len(raw) - header}"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())
