"""Images that stay in their files: decoded on access, in the workers of a loader."""

from __future__ import annotations

import io
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate, get_worker_info

from flatreg.data.files import check_ordinary
from flatreg.data.loading import Collated, DataError, failed
from flatreg.data.text import one_line, shown
from flatreg.models.state import derived_seed

DEFAULT_CROP_PCT = 0.875  # timm's
LARGEST_RESIZED = 2**30  # values of one resized image before it is cropped
Opened = Callable[[int], tuple[Any, str]]
"""From a position to a path or stream of the image, and its name in errors."""


class Paths:
    """Opens files by position; bytes in one array, as a list would be copied by every worker."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = np.array([os.fsencode(file) for file in files])

    def __call__(self, position: int) -> tuple[str, str]:
        """The path, and its name in errors."""
        file = os.fsdecode(self._files[position])
        return file, file


class Column(NamedTuple):
    """Opens the images of a column of `datasets` by position, with timm's reader."""

    reader: Any
    name: str

    def __call__(self, position: int) -> tuple[io.BytesIO, str]:
        """The bytes, and their name in errors.

        Raises:
            ValueError: the row has no image.
        """
        called = f"{self.name}, image {position}"
        try:
            stream, *_ = self.reader[position]
        except (AssertionError, OSError, TypeError) as error:
            raise ValueError(f"{called}: no image in the column {self.reader.image_key}") from error
        with stream:
            return io.BytesIO(stream.read()), called


class Shape(NamedTuple):
    """How images are cut for evaluation, in timm's words: `timm.data.create_transform`."""

    size: int
    channels: int
    crop_pct: float | None
    interpolation: str


class Augmentation(NamedTuple):
    """How images are changed for training, in timm's words; None and 0 leave them as they are."""

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    flip: bool = False
    auto_augment: str | None = None
    color_jitter: float | Sequence[float] | None = None
    re_prob: float = 0.0
    interpolation: str | None = None


class StreamedImages(Dataset[tuple[Tensor, int]]):
    """Map-style dataset of images in files, uint8 `(channels, size, size)`, and their labels.

    An image is decoded when it is asked for, its shorter side resized to `size / crop_pct` and its
    centre cropped, by timm's transform for evaluation. `loading` are the arguments of a
    `DataLoader` that decodes in `workers` processes; `flatreg.evaluate` takes them from here.
    """

    def __init__(
        self, opened: Opened, labels: Tensor, cut: Shape, workers: int, positions: Tensor
    ) -> None:
        self.labels, self.workers = labels[positions].long(), workers
        self._opened, self.cut, self._positions = opened, cut, positions
        self._transform = _evaluation_transform(cut)

    @property
    def loading(self) -> dict[str, Any]:
        """How a `DataLoader` fetches from here."""
        return {
            "num_workers": self.workers,
            "worker_init_fn": leave_signals,
            "pin_memory": torch.cuda.is_available(),
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.cut.channels, self.cut.size, self.cut.size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transformed(index, self._transform), int(self.labels[index])

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """Images `(n, channels, size, size)`, decoded in this process."""
        if not len(indices):
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        return torch.stack([self[index][0] for index in indices])

    def first(self, count: int) -> Tensor:
        """The first images, at most `count`."""
        return self.images_at(range(min(count, len(self))))

    def at(self, indices: Tensor) -> StreamedImages:
        """The same dataset of some images."""
        part = object.__new__(StreamedImages)
        part.__dict__ |= vars(self)
        part.labels, part._positions = self.labels[indices], self._positions[indices]
        return part

    def augmented(self, how: Augmentation) -> AugmentedImages:
        """The images as they are trained on.

        Raises:
            ValueError: timm has no such transform.
        """
        return AugmentedImages(self, _training_transform(self.cut, how))

    def transformed(self, index: int, transform: Callable[[Image.Image], Tensor]) -> Tensor:
        """Decode and transform an image.

        Raises:
            DataError: it does not decode, or has another form; it names the file.
        """
        source, called = self._opened(int(self._positions[index]))
        done = "decoded"
        try:
            image = decoded(source, self.cut.channels)
            # what the resized image takes before it is cropped
            longer, shorter = max(image.size), min(image.size)
            side = self.cut.size / (self.cut.crop_pct or DEFAULT_CROP_PCT)
            if self.cut.channels * side**2 * longer / shorter > LARGEST_RESIZED:
                raise ValueError(
                    f"expected images that resize to at most 1 GiB, got {image.height}x"
                    f"{image.width} pixels: crop them first, or choose a smaller size"
                )
            done = "transformed"
            return transform(image)
        except Exception as error:  # a damaged file has Pillow raise errors of any kind
            reason = one_line(error) or type(error).__name__
            raise DataError(f"{shown(called)}: not {done}: {reason}") from error


class AugmentedImages(Dataset[Any]):
    """Images of training by `(index, key)`: the transform draws from (key, index) alone.

    `key` is the seed of an epoch. So an image is the same whatever process decodes it, and
    whatever was decoded before.
    """

    def __init__(self, images: StreamedImages, transform: Callable[[Any], Tensor]) -> None:
        self.images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        index, key = place
        with _drawing_from(derived_seed(key, index)):
            image = self.images.transformed(index, self._transform)
        return image, int(self.images.labels[index])

    def __getitems__(self, places: list[tuple[int, int]]) -> Any:
        """A batch; in a worker an error is told in its place, in one line."""
        try:
            return [self[place] for place in places]
        except Exception as error:
            if get_worker_info() is None:
                raise
            return failed(error)

    def loader(self, batch_size: int, *, count: int, generator: torch.Generator) -> DataLoader[Any]:
        """Shuffled batches of `count` images, in an order that `generator` draws.

        An epoch's key is the seed that `generator` was given last.
        """
        return DataLoader(
            self,
            batch_size,
            sampler=_Keyed(self, num_samples=count, generator=generator),
            collate_fn=Collated(default_collate),
            persistent_workers=self.images.workers > 0,
            **self.images.loading,
        )


class _Keyed(RandomSampler):
    """Draws indices, each with the seed of the generator."""

    def __iter__(self) -> Iterator[Any]:
        key = self.generator.initial_seed()
        return ((index, key) for index in super().__iter__())


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Seed the streams that transforms draw from, and put them back.

    Not in a worker, where nothing else draws: it would take a tenth of the time of an image.
    """
    here = get_worker_info() is None
    if here:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if here:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def leave_signals(_: int) -> None:
    """Have a worker leave signals to the training, which ends with a checkpoint.

    A terminal and a cluster send them to every process of a group. A worker ends when the process
    that started it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def decoded(source: Any, channels: int) -> Image.Image:
    """The one image of a file or stream, 8 bits a channel, of 1 or 3 channels.

    Raises:
        ValueError: it has more bits or several frames. Pillow raises errors of any other kind.
    """
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
            picture: Image.Image = whole.convert("L" if channels == 1 else "RGB")
            return picture


def _evaluation_transform(cut: Shape) -> Callable[[Any], Tensor]:
    from timm.data import create_transform  # where it is needed: half a second

    transform: Callable[[Any], Tensor] = create_transform(
        cut.size,
        crop_pct=cut.crop_pct,
        interpolation=cut.interpolation,
        use_prefetcher=True,  # to uint8
    )
    return transform


def _posterized(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's; Pillow 13 refuses to keep 0 bits, of which it made black images before."""
    from timm.data.auto_augment import posterize

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    result: Image.Image = posterize(image, bits_to_keep)
    return result


def _training_transform(cut: Shape, how: Augmentation) -> Callable[[Any], Tensor]:
    """timm's, to uint8; without `scale` the images are cut as for evaluation.

    Raises:
        ValueError: timm has no such `auto_augment`.
    """
    from timm.data import create_transform
    from timm.data.auto_augment import posterize
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms  # type: ignore[import-untyped]

    try:
        crop, change, final = create_transform(
            cut.size,
            is_training=True,
            scale=how.scale,
            ratio=how.ratio,
            hflip=0.5 if how.flip else 0.0,
            color_jitter=how.color_jitter,
            auto_augment=how.auto_augment,
            interpolation=how.interpolation or cut.interpolation,
            mean=(0.5,) * cut.channels,  # what geometric changes of auto_augment fill in
            use_prefetcher=True,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        reason = one_line(error) or type(error).__name__
        raise ValueError(
            f"augment.auto_augment: expected a policy of timm such as rand-m9-mstd0.5, got "
            f"{one_line(str(how.auto_augment), 80)!r}: {reason}"
        ) from error
    if how.scale is None:
        cutting: Any = _evaluation_transform(cut)
        crop.transforms[:1] = cutting.transforms[:-1]
    for policy in change.transforms:
        ops = getattr(policy, "ops", None) or [o for p in getattr(policy, "policy", ()) for o in p]
        for op in ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterized
    erase = [RandomErasing(how.re_prob, mode="const", max_count=1, device="cpu")]
    whole = [*crop.transforms, *change.transforms, *final.transforms]
    transform: Callable[[Any], Tensor] = transforms.Compose(whole + erase * (how.re_prob > 0))
    return transform
