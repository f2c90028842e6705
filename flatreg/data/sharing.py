"""The work on a batch, shared out evenly among the processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import P2POp

from flatreg.data.loading import Batch, gather, rank_and_world


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
