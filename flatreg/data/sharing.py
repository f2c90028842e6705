"""Batches, and what the processes of a launch share: columns of results, and the work itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import P2POp


@dataclass(frozen=True, eq=False)
class Batch:
    """Images in [0,1] and labels on the model's device, with their dataset indices."""

    indices: list[int]
    inputs: Tensor
    labels: Tensor


_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if there were no others, which do not call what it calls within."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def rank_and_world() -> tuple[int, int]:
    """Number of this process and how many there are; (0, 1) without a group, or if it is alone."""
    if _ALONE.get():
        return 0, 1
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


def same_everywhere(indices: list[int]) -> list[int]:
    """Indices that every process of a launch has; every one must call.

    Raises:
        ValueError: another process has others.
    """
    if any(others != indices for others in gather({"indices": [indices]})["indices"]):
        raise ValueError(
            "data: expected the same samples in every process, which share them out themselves, "
            "got others: give the whole dataset"
        )
    return indices


def in_equal_shares(
    batch: Batch, compute: Callable[[Batch], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Columns that `compute` finds for the samples of a batch, the work shared out evenly.

    Every process must call, with samples of its own or with none. Those that have more than their
    share send the samples that are too many to those that have fewer, which send the results back.

    Args:
        batch: of this process.
        compute: columns with a row for each sample of a batch, on the CPU; not called without
            samples.

    Returns:
        The columns of the samples of `batch`; none where it has no samples.
    """
    rank, world = rank_and_world()
    if world == 1:
        return compute(batch) if batch.indices else {}
    shape = tuple(batch.inputs.shape[1:])
    theirs = gather({"held": [(batch.indices, batch.labels.tolist(), shape)]})["held"]
    moves = _moves([len(indices) for indices, *_ in theirs])
    kept = len(batch.indices) - sum(len(rows) for source, _, rows in moves if source == rank)
    parts = [Batch(batch.indices[:kept], batch.inputs[:kept], batch.labels[:kept])]
    transfers = []
    for source, target, rows in moves:
        some = slice(rows.start, rows.stop)
        if source == rank:
            images = batch.inputs[some].contiguous()
            transfers.append(P2POp(torch.distributed.isend, images, target))
        elif target == rank:
            indices, labels, shape = theirs[source]
            images = batch.inputs.new_empty((len(rows), *shape))
            transfers.append(P2POp(torch.distributed.irecv, images, source))
            parts.append(Batch(indices[some], images, batch.labels.new_tensor(labels[some])))
    for work in torch.distributed.batch_isend_irecv(transfers) if transfers else []:
        work.wait()
    own = Batch(
        [index for part in parts for index in part.indices],
        torch.cat([part.inputs for part in parts]) if len(parts) > 1 else parts[0].inputs,
        torch.cat([part.labels for part in parts]),
    )
    columns = compute(own) if own.indices else {}
    if not moves:
        return columns
    others = gather({"back": [{name: values[kept:] for name, values in columns.items()}]})["back"]
    found = [{name: values[:kept] for name, values in columns.items()}] if kept else []
    sent_to = [0] * world  # rows that each process has sent back so far, in the order of the moves
    for source, target, rows in moves:
        start, sent_to[target] = sent_to[target], sent_to[target] + len(rows)
        if source == rank:
            back = others[target]
            found.append({name: v[start : start + len(rows)] for name, v in back.items()})
    return {name: torch.cat([part[name] for part in found]) for name in (found or [{}])[0]}


def _moves(counts: Sequence[int]) -> list[tuple[int, int, range]]:
    """Source, target and the source's rows that it sends; then all have as many, or one more."""
    share, more = divmod(sum(counts), len(counts))
    by_count = sorted(range(len(counts)), key=lambda rank: -counts[rank])
    goal = {rank: share + (place < more) for place, rank in enumerate(by_count)}
    free = {rank: goal[rank] - count for rank, count in enumerate(counts) if count < goal[rank]}
    moves = []
    for source, count in enumerate(counts):
        start = goal[source]
        while start < count:
            target = next(iter(free))
            size = min(free[target], count - start)
            moves.append((source, target, range(start, start + size)))
            start, free[target] = start + size, free[target] - size
            if not free[target]:
                del free[target]
    return moves
