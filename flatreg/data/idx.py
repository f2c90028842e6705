"""The idx files of the MNIST family, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatreg.data.images import ImageArrays

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
