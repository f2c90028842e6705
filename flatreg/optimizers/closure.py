"""Closures: what `flatreg.backward` and `step` may call, and what these may do."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from flatreg.optimizers.vector import norms, shards

if TYPE_CHECKING:
    from flatreg.terms.objective import ObjectiveLoss

Loss = TypeVar("Loss", "Tensor", "ObjectiveLoss")
Closure = Callable[[], Loss]
Gradients = list[Tensor | None]
GradientVersions = list[tuple[weakref.ref[Tensor], int]]


@runtime_checkable
class BatchLoss(Protocol[Loss]):
    """The loss of one batch: a closure that `backward` can also prepare and cut.

    `flatreg.Objective.bind` returns one. Any other callable that returns a scalar tensor is a bare
    closure: `backward` calls it once or twice, and needs to be told its model.
    """

    @property
    def model(self) -> nn.Module:
        """The model of the loss, as the user's loop prepared it."""

    def __call__(self) -> Loss:
        """Evaluate the loss at the weights as they are now."""

    def prepare(self) -> None:
        """Make what all evaluations share, as the attacked batch; a second call does nothing."""

    def split(self, count: int) -> Sequence[BatchLoss[Loss]]:
        """At most `count` parts of the batch, whose losses add up to this one."""

    def at_head(self, parameters: Sequence[Tensor]) -> tuple[Closure[Loss], Closure[Loss]] | None:
        """Two evaluations from one pass through the backbone, which this call makes.

        The first is at the weights as they are, the second at those that `parameters` have when it
        is called. None, and no pass, where `parameters` are not all of the head or the loss reads
        more than the head.
        """


def take_gradients(parameters: Sequence[Tensor]) -> Gradients:
    """The `.grad` of all parameters, which then have none."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


def gradient_versions(parameters: Sequence[Tensor]) -> GradientVersions:
    """The gradients present, by weak reference, each with torch's count of writes in place."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [(weakref.ref(g), g._version) for g in grads]


def is_unchanged(parameters: Sequence[Tensor], before: GradientVersions) -> bool:
    """Whether the same gradients are present as `before`, and nobody has written to them."""
    now = gradient_versions(parameters)
    return len(now) == len(before) and all(
        g() is old() and version == old_version
        for (g, version), (old, old_version) in zip(now, before, strict=True)
    )


def refuse_made(parameters: Sequence[Tensor], made: GradientVersions) -> None:
    """Refuse gradients that an earlier `perturbed` made: the next would take them for a direction.

    Raises:
        RuntimeError: one is present, added to or not.
    """
    earlier = [gradient() for gradient, _ in made]
    if any(p.grad is not None and any(p.grad is g for g in earlier) for p in parameters):
        raise RuntimeError(
            "perturbed() found the gradient that an earlier perturbed() made, with no step on it: "
            "accumulate with flatreg.backward, or call optimizer.zero_grad() first"
        )


def check_closure(closure: Any) -> None:
    """Refuse what is no closure.

    Raises:
        TypeError: a loss, an objective that no batch is bound to, or anything that is not called
            without arguments.
    """
    if hasattr(closure, "bind"):
        raise TypeError(
            f"expected a closure, got a {type(closure).__name__} without a batch: write "
            "backward(optimizer, objective.bind(inputs, labels))"
        )
    if hasattr(closure, "parts"):
        raise TypeError(
            "expected a closure, got a loss: write backward(optimizer, objective.bind(inputs, "
            "labels)), which computes the loss itself"
        )
    if isinstance(closure, nn.Module) or not callable(closure):
        raise TypeError(
            f"expected a closure that computes the loss, got a {type(closure).__name__}: write "
            "backward(optimizer, lambda: loss_function(model(inputs), labels), model=model)"
        )


def evaluated(closure: Closure[Loss], parameters: Sequence[Tensor]) -> Loss:
    """Evaluate a closure, without its backward pass.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it returns no scalar, or one without a graph.
        RuntimeError: it has made gradients itself.
    """
    before = gradient_versions(parameters)
    loss = closure()
    total = total_of(loss)
    if not is_unchanged(parameters, before):
        raise RuntimeError(
            "the closure changed gradients: let it compute and return the loss, without backward "
            "and zero_grad; flatreg.backward takes the backward passes, and an attack of yours its "
            "gradient by torch.autograd.grad(loss, images)"
        )
    if not isinstance(total, Tensor):
        raise TypeError(
            f"expected a closure that returns the loss as a tensor, it returned "
            f"{'None' if total is None else 'a ' + type(total).__name__}"
        )
    if total.numel() != 1:
        raise ValueError(
            f"expected a closure that returns a scalar loss, it has shape {tuple(total.shape)}: "
            "take its mean"
        )
    if not total.requires_grad:
        raise ValueError(
            "the loss that the closure returned has no graph: no detach, item or no_grad before "
            "the backward pass"
        )
    return loss


def modules_in(closure: Any) -> list[nn.Module]:
    """Modules that a closure names, that its object holds, or that functions of its file name.

    As a loss that has buffers, or a second network: the caller gives one model alone.
    """
    waiting, seen = [closure], {}
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen[id(held)] = held
        if isinstance(held, partial):
            waiting += [held.func, *held.args, *held.keywords.values()]
        elif inspect.ismethod(held):
            waiting += [held.__func__, held.__self__]
        elif inspect.isfunction(held):
            with suppress(ValueError):  # a name that has no value yet
                names, own = inspect.getclosurevars(held), held.__globals__
                waiting += names.nonlocals.values()
                # Functions of other files are not entered: libraries have many.
                named = names.globals.values()
                waiting += [one for one in named if getattr(one, "__globals__", own) is own]
        elif not isinstance(held, nn.Module | type | ModuleType):
            several = isinstance(held, list | tuple)
            parts = held[:99] if several else getattr(held, "__dict__", {}).values()
            waiting += [part for part in parts if isinstance(part, nn.Module)]
    return [held for held in seen.values() if isinstance(held, nn.Module)]


def total_of(loss: Any) -> Any:
    """The scalar to differentiate: the loss itself, or that of an objective."""
    return getattr(loss, "total", loss)


def stepping_closure(
    closure: Callable[[], Any], parameters: Sequence[Tensor]
) -> tuple[Callable[[], Any], Callable[[], Any], list[nn.Module]]:
    """What `step(closure)` calls for each pass, and once for the gradient that is stepped on.

    Lightning's closure takes a pass and then changes its gradients: hooks, clipping. Both gradients
    are needed as they were made. Last come the modules that run in the closure, as far as known.
    """
    evaluate, finish, models = closure, lambda: None, modules_in(closure)
    partially: Any = closure
    wrapped = getattr(closure, "func", None)
    plugin: Any = getattr(wrapped, "__self__", None)
    if getattr(wrapped, "__name__", "") == "_wrap_closure" and hasattr(plugin, "_after_closure"):
        model, optimizer, evaluate = partially.args
        models = [model]
        finish = partial(plugin._after_closure, model, optimizer)

    def evaluate_checked() -> Any:
        with weights_at_rest(parameters, forward_too=True):
            loss = evaluate()
        total = total_of(loss)
        made = any(p.grad is not None for p in parameters)
        if not made and isinstance(total, Tensor) and total.requires_grad:
            raise RuntimeError(
                "the closure of step did not call backward: it clears gradients, computes the "
                "loss, calls loss.backward() and returns it; or use flatreg.backward"
            )
        return loss

    return evaluate_checked, finish, models


@contextmanager
def weights_at_rest(parameters: Sequence[Tensor], *, forward_too: bool = False) -> Iterator[None]:
    """Refuse weights that move during a backward pass.

    Torch counts writes in place, but not those by `.data`, as of LOMO: what has hooks is compared.
    A forward pass may write weights, as an embedding with `max_norm`, so that with `forward_too`
    the count is that of the moment at which a gradient arrives.

    Raises:
        RuntimeError: an optimizer steps inside the backward pass.
    """
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooked = [p for p in parameters if any(getattr(p, name, None) for name in names)]
    ids = {id(p) for p in hooked}
    lengths = _lengths(hooked)
    versions = {id(p): p._version for p in (hooked if forward_too else parameters)}

    def arrive(p: Tensor) -> None:
        versions[id(p)] = p._version

    others = [p for p in parameters if forward_too and id(p) not in ids]
    arriving: list[Any] = [p for p in others if p.is_leaf and p.requires_grad]
    with ExitStack() as hooks:
        for p in arriving:
            hooks.enter_context(p.register_post_accumulate_grad_hook(arrive))
        yield
    moved = any(versions.get(id(p), p._version) != p._version for p in parameters)
    if moved or lengths != _lengths(hooked):
        raise RuntimeError(
            "the weights moved during a backward pass: an optimizer steps inside it (LOMO, hooks "
            "on gradients), before the second gradient is there: step after flatreg.backward"
        )


@contextmanager
def unwritten(weights: Sequence[Tensor], *, reads: bool) -> Iterator[None]:
    """Refuse a forward pass that writes perturbed weights, where no pass before it has.

    Args:
        weights: those that are perturbed.
        reads: whether to read them, to see writes by `.data`.

    Raises:
        RuntimeError: it wrote one: what it wrote is lost when the weights come back.
    """

    def marks() -> list[tuple[int, str]]:
        lengths = _lengths(weights) if reads else [""] * len(weights)
        return [(w._version, length) for w, length in zip(weights, lengths, strict=True)]

    before = marks()
    yield
    for weight, now, mark in zip(weights, marks(), before, strict=True):
        if now != mark:
            raise RuntimeError(
                f"forward wrote a weight of shape {tuple(weight.shape)} while it was perturbed, "
                "and this is lost: make a pass before the first step, where data initialise it; "
                "otherwise take a method with two passes, as SAM"
            )


def _lengths(weights: Sequence[Tensor]) -> list[str]:
    held = shards([w.detach() for w in weights])
    return [str(length.tolist()) for length in norms(held)] if held else []
