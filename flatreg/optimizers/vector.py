"""All parameters as one vector held in many tensors: norms, inner products, displacement.

Works on plain tensors and on the DTensors of FSDP2: what is elementwise runs on the shards held
here, what is a sum runs over all shards. No value is read by the host, except on the CPU, where
reading one costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import get_total_norm

Vector = Sequence[Tensor]
_BLOCK = 1 << 18  # 1 MiB of float32


def shards(vector: Vector) -> list[Tensor]:
    """Memory that this process holds: the local shards of DTensors, other tensors themselves."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in vector]


def is_sharded(vector: Vector) -> bool:
    """Whether any part is a DTensor, as under FSDP2."""
    return any(isinstance(t, DTensor) for t in vector)


def norm(vector: Vector) -> Tensor:
    """L2 norm, 0-d, in float32 at least: scaled half-precision gradients overflow their own type.

    Raises:
        ValueError: the vector is empty.
    """
    if not vector:
        raise ValueError("a norm needs at least one tensor, got none")
    if is_sharded(vector):
        total = _whole(get_total_norm(vector))
        return total.to(torch.promote_types(total.dtype, torch.float32))
    parts: list[Tensor] = []
    for tensors in _by_kind(vector).values():
        half = tensors[0].dtype in (torch.float16, torch.bfloat16)
        parts += torch._foreach_norm(tensors, 2, torch.float32 if half else None)
    total = torch.stack([part.to(parts[0].device) for part in parts])
    return torch._foreach_norm([total])[0]


def norm_of_shards(norms: Sequence[Tensor], vector: Vector) -> Tensor:
    """Norm of a vector from the norms of the shards held here."""
    squared = torch.stack([n.to(norms[0].device) for n in norms]).square().sum()
    first = next((t for t in vector if isinstance(t, DTensor)), None)
    if first is not None:
        kinds = [Partial() if p.is_shard() else p for p in first.placements]
        squared = DTensor.from_local(squared, first.device_mesh, kinds).full_tensor()
    return squared.sqrt()


def inner(a: Vector, b: Vector) -> Tensor:
    """Inner product, 0-d, in float32 at least."""
    products = [_whole((x * y).sum()) for x, y in zip(a, b, strict=True)]
    wide = [p.to(products[0].device, torch.promote_types(p.dtype, torch.float32)) for p in products]
    return torch.stack(wide).sum()


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
    """Undo `displace`, bit for bit; subtracting would drift in bf16, 7e-4 in 20 steps at lr 0."""
    if saved:
        weights, before = zip(*saved, strict=True)
        torch._foreach_copy_(list(weights), list(before))


def _blocks(weight: Tensor, direction: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Pieces that stay in the cache of a CPU between the operations on them."""
    small = weight.numel() <= _BLOCK
    if small or not (weight.is_contiguous() and direction.is_contiguous()):
        return [(weight, direction)]
    pieces = torch.split(weight.view(-1), _BLOCK), torch.split(direction.view(-1), _BLOCK)
    return zip(*pieces, strict=True)


def _by_kind(vector: Vector) -> dict[Any, list[Tensor]]:
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in vector:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return kinds


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
