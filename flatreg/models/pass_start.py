"""Where a pass of a model starts, so that a later one, or what is run anew, starts there too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatreg.models.compiled import is_compiled_part, sharded_parts
from flatreg.models.state import (
    Buffers,
    PlainState,
    buffers_of,
    copied,
    kept_buffers,
    place_of,
    put_buffers,
    random_streams,
)

is_second_pass = ContextVar("is_second_pass", default=False)


@contextmanager
def second_pass() -> Iterator[None]:
    """Say that passes within are on a batch that had a pass before, in the same step."""
    token = is_second_pass.set(True)
    try:
        yield
    finally:
        is_second_pass.reset(token)


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
        self.buffers = copied(buffers_of(self.model))
        self._plain = PlainState(self.model)
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
        places = [place_of(p) for _, p in self._frozen]
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
            put_buffers(self._taken.pop())

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
            put_buffers(copied({module: start.buffers[module]}))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._taken and module in self._taken[-1]:
            put_buffers(self._taken.pop())


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
