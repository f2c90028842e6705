"""State of a model that a pass changes, and how it is put back: modes, buffers, random streams."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from flatreg.models.compiled import is_compiled_part, sharded_parts

Buffers = dict[nn.Module, dict[str, Tensor | None]]
is_second_pass = ContextVar("is_second_pass", default=False)


@contextmanager
def second_pass() -> Iterator[None]:
    """Say that passes within are on a batch that had a pass before, in the same step."""
    token = is_second_pass.set(True)
    try:
        yield
    finally:
        is_second_pass.reset(token)


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
    found, plain = _buffers(model), _PlainState(model, numbers=start is not None)
    _put(_copied(found if start is None else start))
    try:
        yield
    finally:
        plain.put()
        _put(found)


_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


class _PlainState:
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
                if place is not None and _place(value) != place:
                    value = anew.setdefault(id(value), copy.clone())
                own[name] = value

    def _holds(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return not value.requires_grad and not is_lazy(value)
        return self._numbers and isinstance(value, int | float)


def _recorded(value: Any) -> tuple[Any, Any, Any]:
    written = isinstance(value, Tensor)
    return (value, _place(value), value.clone()) if written else (value, None, None)


def _buffers(model: nn.Module) -> Buffers:
    return {module: dict(module._buffers.items()) for module in model.modules()}


def _copied(buffers: Buffers) -> Buffers:
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


def _put(buffers: Buffers) -> None:
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


class PassStart:
    """Where a pass of `model` starts: its random streams and buffers as they are now.

    Two passes that are compared must start at one place, or their difference is not that of what
    was moved between them: dropout and stochastic depth draw other masks, spectral norm has other
    vectors.

    Args:
        model: what runs in the pass.
        others: modules that run in it too.
        reads: whether to read the frozen weights, to see them move without a mark.
    """

    def __init__(self, model: nn.Module, *others: nn.Module, reads: bool = False) -> None:
        self.model = model if not others else nn.ModuleList([model, *others])
        self._streams = random_streams(self.model)
        self.replay = self._streams.put_back
        self.buffers = _copied(_buffers(self.model))
        self._plain = _PlainState(self.model)
        self.drew = False
        # FSDP2 itself gives gathered weights other memory in every pass.
        self._frozen = [
            (name, p)
            for part in (model, *others)
            for name, p in ([] if sharded_parts(part) else part.named_parameters())
            if not p.requires_grad and p.is_floating_point()
        ]
        self._reads = reads
        self._marks = self._marks_now()

    def _marks_now(self) -> list[Any]:
        """What changes where frozen weights move; `.data.mul_()` changes their length alone."""
        places = [_place(p) for _, p in self._frozen]
        if not (self._reads and places):
            return places
        weights, device = [p.detach() for _, p in self._frozen], self._frozen[0][1].device
        lengths = [  # one after the other: the wide copies of all would not fit
            torch.linalg.vector_norm(w if w.element_size() > 2 else w.float()) for w in weights
        ]
        found = torch.stack([length.float().to(device) for length in lengths]).tolist()
        return [(place, str(length)) for place, length in zip(places, found, strict=True)]

    def ends(self) -> None:
        """Say that the pass has been made: `drew` is then whether it drew random numbers."""
        self.drew = not self._streams.are(random_streams(self.model))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run a pass from the start; streams and buffers are afterwards as they were before it.

        Raises:
            ValueError: a parameter that takes no gradient has moved since the start, as a momentum
                encoder does that is updated in `forward`: this pass would move it once more.
        """
        for (name, _), now, before in zip(
            self._frozen, self._marks_now(), self._marks, strict=True
        ):
            if now != before:
                raise ValueError(
                    f"{name} takes no gradient, and forward moved it: a second pass of this batch "
                    "would move it twice; update it after optimizer.step()"
                )
        now = random_streams(self.model)
        self.replay()
        try:
            with kept_buffers(self.model, self.buffers):
                self._plain.put()
                yield
        finally:
            now.put_back()

    def holds_behind(self, *tensors: Tensor) -> None:
        """Let what backward passes behind these tensors run forward anew start from the start.

        Checkpointing does that: it replays the random streams, but not the buffers. The tensors are
        what the pass returned; of several passes, each is run anew from its own start.
        """
        for tensor in tensors:
            on_gradient(tensor, lambda: _anew(self.model).begin(self))

    def holds(self) -> AbstractContextManager[None]:
        """Let the same hold in all backward passes within."""
        return _anew(self.model).always(self)


def _place(tensor: Tensor) -> tuple[int, int]:
    """What changes where a tensor is written to, or its `.data` set; not by `.data.mul_()`."""
    version = 0 if tensor.is_inference() else tensor._version
    # A sparse tensor has no memory of its own.
    return version, tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


class _Anew:
    """The modules of a model while checkpointing runs them forward anew, in a backward pass.

    Hooks give a module copies of its buffers at the start of the pass, and afterwards its own.
    """

    def __init__(self) -> None:
        # Of the backward pass that runs now; the graph keeps the start alive, and this must not: a
        # start holds its model.
        self._running: weakref.ref[PassStart] | None = None
        self._lasting: PassStart | None = None  # of all within `always`
        self._taken: list[Buffers] = []
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type[_Anew], tuple[()]]:
        return _Anew, ()  # hooks that an error has left do nothing in a copy of the model

    def begin(self, start: PassStart) -> None:
        """A backward pass has reached what a pass from `start` returned."""
        self._hook(start)
        self._running = weakref.ref(start)
        at_the_end_of_backward(self._rest)

    @contextmanager
    def always(self, start: PassStart) -> Iterator[None]:
        """Take every backward pass within for one that goes through a pass from `start`."""
        before = self._lasting
        self._hook(start)
        self._lasting = start
        try:
            yield
        finally:
            self._lasting = before
            self.end()  # also what an interrupt has left in the middle

    def end(self) -> None:
        """Take the hooks away."""
        self._rest()
        if self._lasting is None:
            while self._handles:
                self._handles.pop().remove()

    def _rest(self) -> None:
        self._running = None
        while self._taken:  # of a module that an interrupt has left
            _put(self._taken.pop())

    def _hook(self, start: PassStart) -> None:
        if self._handles:
            return
        inside = {m for c in start.model.modules() if is_compiled_part(c) for m in c.modules()}
        for module, own in start.buffers.items():
            # A compiled graph holds what it runs anew, and TorchScript takes no hooks.
            if own and module not in inside and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self.before, prepend=True))
                self._handles.append(module.register_forward_hook(self.after, always_call=True))

    def before(self, module: nn.Module, args: Any) -> None:
        """Give the module the buffers of the start."""
        start = self._lasting if self._running is None else self._running()
        if torch._C._current_graph_task_id() == NO_TASK:
            if self._running is not None:  # an error has cut the last backward pass short
                self.end()
        elif start is not None:
            self._taken.append({module: dict(module._buffers)})
            _put(_copied({module: start.buffers[module]}))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._taken and module in self._taken[-1]:
            _put(self._taken.pop())


NO_TASK = -1  # what torch says outside of a backward pass
_ANEW: weakref.WeakKeyDictionary[nn.Module, _Anew] = weakref.WeakKeyDictionary()


def _anew(model: nn.Module) -> _Anew:
    return _ANEW.setdefault(model, _Anew())


def ends_with(total: Tensor, model: nn.Module) -> None:
    """Say that the backward pass of this loss is the last of a step; its hooks then go."""
    on_gradient(total, lambda: at_the_end_of_backward(_anew(model).end))


def on_gradient(tensor: Tensor, call: Callable[[], None]) -> None:
    """Call when a backward pass reaches the tensor."""
    if tensor.requires_grad:
        tensor.register_hook(lambda _: call())  # type: ignore[no-untyped-call]


def at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Call when the backward pass that runs now is over."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def derived_seed(*keys: int) -> int:
    """Independent seed for each combination of keys."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
