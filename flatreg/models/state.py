"""State of a model that a pass changes, and how it is put back: modes, buffers, random streams."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Buffers = dict[nn.Module, dict[str, Tensor | None]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, then give every submodule its own mode back.

    Raises:
        ValueError: the model is an exported program, whose mode can neither be read nor set.
    """
    modes = modes_of(model)
    try:
        try:
            model.eval()
        except NotImplementedError as error:
            raise ValueError(
                "expected a module with an eval mode, an exported program keeps the mode it was "
                "exported in: give the module it was exported from"
            ) from error
        yield
    finally:
        # Up to torch 2.7 at least it keeps casts made without gradients: weights would get none.
        torch.clear_autocast_cache()
        put_modes(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Modules with whether they train; a frozen one of TorchScript never does, and says nothing."""
    return [(module, module.training) for module in model.modules() if hasattr(module, "training")]


def put_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Give modules their modes; their own `train` drops what they kept, as LeViT its biases."""
    for module, training in modes:
        if getattr(module.train, "__func__", None) is not nn.Module.train:
            with suppress(NotImplementedError):  # of an exported program
                module.train(training)
    for module, training in modes:
        module.training = training


@contextmanager
def kept_buffers(model: nn.Module, start: Buffers | None = None) -> Iterator[None]:
    """Run passes on copies of the buffers, of those in `start` if given: none of them moves.

    Nor do tensors that are plain attributes of modules; with `start`, nor do numbers.

    In train mode BatchNorm's output does not depend on its running statistics, so a pass on copies
    gives the same, bit for bit. Copies are exchanged for the buffers, not their values: a graph may
    hold a buffer, and a write would spoil its backward pass.
    """
    # A count of passes is right in an attack: only of passes that are repeated is each one pass.
    found, plain = buffers_of(model), PlainState(model, numbers=start is not None)
    put_buffers(copied(found if start is None else start))
    try:
        yield
    finally:
        plain.put()
        put_buffers(found)


_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


class PlainState:
    """Numbers, and tensors without a graph, that modules hold as attributes and not as buffers.

    As a count of passes that a forward makes. Modules of torch itself keep nothing so.
    """

    def __init__(self, model: nn.Module, *, numbers: bool = True) -> None:
        self._numbers = numbers
        modules = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
        self._found = [
            (own, set(own), {n: _recorded(v) for n in set(own) - _OWN if self._holds(v := own[n])})
            for own in map(vars, modules)
        ]

    def put(self) -> None:
        """Give all their values of then, and take away what a pass has made."""
        anew: dict[int, Tensor] = {}  # a tensor that two modules share stays one
        for own, names, values in self._found:
            for name in own.keys() - names:
                if self._holds(own[name]):
                    del own[name]
            for name, (value, place, copy) in values.items():
                if place is not None and place_of(value) != place:
                    value = anew.setdefault(id(value), copy.clone())
                own[name] = value

    def _holds(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return not value.requires_grad and not is_lazy(value)
        return self._numbers and isinstance(value, int | float)


def _recorded(value: Any) -> tuple[Any, Any, Any]:
    written = isinstance(value, Tensor)
    return (value, place_of(value), value.clone()) if written else (value, None, None)


def place_of(tensor: Tensor) -> tuple[int, int]:
    """What changes where a tensor is written to, or its `.data` set; not by `.data.mul_()`."""
    version = 0 if tensor.is_inference() else tensor._version
    # A sparse tensor has no memory of its own.
    return version, tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


def buffers_of(model: nn.Module) -> Buffers:
    """The buffers of all modules of a model."""
    return {module: dict(module._buffers.items()) for module in model.modules()}


def copied(buffers: Buffers) -> Buffers:
    """Copies of the buffers, for a pass that must not write to them."""
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays one

    def copy(buffer: Tensor) -> Tensor:
        if id(buffer) not in copies:
            # A buffer that requires grad gets its gradient through the copy. A lazy one has no
            # value yet: the first pass makes it, and the others run on copies of that.
            bare = buffer.requires_grad or is_lazy(buffer)
            own = buffer if bare else buffer.detach()
            copies[id(buffer)] = own if is_lazy(buffer) else own.clone()
        return copies[id(buffer)]

    return {
        module: {name: None if b is None else copy(b) for name, b in own.items()}
        for module, own in buffers.items()
    }


def put_buffers(buffers: Buffers) -> None:
    """Give the modules these buffers, and take away what else a pass has registered."""
    for module, own in buffers.items():
        now = module._buffers
        for name in set(now.keys()) - set(own):  # TorchScript's is no dict, but has keys
            del now[name]  # a pass has registered it
        for name, buffer in own.items():
            now[name] = buffer


class HasParameters(Protocol):
    """A model, or an optimizer that says which parameters are its own."""

    def parameters(self) -> Iterable[Tensor]:
        """The parameters, on whose devices random numbers may be drawn."""


class RandomStreams(NamedTuple):
    """States of the generators that a pass can draw from.

    Those of torch on the CPU and on the devices of the parameters, numpy's and Python's.
    """

    cpu: Tensor
    on_device: dict[torch.device, Tensor]
    numpy: Any
    python: Any

    def put_back(self) -> None:
        """Let the generators go on from these states."""
        for device, state in self.on_device.items():
            torch.get_device_module(device).set_rng_state(state, device)
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def are(self, other: RandomStreams) -> bool:
        """Whether no generator has moved between the two."""
        pairs = [(self.cpu, other.cpu)]
        pairs += [(state, other.on_device[d]) for d, state in self.on_device.items()]
        return (
            all(torch.equal(a, b) for a, b in pairs)
            and self.python == other.python
            and self.numpy[2:] == other.numpy[2:]
            and np.array_equal(self.numpy[1], other.numpy[1])
        )


def random_streams(model: HasParameters) -> RandomStreams:
    """The states as they are now."""
    on_device = {d: torch.get_device_module(d).get_rng_state(d) for d in accelerators(model)}
    return RandomStreams(torch.get_rng_state(), on_device, np.random.get_state(), random.getstate())


def accelerators(model: HasParameters) -> list[torch.device]:
    """Devices of the parameters that have a random generator of their own, in one order."""
    found = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    return sorted(found, key=str)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` in eval mode and leave modes, buffers and random streams as they were.

    A caller's `inference_mode` is left meanwhile: no graph can be built in it.
    """
    streams = random_streams(model)
    within = torch.is_inference_mode_enabled()
    try:
        with torch.inference_mode(False) if within else nullcontext():
            with evaluation_mode(model), kept_buffers(model):
                yield
    finally:
        streams.put_back()


@contextmanager
def kept_gradients(model: nn.Module) -> Iterator[None]:
    """Leave `.grad` and `requires_grad` of the parameters as they were, whatever runs backward."""
    leaves = [weight for weight in model.parameters() if weight.is_leaf]  # others have no .grad
    before = [(weight, weight.grad, weight.requires_grad) for weight in leaves]
    for weight, *_ in before:
        weight.grad = None  # a backward pass adds to what is there
    try:
        yield
    finally:
        for weight, gradient, required in before:
            weight.requires_grad_(required).grad = gradient


def derived_seed(*keys: int) -> int:
    """Independent seed for each combination of keys."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
