"""What is read of a data set, and what trains, validates and tests: in memory, or streamed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from flatreg.data.configuration import configuration
from flatreg.data.progress import progress_bar
from flatreg.data.streamed import LARGEST_RESIZED, StreamedImages
from flatreg.data.text import one_line
from flatreg.terms.protocol import Count

_MOST_CLASSES = 10**6  # a head of more would be a mistake in the labels
_FITTED = 2**28  # bytes of streamed images that a manifold is fitted to
# Where Linux says how much memory a container may take: control groups, version 2 and 1.
_CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_AT_ONCE = 1000  # images resized between two steps of the progress bar


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """Images `(n, channels, height, width)`."""
        return self.images[list(indices)]

    def first(self, count: int) -> Tensor:
        """The first images, at most `count`."""
        return self.images[:count]

    def at(self, indices: Tensor) -> ImageArrays:
        """A copy of some images."""
        return ImageArrays(self.images[indices], self.labels[indices])


Images = ImageArrays | StreamedImages


class UnreadImages(NamedTuple):
    """Images of a split that are not read yet; their labels `(n,)` are known."""

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    """From positions `(m,)` to images `(m, channels, height, width)`, uint8 or in [0,1]."""
    streamed: Callable[[Tensor], StreamedImages] | None = None
    """From positions to images that are decoded on access, where they are not to be read."""


class Splits(NamedTuple):
    """Training, validation and test images; choices are made on the validation images."""

    train: Images
    validation: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...] | None = None

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.train.shape[0]

    def to_fit(self) -> Tensor:
        """Training images that a manifold is fitted to: all that are in memory.

        Of streamed images as many as take 256 MiB, stratified, the same every time.
        """
        if isinstance(self.train, ImageArrays):
            return self.train.images
        most = max(1, _FITTED // math.prod(self.train.shape))
        return self.train.images_at(stratified_positions(self.train.labels, most).tolist())


@configuration
class Source:
    """What every kind of data takes.

    Args:
        validation: part of the training images, in [0, 1), that are kept for validation.
        limit: how many training images to use, validation included; all by default. They are
            stratified, the same every time, and those of a smaller limit are among them.
        test_limit: the same for the test images.
    """

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    limit: Count | None = None
    test_limit: Count | None = None

    def splits(
        self,
        train: UnreadImages,
        test: UnreadImages,
        *,
        shape: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Splits:
        """Read the images to use, and split the validation images off the training images.

        Args:
            train: all images.
            test: all images.
            shape: channels, height and width of the images once read, where they may take too much
                memory.
            class_names: by class number, where they are known.

        Raises:
            ValueError: a split has no images; a label is no class number; there are more classes
                than `limit`, or too few images of a class for `validation`; the images take too
                much memory; an image cannot be read.
        """
        for name, split in (("training", train), ("test", test)):
            if not len(split.labels):
                raise ValueError(f"data: expected images in both splits, got none for {name}")
            low, high = int(split.labels.min()), int(split.labels.max())
            if not 0 <= low <= high < _MOST_CLASSES:
                raise ValueError(
                    f"data: expected class numbers from 0 to {_MOST_CLASSES - 1:,}, got {low} to "
                    f"{high} for {name}: number the classes from 0"
                )
        classes = len(np.unique(train.labels.numpy()))
        if self.limit is not None and self.limit < classes:
            raise ValueError(
                f"data.limit: expected at least the {classes} classes, got {self.limit}"
            )
        limits = ((train, self.limit), (test, self.test_limit))
        used = [(split, stratified_positions(split.labels, limit)) for split, limit in limits]
        if shape is not None and train.streamed is None:  # before anything is read
            count = sum(len(positions) for _, positions in used)
            what = f"{count:,} images of {'x'.join(map(str, shape))}"
            check_memory(what, count * math.prod(shape), streams=hasattr(self, "workers"))
        whole, tested = (
            split.streamed(positions)
            if split.streamed
            else ImageArrays(split.read(positions), split.labels[positions].long())
            for split, positions in used
        )
        try:
            rest, taken = split_positions(whole.labels, self.validation)
        except ValueError as error:  # scikit-learn's, of a stratified split
            raise ValueError(f"data.validation: {one_line(error, None)}") from error
        num_classes = 1 + int(max(train.labels.max(), test.labels.max()))
        names = tuple(class_names) if class_names and len(class_names) == num_classes else None
        kept = whole.at(rest) if len(taken) else whole  # not copied where all are used
        return Splits(kept, whole.at(taken), tested, num_classes, names)


def stratified_positions(labels: Tensor, limit: int | None) -> Tensor:
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


def split_positions(labels: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Positions of the rest, and of a stratified part; depends on nothing but the labels.

    Raises:
        ValueError: a class has no image in one of the two.
    """
    if part == 0:
        return torch.arange(len(labels)), torch.arange(0)
    from sklearn.model_selection import train_test_split  # here, as it is slow to import

    try:
        both = train_test_split(
            np.arange(len(labels)), test_size=part, random_state=0, stratify=labels.numpy()
        )
    except ValueError as error:
        raise ValueError(
            f"expected a fraction of the {len(labels)} images such that both parts have images of "
            f"all {len(set(labels.tolist()))} classes, got {part:g}"
        ) from error
    rest, taken = (torch.from_numpy(np.sort(positions)) for positions in both)
    return rest, taken


def unread_arrays(
    data: ImageArrays, *, size: int | None = None, channels: int | None = None, name: str = ""
) -> UnreadImages:
    """Images that are in memory already; reading resizes them to `size` pixels, see `resize`.

    The channel of grey images is repeated `channels` times; the progress bar shows `name`.
    """

    def read(positions: Tensor) -> Tensor:
        images = data.images  # not copied where all are used
        images = images[positions] if len(positions) < len(images) else images
        if size is not None and images.shape[2:] != (size, size):
            out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
            with progress_bar(f"resize {name}", len(images)) as bar:
                for start in range(0, len(images), _AT_ONCE):
                    block = images[start : start + _AT_ONCE]
                    out[start : start + _AT_ONCE] = resize(block, size)
                    bar.update(len(block))
            images = out
        if channels is not None and images.shape[1] == 1:
            images = images.repeat(1, channels, 1, 1)
        return images

    return UnreadImages(data.labels, read)


def resize(images: Tensor, size: int) -> Tensor:
    """Images with their shorter side resized to `size` (bilinear, antialiased), centre cropped.

    As torchvision's `Resize` and `CenterCrop` with torch's interpolation of uint8, its roundings
    included. Where torchvision casts to float32 instead (up to 0.23 at least, with AVX512), a value
    can differ by 1.

    uint8 `(n, channels, height, width)` to uint8 `(n, channels, size, size)`, `size` in pixels.

    Raises:
        ValueError: the images are so long that they would take more than 1 GiB each.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    tall, wide = height * size // short, width * size // short
    if images.shape[1] * tall * wide > LARGEST_RESIZED:
        raise ValueError(
            f"expected images that resize to at most 1 GiB, {height}x{width} pixels become "
            f"{tall}x{wide}: crop them first, or choose a smaller size"
        )
    whole = F.interpolate(images, (tall, wide), mode="bilinear", antialias=True)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return whole[:, :, top : top + size, left : left + size]


def check_memory(what: str, needed: int, *, streams: bool = False) -> None:
    """Refuse what would take more than half of this machine's memory.

    Args:
        what: for the message, in the plural.
        needed: bytes.
        streams: the kind of data can stream instead.

    Raises:
        ValueError: they are more.
    """
    memory = physical_memory()
    if needed > memory / 2:
        instead = "set workers: 4 (images are decoded as they are needed), or " * streams
        raise ValueError(
            f"data: {what} take {min(needed, 2**99) / 2**30:.1f} GiB, more than half of this "
            f"machine's {memory / 2**30:.1f}: {instead}choose a smaller size, or a limit and a "
            "test_limit"
        )


def physical_memory() -> float:
    """Bytes of this machine's memory, or of its container; infinite where nothing says so."""
    known = [float("inf")]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in _CONTAINER:
        with suppress(OSError, ValueError):  # no such file, or "max"
            known.append(int(limit.read_text(encoding="utf-8")))
    return min(known)


def augment(
    images: Tensor, *, crop: int, flip: bool, generator: torch.Generator | None = None
) -> Tensor:
    """Shift every image by up to `crop` pixels (zeros come in) and mirror half of them.

    Works on the whole batch `(batch, channels, height, width)` on its device, and draws from
    `generator`, of that device, or from torch's own.
    """
    (batch, _, height, width), device = images.shape, images.device
    if crop:
        top, left = torch.randint(
            0, 2 * crop + 1, (2, batch, 1), generator=generator, device=device
        )
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        padded = F.pad(images, (crop,) * 4)
        sample = torch.arange(batch, device=device)[:, None, None]
        # advanced indices around the channel slice move to the front: b h w c
        shifted = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        images = rearrange(shifted, "b h w c -> b c h w")
    if flip:
        mirrored = torch.rand(batch, generator=generator, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images
