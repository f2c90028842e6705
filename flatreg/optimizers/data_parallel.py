"""Gradient synchronisation between processes: held back, or done by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.nn.parallel import DistributedDataParallel

from flatreg.models.forward import ddp_of
from flatreg.optimizers.vector import average_over, is_sharded

# Engines that flatten, shard or offload parameters, and reduce gradients, in ways of their own.
_ENGINES = ("deepspeed", "fairscale", "colossalai", "megatron", "horovod")
_USE = "use DDP or FSDP2 (fully_shard; Accelerate's fsdp_version=2)"


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper of `model`, also inside a compiled module, Fabric's or Lightning's."""
    trainer = lightning_trainer(model)
    # DDP lies around the module that Lightning's user writes.
    return ddp_of(model if trainer is None else trainer.strategy.model)


def lightning_trainer(model: Any) -> Any:
    """Lightning's Trainer, while it trains `model`; None otherwise."""
    trainer = getattr(model, "_trainer", None) if hasattr(model, "manual_backward") else None
    return trainer if getattr(trainer, "training", False) else None


def lightning_precision(model: Any) -> Any:
    """What scales losses in Lightning, or in Fabric; None elsewhere."""
    trainer = lightning_trainer(model)
    if trainer is not None:
        return trainer.precision_plugin
    strategy = getattr(model, "_strategy", None) if hasattr(model, "_forward_module") else None
    return getattr(strategy, "precision", None)


def lightning_module(model: nn.Module | None, optimizer: Any) -> nn.Module | None:
    """The module that Lightning trains, where `model` is it or a part of it; None elsewhere."""
    active: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)  # around the loop
    candidates = [model, getattr(active, "module", None)]
    with suppress(ReferenceError):  # after the training, the strategy is gone
        strategy = getattr(optimizer, "_strategy", None)  # of what self.optimizers() returns
        candidates.append(getattr(strategy, "lightning_module", None))
    return next((m for m in candidates if lightning_trainer(m) is not None), None)


def refuse_engine_of(part: Any) -> None:
    """Refuse a module or an optimizer of an engine that owns what it needs.

    Raises:
        ValueError: its class, or one that it derives from, is such an engine's.
    """
    kind: type = type(part)
    engine = _engine_of(kind)
    if engine is not None:
        raise ValueError(f"{engine} owns the parameters and the backward pass: {_USE}")


@lru_cache
def _engine_of(kind: type) -> str | None:
    packages = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((package for package in packages if package in _ENGINES), None)


def refuse_engines(model: nn.Module | None, parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that are flattened or sharded without DTensor.

    A norm over the pieces held here would be each process's own.

    Raises:
        ValueError: FSDP1, DeepSpeed, or another engine that owns parameters or the backward pass.
    """
    trainer = lightning_trainer(model)
    whole = model if trainer is None else trainer.strategy.model
    for module in () if whole is None else whole.modules():
        refuse_engine_of(module)
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(f"FSDP1 hands out flattened shards, not parameters: {_USE}")
    for p in parameters:
        if isinstance(p, FlatParameter) or hasattr(p, "_fsdp_flattened"):
            raise ValueError(f"FSDP1 hands out flattened shards, not parameters: {_USE}")
        if hasattr(p, "ds_id"):
            raise ValueError(f"deepspeed owns the parameters and the backward pass: {_USE}")


def is_of_an_engine(accelerator: Any) -> bool:
    """Whether an engine owns the backward pass of `accelerator`, and keeps the gradients."""
    kind = str(getattr(accelerator, "distributed_type", ""))
    return kind.endswith(("DEEPSPEED", "MEGATRON_LM"))


def refuse_unreached(
    parameters: Sequence[Tensor], model: nn.Module | None, accelerator: Any, *, perturbs: bool
) -> None:
    """Refuse parameters of an optimizer that a backward pass of `model` cannot have reached.

    Raises:
        ValueError: none has a gradient, and none is of the model: a step would change nothing.
    """
    trained = [p for p in parameters if p.requires_grad]
    reached = not trained or any(p.grad is not None for p in trained)
    if reached or model is None or is_of_an_engine(accelerator):
        return
    # Its strategy may be an engine; FSDP2 keeps gradients of shards that are not synchronised.
    if lightning_trainer(model) is not None or is_sharded(trained):
        return
    own = list(model.parameters())
    if not perturbs and {p.dtype for p in own} != {p.dtype for p in trained}:
        return  # copies in float32, to which the loop brings the gradients
    if not {id(p) for p in own} & {id(p) for p in trained}:
        raise ValueError(
            "the optimizer got no gradient, and none of its parameters is of the model: make it "
            "from the parameters of the model that the loss is of, after all changes of it"
        )


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


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, as the next forward of DDP would do first."""
    ddp = find_ddp(model)
    inner: Any = ddp  # torch leaves both untyped
    if ddp is not None and not is_bypassed(ddp) and inner._check_sync_bufs_pre_fwd():
        inner._sync_buffers()


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
    if ddp is not None:
        average_over(tensors, ddp.process_group)


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
