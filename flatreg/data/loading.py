"""Batches of a fixed subset of a dataset, and columns of results from all processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from flatreg.threat import check_unit_range, to_unit_range


@dataclass(frozen=True, eq=False)
class Batch:
    """Images in [0,1] and labels on the model's device, with their dataset indices."""

    indices: list[int]
    inputs: Tensor
    labels: Tensor


Loading = Mapping[str, Any]
"""Keyword arguments of a `DataLoader` that say how it fetches batches."""


def map_style(data: Dataset[Any] | DataLoader[Any]) -> tuple[Dataset[Any], Loading]:
    """The dataset with random access behind `data`, and how a loader fetches from it.

    A loader, also one that Accelerate has prepared, gives its collate function, number of workers
    and pinning; its order, batch size and sampler are not used.

    Raises:
        ValueError: the dataset is iterable, or has no length.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "data must be a map-style dataset or a loader of one, got the iterable "
            f"{type(dataset).__name__}: a fixed subset cannot be drawn from it"
        )
    if not isinstance(data, DataLoader):
        return dataset, {}
    return dataset, {
        "collate_fn": data.collate_fn,
        "num_workers": data.num_workers,
        "pin_memory": data.pin_memory,
    }


def subset(total: int, samples: int | None, seed: int) -> list[int]:
    """Sorted dataset indices: all of `total`, or a random subset of `samples` where that is less.

    The subset depends on its numbers and on `seed` alone.

    Raises:
        ValueError: `total` or `samples` is 0.
    """
    if total == 0 or (samples is not None and samples < 1):
        raise ValueError(f"nothing to evaluate: {total} samples in the data, samples={samples}")
    if samples is None or samples >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, samples, replace=False).tolist())


def batches(
    model: nn.Module,
    dataset: Dataset[Any],
    indices: list[int],
    batch_size: int,
    loading: Loading | None = None,
) -> Iterator[Batch]:
    """Yield batches in [0,1] of the samples at `indices`, on the model's device, in its dtype.

    The dataset gives pairs of an image, uint8 or in [0,1], and a label; `loading`, from
    `map_style`, says how they are fetched.

    Raises:
        ValueError: images outside [0,1], a model in half precision, no pairs of images and labels.
    """
    like = next(model.parameters(), torch.empty(0))
    if like.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"verdicts are float32: expected a float32 model, got {like.dtype} (model.float())"
        )
    loading = loading or {}
    # Each worker prefetches two batches of its loader: in smaller ones, so that all that is fetched
    # ahead is one batch of ours.
    parts = max(1, 2 * loading.get("num_workers", 0))
    loader = iter(DataLoader(Subset(dataset, indices), -(-batch_size // parts), **loading))
    position = 0
    while fetched := [_pair(batch) for batch in islice(loader, parts)]:
        images, labels = (torch.cat(column) for column in zip(*fetched, strict=True))
        inputs = to_unit_range(images.to(like.device)).to(like.dtype)
        check_unit_range(inputs)
        yield Batch(
            indices[position : position + len(labels)], inputs, labels.to(like.device).long()
        )
        position += len(labels)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"expected batches of (images, labels), the data gives a {type(batch).__name__}"
        )
    images, labels = batch
    return images, labels


def rank_and_world() -> tuple[int, int]:
    """Number of this process and how many there are; (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(columns: Mapping[str, list[Any]], *, everyone: bool = True) -> dict[str, list[Any]]:
    """Concatenate the columns of all processes, in the order of their ranks; every one must call.

    The whole goes to every process; not `everyone`: to the first, and nothing to the others.
    """
    rank, world = rank_and_world()
    if world == 1:
        return dict(columns)
    parts: list[Any] = [None] * world
    if everyone:
        torch.distributed.all_gather_object(parts, dict(columns))
    else:
        torch.distributed.gather_object(dict(columns), None if rank else parts)
    merged: defaultdict[str, list[Any]] = defaultdict(list)
    for part in parts:
        for name, values in (part or {}).items():
            merged[name] += values
    return dict(merged)
