"""From image files to uint8 arrays of one size, after a look at the memory they will take."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from flatreg.data.images import ImageArrays, Source, Splits

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
