"""Batches of a fixed subset of a dataset, and columns of results from all processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from flatreg.data.configuration import whole
from flatreg.data.sharing import Batch, rank_and_world
from flatreg.data.text import one_line
from flatreg.models.entrance import as_labels
from flatreg.models.state import random_streams
from flatreg.threat import check_unit_range, to_unit_range

Loading = Mapping[str, Any]
"""Keyword arguments of a `DataLoader` that say how it fetches batches."""


def map_style(data: Dataset[Any] | DataLoader[Any]) -> tuple[Dataset[Any], list[int], Loading]:
    """The dataset with random access behind `data`, which of its samples, and how to fetch them.

    Of a loader, also one that Accelerate has prepared: the samples that its sampler visits, by
    rising index. A shuffle visits all, also those that its `drop_last` leaves out, which are others
    in every pass; so does a distributed sampler, because the processes share the samples out anew.
    The collate function, the workers and pinning are the loader's; order and batch size are not.

    Raises:
        ValueError: the dataset is iterable, or has no length; the sampler does not visit the same
            samples, each once, in every pass.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    name = type(dataset).__name__
    expected = "data must be a map-style dataset or a DataLoader of one"
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{expected}, got the iterable {name}: a fixed subset cannot be drawn from it"
        )
    if name == "PrefetchLoader":  # timm's
        raise ValueError(
            f"{expected}, got a {name}, which normalises: give its .loader, and its mean and std "
            "to flatreg.with_normalization"
        )
    if isinstance(dataset, nn.Module):
        raise ValueError(f"{expected}, got the model {name}: the model comes first, then the data")
    arrays = (Tensor, np.ndarray)
    parts = isinstance(dataset, tuple) and any(isinstance(part, arrays) for part in dataset)
    if parts or isinstance(dataset, (*arrays, Mapping)):
        raise ValueError(
            f"{expected}, got a {name}: give torch.utils.data.TensorDataset(images, labels)"
        )
    first: Any = dataset[0] if isinstance(dataset, list) and dataset else None
    pair = isinstance(first, (tuple, list)) and len(first) == 2
    if pair and np.ndim(first[1]) and np.shape(first[0])[:1] == np.shape(first[1]):
        raise ValueError(
            f"{expected}, got a list of batches: give torch.utils.data.ConcatDataset("
            "[TensorDataset(*batch) for batch in batches])"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"{expected}, got a {name}")
    if not isinstance(data, DataLoader):
        # Ours that stream say how they are fetched.
        return dataset, list(range(len(dataset))), getattr(dataset, "loading", {})
    names = "collate_fn num_workers pin_memory timeout worker_init_fn multiprocessing_context"
    return dataset, _visited(data), {name: getattr(data, name) for name in names.split()}


_PASSES = 3  # of an unknown sampler: a random subset is another one in one of them


def _visited(loader: DataLoader[Any]) -> list[int]:
    """Indices of the samples that every pass over a loader visits, ascending."""
    if loader.batch_sampler is None:
        raise ValueError(
            "data: expected a loader that makes batches of samples, got one with batch_size=None: "
            "give its dataset, or a batch_size"
        )
    total = len(loader.dataset)  # type: ignore[arg-type]
    order, _ = _order(loader.batch_sampler, loader.dataset)
    if not (set(order) <= set(range(total)) and len(set(order)) == len(order)):
        raise ValueError(
            f"data: expected a sampler of indices from 0 to {total - 1}, each once, got others: "
            f"{_SUBSET}"
        )
    return sorted(order)


_SUBSET = "give torch.utils.data.Subset(dataset, indices)"


def _order(sampler: Any, dataset: object) -> tuple[list[int], bool]:
    """Indices in the order in which a sampler, or one of batches, visits them; is it fixed?"""
    kind, world = type(sampler), rank_and_world()[1]
    if kind is BatchSampler:
        order, fixed = _order(sampler.sampler, dataset)
        whole = len(order) // sampler.batch_size * sampler.batch_size
        return (order[:whole] if fixed and sampler.drop_last else order), fixed
    if kind.__name__ == "BatchSamplerShard" and sampler.num_processes == world:  # Accelerate's
        return _order(sampler.batch_sampler, dataset)
    if kind is SequentialSampler:
        return list(range(len(sampler.data_source))), True
    if kind is SubsetRandomSampler:
        return [int(index) for index in sampler.indices], False
    if kind is RandomSampler or kind.__name__ == "SeedableRandomSampler":  # Accelerate's
        total = len(sampler.data_source)
        if not sampler.replacement and sampler.num_samples == total:
            return list(range(total)), False
    elif kind is DistributedSampler and sampler.num_replicas == world:
        total, fixed = len(sampler.dataset), not sampler.shuffle
        kept = sampler.total_size if sampler.drop_last and fixed else total
        return list(range(min(total, kept))), fixed
    elif kind is not WeightedRandomSampler and getattr(sampler, "num_replicas", 1) == 1:
        passes = _passes(sampler, dataset)
        if all(sorted(one) == sorted(passes[0]) for one in passes):
            return passes[0], all(one == passes[0] for one in passes)
    raise ValueError(
        "data: expected a loader that visits the same samples in every pass, each once, got one "
        f"with a {kind.__name__}: {_SUBSET}"
    )


def _passes(sampler: Any, dataset: object) -> list[list[int]]:
    """Indices that copies of a sampler visit in each of several passes; no stream is moved."""
    streams, most = random_streams(nn.Module()), len(dataset) + 1  # type: ignore[arg-type]
    try:
        own = copy.deepcopy(sampler, {id(dataset): dataset})
        return [list(islice(_flat(own), most)) for _ in range(_PASSES)]
    except (TypeError, ValueError, RuntimeError) as error:  # no copy, or no indices
        raise ValueError(
            f"data: expected a sampler of indices, got a {type(sampler).__name__}: {_SUBSET}"
        ) from error
    finally:
        streams.put_back()


def _flat(sampler: Iterable[Any]) -> Iterator[int]:
    for entry in sampler:
        yield from map(int, np.atleast_1d(entry))  # a tensor without an axis is an index too


def subset(available: Sequence[int], samples: int | None, seed: int) -> list[int]:
    """All `available` numbers, or `samples` random ones of them where that is less, in order.

    The subset depends on its arguments alone.

    Raises:
        ValueError: there are none; `samples` is no whole number from 1, `seed` none from 0.
    """
    total, seed = len(available), whole("seed", seed, 0)
    samples = total if samples is None else whole("samples", samples, 1)
    if total == 0:
        raise ValueError("nothing to evaluate: 0 samples in the data")
    if samples >= total:
        return list(available)
    rows = np.random.default_rng(seed).choice(total, samples, replace=False)
    return [available[row] for row in sorted(rows.tolist())]


def batches(
    model: nn.Module,
    dataset: Dataset[Any],
    indices: list[int],
    batch_size: int,
    loading: Loading | None = None,
) -> Iterator[Batch]:
    """Yield batches in [0,1] of the samples at `indices`, on the model's device, in its dtype.

    Of a model that has cast its layers to bfloat16 in a pass before, in float32.

    The dataset gives pairs of an image, uint8 or in [0,1], and a label; `loading`, from
    `map_style`, says how they are fetched.

    Raises:
        ValueError: images outside [0,1], a model in float16, no pairs of images and class indices,
            a collate function that drops or adds samples.
        RuntimeError: a worker of the loader has died, or raised; with the cause, in one line.
    """
    like = next(model.parameters(), torch.empty(0))
    if like.dtype == torch.float16:
        raise ValueError(
            f"verdicts are float32: expected a float32 model, got {like.dtype} (model.float())"
        )
    # Now: a pass between two batches may cast the layers.
    device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
    settings = loading or {}
    workers = settings.get("num_workers", 0)
    samples = _InWorker(dataset, indices) if workers else Subset(dataset, indices)
    # Each worker prefetches two batches of its loader: in smaller ones, so that all that is fetched
    # ahead is one batch of ours.
    parts = max(1, 2 * workers)
    size = -(-whole("batch_size", batch_size, 1) // parts)
    loader = DataLoader(samples, size, **settings)
    if workers:
        loader.collate_fn = Collated(loader.collate_fn)
    fetched = _pairs(loader, len(indices), size)
    position = 0
    while pairs := list(islice(fetched, parts)):
        images, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        inputs = images.to(device)
        inputs = to_unit_range(inputs).to(dtype)
        check_unit_range(inputs)
        yield Batch(indices[position : position + len(labels)], inputs, labels.to(device))
        position += len(labels)


def _pairs(loader: DataLoader[Any], total: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and class indices of each batch of a loader, in order; every sample must be there."""
    fetched = _started(loader)
    told = told_in_a_line(fetched, from_workers=loader.num_workers > 0)
    try:
        for start in range(0, total, size):
            try:
                batch = next(told)
            except StopIteration as error:
                raise RuntimeError("the data raised StopIteration: a sample is missing") from error
            yield _pair(batch, min(size, total - start))
    finally:
        # Now, and not when the last traceback is gone: workers of the next loader would inherit
        # the pipes, and end them.
        if stop := getattr(fetched, "_shutdown_workers", None):
            stop()


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got pickle error")  # the error says it
            return iter(loader)
    except (OSError, AttributeError, TypeError, PicklingError) as error:
        if not loader.num_workers:
            raise
        raise RuntimeError(  # what cannot be sent to a process that is spawned
            f"the workers of the loader cannot be started: {one_line(error)}: {_IN_THIS_PROCESS}"
        ) from error


def told_in_a_line(fetched: Iterator[Any], *, from_workers: bool) -> Iterator[Any]:
    """The batches of a loader; what goes wrong in a worker, in one line.

    Raises:
        ValueError: a sample cannot be read, or images are no tensors.
        RuntimeError: a worker of the loader has died, with the cause.
    """
    while True:
        try:
            batch = next(fetched)
        except StopIteration:
            return
        except Exception as error:
            if not from_workers:
                _explain(error)
                raise  # the user's own, with the place where it was raised
            raise _died(error) from error
        if isinstance(batch, Failed):
            raise batch.error()
        yield batch


def _died(error: Exception) -> RuntimeError:
    """What to raise of an error of a loader with workers."""
    # The text of an error of a worker is its traceback, which ends with what it was.
    name, text = type(error).__name__, str(error)
    cause = text.rpartition(f"\n{name}: ")[2] if "Traceback" in text else text
    return RuntimeError(
        f"a worker of the loader died: {name}: {one_line(cause)}: it was killed, as where "
        f"memory runs out, or failed: {_IN_THIS_PROCESS}"
    )


_IN_THIS_PROCESS = "num_workers=0 shows where"


class DataError(ValueError):
    """An error of the data whose one line says all."""


@dataclass(frozen=True)
class Failed:
    """What a worker sends in the place of a batch: words, as an error may not be sent at all."""

    message: str
    of_the_data: bool

    def error(self) -> ValueError | RuntimeError:
        """What to raise of it."""
        return (ValueError if self.of_the_data else RuntimeError)(self.message)


def failed(error: Exception) -> Failed:
    """What a worker sends of an error."""
    try:
        if isinstance(error, DataError):
            raise error
        _explain(error)
    except ValueError as ours:
        return Failed(str(ours), True)
    reason = f"{type(error).__name__}: {one_line(error)}"
    return Failed(f"a worker of the loader raised {reason}: {_IN_THIS_PROCESS}", False)


class _InWorker(Subset[Any]):
    """A subset whose errors are told in the place of the rows."""

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return super().__getitems__(indices)
        except Exception as error:
            return failed(error)


@dataclass(frozen=True)
class Collated:
    """The user's collate function; its batches are checked where they are made."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, rows: Any) -> Any:
        """Images and labels; a batch that failed as it is."""
        if isinstance(rows, Failed):
            return rows
        try:
            batch = self.collate(rows)
        except Exception as error:
            return failed(error)
        try:
            return _pair(batch, len(rows))
        except ValueError as error:
            return Failed(str(error), True)


def _explain(error: Exception) -> None:
    """Say what to do about an error of a collate function, of images of PIL or of several sizes."""
    if isinstance(error, RuntimeError) and "stack expects each tensor to be equal" in str(error):
        raise ValueError(
            f"expected images of one size, the data gives several ({one_line(error)}): give the "
            "dataset a transform that resizes or crops them"
        ) from error
    if isinstance(error, TypeError) and "PIL" in str(error):
        raise ValueError(
            "expected images as tensors, the data gives images of PIL: give the dataset a "
            "transform, such as torchvision.transforms.ToTensor()"
        ) from error


def _pair(batch: Any, size: int) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{type(batch).__name__}"
        if isinstance(batch, Mapping):
            found += f" of {', '.join(map(str, batch))}"
        elif isinstance(batch, Sequence):
            found += f" of {len(batch)}"
        raise ValueError(
            f"expected batches of (images, labels), the data gives a {found}: give a loader whose "
            "collate_fn returns the two"
        )
    images, labels = batch
    if not isinstance(images, Tensor):
        raise ValueError(f"expected images as a tensor, the data gives a {type(images).__name__}")
    if len(images) != size:
        raise ValueError(
            f"expected a batch of {size} samples, the collate function makes {len(images)}: give "
            "a torch.utils.data.Subset without those that it drops"
        )
    return images.detach(), as_labels(labels, size, probabilities=False)
