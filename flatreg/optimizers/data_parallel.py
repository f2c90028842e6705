"""Gradient synchronisation between processes: held back, or done by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper of `model`, also inside a compiled module."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Leave gradients local within, forward and backward; nothing to do without DDP."""
    ddp = find_ddp(model)
    context: AbstractContextManager[None] = nullcontext() if ddp is None else ddp.no_sync()
    return context


def will_sync(model: nn.Module) -> bool:
    """Whether DDP would average the gradients of a backward pass taken now."""
    ddp = find_ddp(model)
    return ddp is not None and bool(ddp.require_backward_grad_sync)


def average(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Average in place over the processes of DDP; nothing to do without it."""
    ddp = find_ddp(model)
    if ddp is None:
        return
    world = dist.get_world_size(ddp.process_group)
    pending = [
        dist.all_reduce(t.div_(world), group=ddp.process_group, async_op=True) for t in tensors
    ]
    for work in pending:
        work.wait()


def average_gradients(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Average `.grad` over the processes of DDP, for gradients that were combined locally."""
    ddp = find_ddp(model)
    if ddp is None:
        return
    if ddp.find_unused_parameters:
        # All processes must reduce the same tensors: those that any of them has.
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        used = used.to(parameters[0].device)
        dist.all_reduce(used, group=ddp.process_group)
        for p, count in zip(parameters, used.tolist(), strict=True):
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)
    average(model, [p.grad for p in parameters if p.grad is not None])
    # As DDP does after a pass of its own: the next forward broadcasts BatchNorm's buffers.
    ddp.require_forward_param_sync = True
