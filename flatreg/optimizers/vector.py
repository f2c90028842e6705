"""All parameters as one vector held in many tensors: norms, inner products, displacement.

Works on plain tensors and on the DTensors of FSDP2: what is elementwise runs on the shards held
here, what is a sum runs over all shards. No value is read by the host, except on the CPU, where
reading one costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from flatreg.models.precision import at_least_float32

Vector = Sequence[Tensor]
_BLOCK = 1 << 18  # 1 MiB of float32
_BUCKET = 25 << 20  # bytes


def shards(vector: Vector) -> list[Tensor]:
    """Memory that this process holds: the local shards of DTensors, other tensors themselves."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in vector]


def is_sharded(vector: Vector) -> bool:
    """Whether any part is a DTensor, as under FSDP2."""
    return any(isinstance(t, DTensor) for t in vector)


def as_sharded(shard: Tensor, whole: Tensor) -> Tensor:
    """A shard held here as the DTensor that `whole` is; the shard itself where it is none."""
    if not isinstance(whole, DTensor):
        return shard
    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(shard, mesh, placements, shape=whole.shape, stride=whole.stride())


def refuse_sparse(gradients: Sequence[Tensor | None]) -> None:
    """Refuse sparse gradients.

    Raises:
        ValueError: one is.
    """
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        raise ValueError(
            "sharpness-aware steps need dense gradients, got sparse ones: write sparse=False, or "
            "give these weights, as of an embedding, to an optimizer of their own"
        )


def average_whole(vector: Vector, weights: Vector) -> None:
    """Average in place, where some weights are sharded, the tensors that are whole.

    FSDP2 reduces the gradients of what it shards alone. Those of other parameters are each
    process's own until the loop averages them, but the perturbation must be one for all.
    """
    first = next((w for w in weights if isinstance(w, DTensor)), None)
    if first is None:
        return
    mesh = first.device_mesh
    whole = [tensor for tensor in vector if not isinstance(tensor, DTensor)]
    for dim in range(mesh.ndim):
        average_over(whole, mesh.get_group(dim))


def average_over(tensors: Vector, group: Any) -> None:
    """Average in place over the processes of a group, with one collective for 25 MiB, as DDP.

    Of two processes the result is that of averaging each tensor by itself; of more, the order in
    which a collective adds depends on the place in the buffer, and so the last bit.
    """
    world = dist.get_world_size(group)
    pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    def finish() -> None:
        work, flat, parts = pending.pop(0)
        work.wait()
        if flat is not parts[0]:
            pieces = torch.split(flat, [part.numel() for part in parts])
            torch._foreach_copy_(
                parts, [p.view(t.shape) for p, t in zip(pieces, parts, strict=True)]
            )

    for parts in _buckets(tensors):
        alone = len(parts) == 1 and (parts[0].is_sparse or parts[0].is_contiguous())
        flat = parts[0] if alone else torch.cat([part.reshape(-1) for part in parts])
        work = dist.all_reduce(flat.div_(world), group=group, async_op=True)
        pending.append((work, flat, parts))
        if len(pending) > 1:  # one on the way while the next is put together: no more memory
            finish()
    while pending:
        finish()


def _buckets(tensors: Vector) -> Iterator[list[Tensor]]:
    """Tensors of one type that are sent together; sparse ones by themselves."""
    dense: list[Tensor] = []
    for tensor in tensors:
        if tensor.is_sparse:
            yield [tensor]
        else:
            dense.append(tensor)
    for indices in _by_kind(dense).values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in (dense[i] for i in indices):
            bytes_ = tensor.numel() * tensor.element_size()
            if bucket and size + bytes_ > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += bytes_
        yield bucket


def norm(vector: Vector) -> Tensor:
    """L2 norm, 0-d and real, in float32 at least: half-precision gradients would overflow theirs.

    Raises:
        ValueError: the vector is empty.
    """
    if not vector:
        raise ValueError("a norm needs at least one tensor, got none")
    return norm_of_norms(norms(shards(vector)), vector)


def norms(held: Vector) -> list[Tensor]:
    """L2 norm of each tensor held here, in float32 at least."""
    found: list[Tensor] = [held[0]] * len(held)
    for (_, dtype), indices in _by_kind(held).items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        values = torch._foreach_norm([held[i] for i in indices], 2, wide)
        for i, value in zip(indices, values, strict=True):
            found[i] = value
    return found


def norm_of_norms(norms: Sequence[Tensor], vector: Vector) -> Tensor:
    """Norm of a vector from the norms of the tensors or shards held here."""
    if is_sharded(vector):
        return _sum_over_shards([n.square() for n in norms], vector).sqrt()
    return torch._foreach_norm([torch.stack([n.to(norms[0].device) for n in norms])])[0]


def inner(a: Vector, b: Vector) -> Tensor:
    """Inner product Re <a, b>, 0-d and real, in float32 at least."""
    pairs = zip(*(map(at_least_float32, shards(v)) for v in (a, b)), strict=True)  # one at a time
    return _sum_over_shards([(x.conj() * y).real.sum() for x, y in pairs], a)


def _sum_over_shards(parts: Sequence[Tensor], vector: Vector) -> Tensor:
    """Sum of one number a tensor, of the shards held here, over all shards of all tensors."""
    sums: dict[Any, Tensor] = {}
    device = parts[0].device
    for part, tensor in zip(parts, vector, strict=True):
        kind = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        value = part.to(device, torch.promote_types(part.dtype, torch.float32))
        sums[kind] = sums[kind] + value if kind in sums else value
    whole: list[Tensor] = []
    for kind, value in sums.items():
        if kind is None:  # held whole, on every process
            whole.append(value)
            continue
        mesh, placements = kind
        reduced = [p if p.is_replicate() else Partial() for p in placements]
        whole.append(DTensor.from_local(value, mesh, reduced).full_tensor())
    return torch.stack(whole).sum()


def safe_inverse(value: Tensor) -> Tensor:
    """1/value, and 0 where that is no positive finite number (no gradient, or an overflow)."""
    inverse = 1 / value
    return torch.where(inverse.isfinite() & (inverse > 0), inverse, 0.0)


def chunks(vector: Vector) -> Iterator[slice]:
    """Cut into runs no larger than the largest tensor, so that temporaries stay that small."""
    limit = max((t.numel() for t in vector), default=0)
    start, size = 0, 0
    for i, tensor in enumerate(vector):
        if size + tensor.numel() > limit:
            yield slice(start, i)
            start, size = i, 0
        size += tensor.numel()
    if vector:
        yield slice(start, len(vector))


def displace(
    weights: Vector,
    directions: Vector,
    scales: Sequence[Tensor],
    saved: list[tuple[Tensor, Tensor]],
    *,
    foreach: bool | None = None,
) -> None:
    """Add `scale * direction` to each weight and append `(weight, its value before)` to `saved`.

    The value before goes to the memory of the direction, which is used up: beyond the two no more
    than the largest tensor is allocated. A scale of zero does not move its weight, whatever the
    direction holds. `saved` is complete at every moment, so that `undo` works also on a
    displacement that was cut off.

    Args:
        weights: to displace; no DTensors, their shards.
        directions: the same shapes and types.
        scales: 0-d, one for each weight.
        saved: is appended to.
        foreach: few large kernels, as on an accelerator; by default wherever the CPU is not.
    """
    if foreach is None:
        foreach = weights[0].device.type != "cpu"
    if not foreach:
        for weight, direction, scale in zip(weights, directions, scales, strict=True):
            if float(scale) != 0:
                for w, d in _blocks(weight, direction):
                    saved.append((w, w.clone()))
                    w.addcmul_(d, scale)
                    saved[-1] = (w, d.copy_(saved[-1][1]))
        return
    for part in chunks(weights):
        ws, ds, ss = list(weights[part]), list(directions[part]), list(scales[part])
        for direction, scale in zip(ds, ss, strict=True):
            direction.masked_fill_(scale == 0, 0)  # an overflow: 0 * inf would be nan
        if all(s is ss[0] for s in ss):
            torch._foreach_mul_(ds, ss[0])
        else:
            torch._foreach_mul_(ds, ss)
        before = torch._foreach_mul(ws, 1.0)
        saved += zip(ws, before, strict=True)
        torch._foreach_add_(ws, ds)
        torch._foreach_copy_(ds, before)
        saved[-len(ws) :] = zip(ws, ds, strict=True)
        del before  # or it would live beside that of the next chunk


def undo(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Undo `displace`, bit for bit; subtracting would drift in bf16, 7e-4 in 20 steps at lr 0.

    Beside the pairs of `displace`, `saved` may have a DTensor with its shard of before: FSDP2 pads
    uneven shards in their first forward, in a copy up to torch 2.7 at least, which gets the values.
    """
    shards_before = [(w, b) for w, b in saved if isinstance(w, DTensor)]
    # The last first: of two parameters in one memory, the second was saved displaced by the first.
    moved = [(w, b) for w, b in reversed(saved) if not isinstance(w, DTensor)]
    if moved:
        weights, values = zip(*moved, strict=True)
        torch._foreach_copy_(list(weights), list(values))
    for whole, before in shards_before:
        if (now := whole.to_local()).data_ptr() != before.data_ptr():
            now.copy_(before)


def _blocks(weight: Tensor, direction: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Pieces that stay in the cache of a CPU between the operations on them."""
    small = weight.numel() <= _BLOCK
    if small or not (weight.is_contiguous() and direction.is_contiguous()):
        return [(weight, direction)]
    pieces = torch.split(weight.view(-1), _BLOCK), torch.split(direction.view(-1), _BLOCK)
    return zip(*pieces, strict=True)


def _by_kind(vector: Vector) -> dict[Any, list[int]]:
    kinds: dict[Any, list[int]] = {}
    for i, tensor in enumerate(vector):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    return kinds
