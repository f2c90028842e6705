"""Gradient synchronisation between processes: held back, or done by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper of `model`, also inside a compiled module."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Leave gradients local within, forward and backward; nothing to do without DDP."""
    ddp = find_ddp(model)
    if ddp is None or is_bypassed(ddp):
        yield
    elif not ddp.static_graph:
        with ddp.no_sync():
            yield
    else:
        # A static graph counts the gradients that arrive in its first synchronised backward pass
        # and expects as many ever after: local passes go past it, forward and backward.
        ddp.__dict__["forward"] = ddp.module.__call__
        try:
            yield
        finally:
            del ddp.__dict__["forward"]


def will_sync(model: nn.Module) -> bool:
    """Whether DDP would average the gradients of a backward pass taken now."""
    ddp = find_ddp(model)
    return ddp is not None and bool(ddp.require_backward_grad_sync) and not is_bypassed(ddp)


def is_bypassed(model: nn.Module) -> bool:
    """Whether passes go past a DDP with a static graph, within `without_sync`."""
    ddp = find_ddp(model)
    return ddp is not None and "forward" in ddp.__dict__


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
