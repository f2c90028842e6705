"""State of a model that a pass changes, and how it is put back: modes, buffers, random streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatreg.models.compiled import is_compiled

Buffers = dict[nn.Module, dict[str, Tensor | None]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, then give every submodule its own mode back.

    Raises:
        ValueError: the model is an exported program, whose mode can neither be read nor set.
    """
    # A frozen module of TorchScript is in eval mode for good, and does not say so.
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
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
        for module, training in modes:
            module.training = training


@contextmanager
def kept_buffers(model: nn.Module, start: Buffers | None = None) -> Iterator[None]:
    """Run passes on copies of the buffers, of those in `start` if given: none of them moves.

    In train mode BatchNorm's output does not depend on its running statistics, so a pass on copies
    gives the same, bit for bit. Copies are exchanged for the buffers, not their values: a graph may
    hold a buffer, and a write would spoil its backward pass.
    """
    found = _buffers(model)
    _put(_copied(found if start is None else start))
    try:
        yield
    finally:
        _put(found)


def record_buffers(model: nn.Module) -> Callable[[], None]:
    """Record the values of the buffers; calling the result puts them back."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)

    return restore


def _buffers(model: nn.Module) -> Buffers:
    return {m: dict(m._buffers.items()) for m in model.modules() if len(m._buffers)}


def _copied(buffers: Buffers) -> Buffers:
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays one
    return {
        module: {
            name: None if b is None else copies.setdefault(id(b), b.detach().clone())
            for name, b in own.items()
        }
        for module, own in buffers.items()
    }


def _put(buffers: Buffers) -> None:
    for module, own in buffers.items():
        for name, buffer in own.items():
            module._buffers[name] = buffer


class HasParameters(Protocol):
    """A model, or an optimizer that says which parameters are its own."""

    def parameters(self) -> Iterable[Tensor]:
        """The parameters, on whose devices random numbers may be drawn."""


def record_rng(model: HasParameters) -> Callable[[], None]:
    """Record the random streams a pass can draw from; calling the result puts them back.

    Covers torch's generators on the CPU and on the devices of the parameters, numpy's and Python's.
    """
    streams = random_streams(model)

    def restore() -> None:
        for device, state in streams.on_device.items():
            torch.get_device_module(device).set_rng_state(state, device)
        torch.set_rng_state(streams.cpu)
        np.random.set_state(streams.numpy)
        random.setstate(streams.python)

    return restore


class RandomStreams(NamedTuple):
    """States of the generators that `record_rng` covers."""

    cpu: Tensor
    on_device: dict[torch.device, Tensor]
    numpy: Any
    python: Any

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
    on_device = {d: torch.get_device_module(d).get_rng_state(d) for d in _accelerators(model)}
    return RandomStreams(torch.get_rng_state(), on_device, np.random.get_state(), random.getstate())


def seed_streams(model: nn.Module, seed: int) -> None:
    """Seed torch's generators that `record_rng` records, and no other device's."""
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        module = torch.get_device_module(device)
        with getattr(module, "device", nullcontext)(device):  # MPS has one device, and no context
            module.manual_seed(seed)


def _accelerators(model: HasParameters) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` in eval mode and leave modes, buffers and random streams as they were."""
    restore_rng = record_rng(model)
    try:
        with evaluation_mode(model), kept_buffers(model):
            yield
    finally:
        restore_rng()


class PassStart:
    """Where a pass of `model` starts: its random streams and buffers as they are now.

    Two passes that are compared must start at one place, or their difference is not that of what
    was moved between them: dropout and stochastic depth draw other masks, spectral norm has other
    vectors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.replay = record_rng(model)
        self._streams = random_streams(model)
        self._buffers = _copied(_buffers(model))
        self.drew = False

    def ends(self) -> None:
        """Say that the pass has been made: `drew` is then whether it drew random numbers."""
        self.drew = not self._streams.are(random_streams(self.model))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run a pass from the start; streams and buffers are afterwards as they were before it."""
        go_on = record_rng(self.model)
        self.replay()
        try:
            with kept_buffers(self.model, self._buffers):
                yield
        finally:
            go_on()

    @contextmanager
    def holds(self) -> Iterator[None]:
        """Let what a backward pass within runs forward anew (checkpointing) start from the start.

        Checkpointing replays the random streams, but not the buffers.
        """
        hooks = self._hold(None)
        try:
            yield
        finally:
            _remove(hooks)

    def holds_in_backward_of(self, total: Tensor) -> None:
        """Let the same hold in the backward passes from `total`."""
        in_backward_of(total, self._hold)

    def _hold(self, task: int | None) -> list[RemovableHandle]:
        """Hooks that exchange the buffers of a module while it runs in backward pass `task`."""
        found: dict[nn.Module, list[Buffers]] = {}
        hooks: list[RemovableHandle] = []

        def before(module: nn.Module, args: Any) -> None:
            if _runs_in(task, hooks):
                found.setdefault(module, []).append({module: dict(module._buffers)})
                _put(_copied({module: self._buffers[module]}))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if found.get(module):
                _put(found[module].pop())

        if not is_compiled(self.model):  # a compiled graph holds the passes that it runs anew
            for module in self._buffers:
                hooks.append(module.register_forward_pre_hook(before, prepend=True))
                hooks.append(module.register_forward_hook(after, always_call=True))
        return hooks


def in_backward_of(tensor: Tensor, hooks_for: Callable[[int], list[RemovableHandle]]) -> None:
    """Set hooks on modules while a backward pass goes from `tensor` on, whose number they get."""

    def begin(_: Tensor) -> None:
        hooks = hooks_for(torch._C._current_graph_task_id())
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _remove(hooks))

    if tensor.requires_grad:
        tensor.register_hook(begin)  # type: ignore[no-untyped-call]


def refuse_forward_in_backward_of(tensor: Tensor, modules: Sequence[nn.Module], why: str) -> None:
    """Raise where a backward pass from `tensor` runs one of the modules forward anew.

    Raises:
        ValueError: in that backward pass, `why`.
    """

    def hooks_for(task: int) -> list[RemovableHandle]:
        def refuse(module: nn.Module, args: Any) -> None:
            if _runs_in(task, hooks):
                raise ValueError(why)

        hooks = [module.register_forward_pre_hook(refuse) for module in modules]
        return hooks

    in_backward_of(tensor, hooks_for)


def _runs_in(task: int | None, hooks: list[RemovableHandle]) -> bool:
    """Whether a backward pass runs now: that of this number, or any."""
    now: int = torch._C._current_graph_task_id()
    if now == _NO_TASK and task is not None:
        _remove(hooks)  # an error cut that backward pass short, and these were left
    return now != _NO_TASK and now == (now if task is None else task)


_NO_TASK = -1  # what torch says outside of a backward pass


def _remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def derived_seed(*keys: int) -> int:
    """Independent seed for each combination of keys."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
