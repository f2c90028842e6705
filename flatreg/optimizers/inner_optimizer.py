"""The optimizer within: which can be wrapped, how it steps, and how one is found in others."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from flatreg.optimizers.data_parallel import refuse_engine_of

T = TypeVar("T")


def refuse_base(base: Any) -> None:
    """Refuse what cannot step on a gradient it is given.

    Raises:
        TypeError: `base` is no optimizer.
        ValueError: it is an engine's that shards parameters; it is prepared already; it needs a
            closure or second derivatives.
    """
    if not _is_optimizer(base):
        kind = isinstance(base, type)
        got = f"the class {base.__name__}" if kind else f"a {type(base).__name__}"
        raise TypeError(
            f"expected an optimizer that exists, got {got}: write "
            "SAM(torch.optim.AdamW(model.parameters(), lr=...), rho=...)"
        )
    if hasattr(base, "_strategy") or type(base).__name__ == "AcceleratedOptimizer":
        raise ValueError(
            f"expected an optimizer that is not prepared yet, got a {type(base).__name__}: wrap "
            "it first, then let Accelerate, Lightning or Fabric prepare the wrapped one"
        )
    refuse_engine_of(base)
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(_needs(base, "a closure that it calls several times"))
    if getattr(base, "is_second_order", False):
        raise ValueError(_needs(base, "second derivatives"))


def offered(base: Any, name: str) -> Any:
    """An attribute of the base optimizer, asked of its wrapper.

    Raises:
        AttributeError: it has none of this name; that of other libraries is told in words of ours.
    """
    if name in ("first_step", "second_step") and not hasattr(base, name):
        raise AttributeError(
            f"there is no {name} in flatreg: write flatreg.backward(optimizer, closure, "
            "model=model), which takes both passes, and then optimizer.step()"
        )
    return getattr(base, name)


def step_of(base: Any) -> Any:
    """Step the base optimizer.

    Raises:
        RuntimeError: it turns out to need a closure, or second derivatives.
    """
    try:
        with _no_hooks_on_all():
            return base.step()
    except Exception as error:
        text = str(error)
        if "closure" in text.lower():
            raise RuntimeError(_needs(base, "a closure")) from error
        if "does not require grad" in text:
            raise RuntimeError(_needs(base, "second derivatives")) from error
        raise


@contextmanager
def _no_hooks_on_all() -> Iterator[None]:
    """Call no hook on the steps of all optimizers: torch calls them on that of the wrapper."""
    both: list[Any] = [_global_pre_hooks, _global_post_hooks]
    pairs = [(hooks, dict(hooks)) for hooks in both]
    try:
        for hooks, _ in pairs:
            hooks.clear()
        yield
    finally:
        for hooks, before in pairs:
            hooks.update(before)


def _needs(base: Any, what: str) -> str:
    return (
        f"{type(base).__name__} needs {what} to step, and a sharpness-aware step has none: "
        "wrap another optimizer"
    )


def _is_optimizer(value: Any) -> bool:
    """An optimizer, or a wrapper of one that is no `torch.optim.Optimizer` itself."""
    if type(value) in weakref.ProxyTypes:  # as Lightning's to its strategy, which may be gone
        return False
    if isinstance(value, Optimizer):
        return True
    if isinstance(value, type | Tensor | nn.Module):
        return False
    return all(hasattr(value, name) for name in ("param_groups", "state", "step", "zero_grad"))


def find_instance(optimizer: Any, kind: type[T], *, having: str) -> T | None:
    """The first of this kind at or within `optimizer`, with this attribute of its own.

    Raises:
        ValueError: it lies within a ZeroRedundancyOptimizer, whose processes step on shares.
    """
    queue, seen = [optimizer], set[int]()
    sharded = False
    while queue:
        here = queue.pop(0)
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, kind) and having in vars(here):
            if sharded:
                raise ValueError(
                    "a ZeroRedundancyOptimizer around it makes each process perturb its own share "
                    "alone: write SAM(ZeroRedundancyOptimizer(...))"
                )
            return here
        sharded = sharded or type(here).__name__ in ("ZeroRedundancyOptimizer", "OSS")
        queue += [o for o in getattr(here, "__dict__", {}).values() if _is_optimizer(o)]
    return None
