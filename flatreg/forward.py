"""One forward pass as a record: what a term may read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatreg.heads import Head
from flatreg.isolation import frozen_statistics


def local_module(model: nn.Module) -> nn.Module:
    """Strip DDP: auxiliary passes and attacks must not arm its reducer or broadcast buffers."""
    return local_module(model.module) if isinstance(model, DistributedDataParallel) else model


@dataclass(frozen=True, eq=False)
class Forward:
    """One pass of a batch through a model.

    Attributes:
        model: the module itself, never its DDP wrapper.
        inputs: `(batch, ...)`; part of the graph when a term declares that it needs
            `"input_gradient"`.
        labels: `(batch,)` class indices.
        logits: `(batch, classes)`.
        head: the last linear map, when a term declares that it needs `"features"`.
        captured: input of the head in this pass; read it as `features`.
        precision: autocast as the head saw it.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    logits: Tensor
    head: Head | None = None
    captured: Tensor | None = None
    precision: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def features(self) -> Tensor:
        """Input of the head `(batch, features)`.

        Raises:
            ValueError: the pass captured none.
        """
        if self.captured is None:
            raise ValueError(
                'this pass captured no features: a term that reads them has "features" in its needs'
            )
        return self.captured

    @property
    def weight(self) -> Tensor:
        """Weight of the head `(classes, features)`.

        Raises:
            ValueError: the pass knows no head.
        """
        if self.head is None:
            raise ValueError(
                'this pass knows no head: a term that reads it has "features" in its needs'
            )
        return self.head.weight

    def at(self, inputs: Tensor) -> Forward:
        """Pass other inputs, of the same labels, moving no BatchNorm statistics."""
        with frozen_statistics(self.model):
            return run_forward(self.model, inputs, self.labels, self.head)

    def logits_at(self, inputs: Tensor) -> Tensor:
        """Logits at other inputs, by an auxiliary pass that moves no BatchNorm statistics."""
        with frozen_statistics(self.model):
            logits: Tensor = self.model(inputs)
        return logits

    def through_head(self) -> Forward:
        """The same pass with the head evaluated anew, at the weights it has now."""
        if self.head is None:
            return self
        with self.precision():
            logits: Tensor = self.head.layer(self.features)
        return replace(self, logits=logits.to(self.logits.dtype))


def run_forward(
    model: nn.Module, inputs: Tensor, labels: Tensor, head: Head | None = None
) -> Forward:
    """Pass a batch through `model` (a DDP wrapper too), capturing the input of `head` on the way.

    Raises:
        ValueError: the head was not called exactly once.
    """
    calls: list[tuple[Tensor, Callable[[], AbstractContextManager[None]]]] = []
    hook = head and head.layer.register_forward_pre_hook(
        lambda _, args: calls.append((args[0], _autocast_now(args[0].device.type)))
    )
    try:
        logits = model(inputs)
    finally:
        if hook:
            hook.remove()
    if head and len(calls) != 1:
        raise ValueError(
            f"the head {head.name!r} must run once in a pass, it ran {len(calls)} times"
        )
    captured, precision = calls[0] if calls else (None, nullcontext)
    return Forward(local_module(model), inputs, labels, logits, head, captured, precision)


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[None]]:
    """Make the autocast context that is on now; without its cache of weights, which may move."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)
