"""Every kind of data that a recipe can name; all are read into memory, mostly as uint8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from pydantic.dataclasses import dataclass

from flatreg.data.image_files import Folder, Timm
from flatreg.data.images import ImageArrays, Source, Splits, split_off, unread_arrays
from flatreg.data.torchvision import Torchvision
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
            ValueError: it is missing, its arrays are not those above, or as `Source.splits`.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"data.path: expected an .npz file, found none at {self.path}")
        names = ("x_train", "y_train", "x_test", "y_test")
        with path.open("rb") as stream, self._open(stream) as file:
            missing = sorted(set(names) - set(file.files))
            if missing:
                raise ValueError(
                    f"{self.path}: expected arrays {', '.join(names)}; missing {', '.join(missing)}"
                )
            both = [self._images(file[x], file[y]) for x, y in (names[:2], names[2:])]
        return self.splits(*(unread_arrays(data, channels=self.channels) for data in both))

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

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] / 16
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        train, test = split_off(ImageArrays(pixels, torch.from_numpy(digits.target)), self.test)
        return self.splits(unread_arrays(train), unread_arrays(test))


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
    if data["kind"] == "timm" and "/" not in data["name"]:  # which says "folder", not which
        return Path(data["root"]).name
    places = (Path(data[key]).name for key in ("name", "path", "root") if data.get(key))
    return next((place for place in places if place), data["kind"])
