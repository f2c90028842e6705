"""Models that run by torch.compile, and what its traces leave out; models that FSDP2 shards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

_TRACED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of `model` runs by torch.compile, wrapped or in place."""
    return any(map(is_compiled_part, model.modules()))


def is_compiled_part(module: nn.Module) -> bool:
    """Whether torch.compile runs this very module."""
    return hasattr(module, "_orig_mod") or bool(getattr(module, "_compiled_call_impl", None))


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """Modules of `model` whose weights FSDP2 shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def trace_anew(model: nn.Module, reason: str) -> None:
    """Forget what torch.compile has traced so far, once for each model and reason.

    A trace that was made before does not see hooks that are set later, and may give away buffers
    (see `graphs_last`). torch forgets the traces of all models, so others are compiled again too.
    """
    known = _TRACED.setdefault(model, set())
    if reason not in known and is_compiled(model):
        torch.compiler.reset()
        known.add(reason)


def graphs_last(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, compile graphs that two backward passes may use.

    By default torch.compile lets the first backward pass write over what the forward pass saved
    ("donated buffers"), and refuses to keep the graph.
    """
    if not is_compiled(model):
        return nullcontext()
    import torch._functorch.config as config  # only where torch.compile is in use

    context: AbstractContextManager[Any] = config.patch(donated_buffer=False)
    return context
