"""Images in memory, and which of them train, are held back and test."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.data import Dataset

from flatreg.terms.protocol import CONFIG, Count

Share = Annotated[float, Field(ge=0, lt=1)]
Size = Count


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
    validation: ImageArrays
    test: ImageArrays
    num_classes: int

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.train.images.shape[1])


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Source:
    """What every kind of data takes.

    Args:
        validation: share of the training images to hold back from training, for choices.
        limit: how many training images to use, before some are held back; all by default. They are
            stratified, the same every time, and those of a smaller limit are among them.
        test_limit: the same for the test images.
    """

    validation: Share = Field(default=0.0, validation_alias=AliasChoices("validation", "hold_back"))
    limit: Count | None = None
    test_limit: Count | None = None

    def chosen(self, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to use, in order, given all labels `(n,)` of both splits.

        Raises:
            ValueError: there are more classes than `limit`.
        """
        classes = len(np.unique(train.numpy()))
        if self.limit is not None and self.limit < classes:
            raise ValueError(
                f"data.limit: expected at least the {classes} classes, got {self.limit}"
            )
        return stratified(train, self.limit), stratified(test, self.test_limit)

    def limited(self, train: ImageArrays, test: ImageArrays) -> tuple[ImageArrays, ImageArrays]:
        """The images to use, of images in memory. Raises as `chosen`."""
        if self.limit is None and self.test_limit is None:
            return train, test
        kept, judged = self.chosen(train.labels, test.labels)
        return (
            ImageArrays(train.images[kept], train.labels[kept]),
            ImageArrays(test.images[judged], test.labels[judged]),
        )

    def arranged(self, train: ImageArrays, test: ImageArrays, num_classes: int) -> Splits:
        """Hold back a share of the training images.

        Raises:
            ValueError: a class has too few images for that.
        """
        try:
            kept, validation = split_off(train, self.validation)
        except ValueError as error:  # scikit-learn's, of a stratified split
            raise ValueError(f"data.validation: {' '.join(str(error).split())}") from error
        return Splits(kept, validation, test, num_classes)


def stratified(labels: Tensor, limit: int | None) -> Tensor:
    """Positions of `limit` labels, each class in proportion; depends on nothing but the labels.

    Image r = 0, 1, ... of a class of c, in a seeded order, comes in at (r + 1/2)/c, the first of
    every class at 0: no class is left out, and a smaller limit takes a part of what a larger takes.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return torch.arange(count)
    shuffled = np.random.default_rng(0).permutation(count)
    _, inverse, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    classes = inverse[shuffled]
    turns = np.empty(count)
    for number, size in enumerate(sizes):
        turns[classes == number] = np.r_[0, np.arange(1.5, size) / size]
    taken = shuffled[np.argsort(turns, kind="stable")[:limit]]
    return torch.from_numpy(np.sort(taken))


def split_off(data: ImageArrays, share: float) -> tuple[ImageArrays, ImageArrays]:
    """Split off a stratified share; the split depends on nothing but the data."""
    if share == 0:
        return data, ImageArrays(data.images[:0], data.labels[:0])
    from sklearn.model_selection import train_test_split  # a second to import

    kept, taken = train_test_split(
        np.arange(len(data)), test_size=share, random_state=0, stratify=data.labels.numpy()
    )
    kept, taken = np.sort(kept), np.sort(taken)
    return (
        ImageArrays(data.images[kept], data.labels[kept]),
        ImageArrays(data.images[taken], data.labels[taken]),
    )


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Repeat the channel of grey images `(n, 1, height, width)` up to `channels`."""
    if channels is None or images.shape[1] != 1:
        return images
    return images.repeat(1, channels, 1, 1)


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
