"""Arrays in one .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from einops import rearrange
from pydantic.dataclasses import dataclass

from flatreg.data.images import ImageArrays, Source, Splits, with_channels
from flatreg.terms import CONFIG


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Array(Source):
    """An .npz with `x_train, y_train, x_test, y_test`: uint8 images, or float in [0,1].

    Args:
        path: of the file. Images are n x h x w, n x h x w x channels or n x channels x h x w.
        channels: 3 repeats the channel of grey images, for a model that takes colour.
        hold_back, limit, test_limit: see `flatreg.data.Source`.
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
