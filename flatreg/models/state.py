"""State of a model that a pass changes, and how it is put back: modes, buffers, random streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, then give every submodule its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by batch statistics as in training, but move no buffer of a normalisation.

    Switching `track_running_stats` off leaves the outputs of a BatchNorm in train mode
    bit-identical and keeps all buffers; `momentum=0` would still advance `num_batches_tracked`.
    An InstanceNorm updates whatever buffers it has, so it has none meanwhile.
    """
    batch = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    instance = [
        (m, m.running_mean, m.running_var)
        for m in model.modules()
        if isinstance(m, _InstanceNorm) and m.track_running_stats and m.training
    ]
    try:
        for module in batch:
            module.track_running_stats = False
        for other, _, _ in instance:
            other.running_mean = other.running_var = None
        yield
    finally:
        for module in batch:
            module.track_running_stats = True
        for other, mean, variance in instance:
            other.running_mean, other.running_var = mean, variance


class HasParameters(Protocol):
    """A model, or an optimizer that says which parameters are its own."""

    def parameters(self) -> Iterable[Tensor]:
        """The parameters, on whose devices random numbers may be drawn."""


def record_rng(model: HasParameters) -> Callable[[], None]:
    """Record the random streams a pass can draw from; calling the result puts them back.

    Covers torch's generators on the CPU and on the devices of the parameters, numpy's and Python's.
    """
    on_device = [(d, torch.get_device_module(d).get_rng_state(d)) for d in _accelerators(model)]
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def restore() -> None:
        for device, state in on_device:
            torch.get_device_module(device).set_rng_state(state, device)
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return restore


def random_streams(model: HasParameters) -> list[Tensor]:
    """States of torch's generators that `record_rng` records, to compare."""
    devices = sorted(_accelerators(model), key=str)
    on_device = [torch.get_device_module(d).get_rng_state(d) for d in devices]
    return [torch.get_rng_state(), *on_device]


def seed_streams(model: nn.Module, seed: int) -> None:
    """Seed torch's generators that `record_rng` records, and no other device's."""
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        module = torch.get_device_module(device)
        with getattr(module, "device", nullcontext)(device):  # MPS has one device, and no context
            module.manual_seed(seed)


def _accelerators(model: HasParameters) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}


def record_buffers(model: nn.Module) -> Callable[[], None]:
    """Record what a forward may count or calibrate; calling the result puts it back."""
    recorded = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def restore() -> None:
        with torch.no_grad():
            for module, name, buffer, values in recorded:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
                module._buffers[name] = buffer

    return restore


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` in eval mode and leave modes, buffers and random streams as they were."""
    restore_rng, restore_buffers = record_rng(model), record_buffers(model)
    try:
        with evaluation_mode(model):
            yield
    finally:
        restore_buffers()
        restore_rng()


def derived_seed(*keys: int) -> int:
    """Independent seed for each combination of keys."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
