"""Models that run by torch.compile, and what its traces leave out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

_TRACED_HERE: WeakSet[nn.Module] = WeakSet()


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of `model` runs by torch.compile, wrapped or in place."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()
    )


def trace_anew(model: nn.Module) -> None:
    """Forget what torch.compile has traced so far, once for each model; nothing to do without it.

    A trace that was made before does not see hooks that are set later, and may give away buffers
    (see `graphs_last`). torch forgets the traces of all models, so others are compiled again too.
    """
    if is_compiled(model) and model not in _TRACED_HERE:
        torch.compiler.reset()
        _TRACED_HERE.add(model)


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
