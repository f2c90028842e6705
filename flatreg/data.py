"""Images in memory as uint8, batches in [0,1], augmented batch-wise on the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from pydantic.dataclasses import dataclass
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from flatreg.terms import CONFIG

Share = Annotated[float, Field(ge=0, lt=1)]


def source_name(data: Mapping[str, Any]) -> str:
    """What a table calls the data of a recipe: its file, or its kind."""
    return Path(data.get("path", data["kind"])).stem


class ImageArrays(Dataset[tuple[Tensor, int]]):
    """Map-style dataset of images `(n, channels, height, width)`, uint8 or in [0,1], and labels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Fetch a batch at once, as `DataLoader` does where it can."""
        return list(zip(self.images[indices], self.labels[indices].tolist(), strict=True))


class Splits(NamedTuple):
    """Training, held-back and test images; choices are made on what was held back."""

    train: ImageArrays
    held_back: ImageArrays
    test: ImageArrays
    num_classes: int

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.train.images.shape[1])


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Digits:
    """scikit-learn's 1,797 handwritten digits, embedded: 8x8 pixels resized to `size`, one channel.

    Args:
        size: height and width in pixels.
        test: share of the images in the test split.
        hold_back: share of the rest to hold back from training.
    """

    size: Annotated[int, Field(ge=8)] = 32
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    hold_back: Share = 0.0
    kind: Literal["digits"] = "digits"

    def load(self) -> Splits:
        """Resize and split, the same way every time."""
        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] / 16
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        train, test = _split(ImageArrays(pixels, torch.from_numpy(digits.target)), self.test)
        return Splits(*_split(train, self.hold_back), test=test, num_classes=10)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Array:
    """An .npz with `x_train, y_train, x_test, y_test`: uint8 images, or float in [0,1].

    Args:
        path: of the file. Images are n x h x w, n x h x w x channels or n x channels x h x w.
        hold_back: share of the training images to hold back.
    """

    path: str
    hold_back: Share = 0.0
    kind: Literal["array"] = "array"

    def load(self) -> Splits:
        """Read and check the file.

        Raises:
            ValueError: it is missing, or its arrays are not what is said above.
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
        return Splits(*_split(train, self.hold_back), test=test, num_classes=classes)

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


Data = Annotated[Digits | Array, Field(discriminator="kind")]


def _split(data: ImageArrays, share: float) -> tuple[ImageArrays, ImageArrays]:
    """Split off a stratified share; the split depends on nothing but the data."""
    if share == 0:
        return data, ImageArrays(data.images[:0], data.labels[:0])
    kept, taken = train_test_split(
        np.arange(len(data)), test_size=share, random_state=0, stratify=data.labels.numpy()
    )
    kept, taken = np.sort(kept), np.sort(taken)
    return (
        ImageArrays(data.images[kept], data.labels[kept]),
        ImageArrays(data.images[taken], data.labels[taken]),
    )


def augment(images: Tensor, *, crop: int, flip: bool) -> Tensor:
    """Shift every image by up to `crop` pixels (zeros come in) and mirror half of them.

    Works on the whole batch `(batch, channels, height, width)` on its device, from torch's global
    generator.
    """
    batch, _, height, width = images.shape
    device = images.device
    if crop:
        top, left = torch.randint(0, 2 * crop + 1, (2, batch, 1), device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        padded = F.pad(images, (crop,) * 4)
        sample = torch.arange(batch, device=device)[:, None, None]
        # advanced indices around the channel slice move to the front: b h w c
        shifted = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        images = rearrange(shifted, "b h w c -> b c h w")
    if flip:
        mirrored = torch.rand(batch, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images
