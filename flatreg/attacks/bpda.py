"""Attacks through modules whose gradients hide: their backward pass is another module's.

Backward pass differentiable approximation: Athalye, Carlini, Wagner, "Obfuscated gradients give a
false sense of security", ICML 2018, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.options import Attack, AttackOptions, AttackResult
from flatreg.attacks.query import Surrogate

_FEW = 12  # names that a message lists

Modules = Sequence[str] | Mapping[str, nn.Module]
"""Names or classes of modules; or each with the module whose backward pass stands for its own."""


def bpda(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    modules: Modules,
    eps: float | Tensor,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    r"""Run `attack` on a model in which the backward pass of some modules f is that of g.

    .. math:: f(a) \text{ forward}, \qquad \nabla g(a)^\top v \text{ backward}

    g is the identity, or what `modules` gives. The forward pass, and with it every verdict, is the
    model's own, bit for bit.

    Args:
        model: images in [0,1] to logits.
        inputs: `(batch, ...)` in [0,1].
        labels: `(batch,)`.
        attack: any that follows gradients.
        modules: names of modules, as in `model.named_modules()`, or names of their classes; or a
            mapping of these to modules g, in eval mode, that take and return the same shapes.
        eps: radius in [0,1] pixel units, scalar or `(batch,)`.
        **options: as in `flatreg.attacks.pgd`, with its result and errors.

    Raises:
        TypeError: `modules` is one name.
        ValueError: no module has that name or class; none of that name is called in a pass; one
            takes or returns something else than a floating tensor, or changes its shape where g
            does not.
    """
    given = _substitutes(modules) if len(inputs) else {}  # of no images no pass calls a module
    with _replaced_backward(model, given):
        return attack(model, inputs, labels, eps=eps, **options)


def with_bpda(stages: Sequence[Attack], modules: Modules) -> tuple[Attack, ...]:
    """Stages of a cascade, and behind them those that follow gradients once more, by `bpda`.

    A last stage without gradients, such as a spot check by Square, stays the last.

    Raises:
        TypeError, ValueError: as `bpda`, of `modules` alone.
    """
    if not modules:
        return tuple(stages)
    _substitutes(modules)
    blind = ("square", "noise", "random_search", "spot_check")
    steep = [stage for stage in stages if _name(stage) not in blind]
    last = [stage for stage in stages[-1:] if stage not in steep]
    again = (partial(bpda, attack=stage, modules=modules) for stage in steep)
    return (*stages[: len(stages) - len(last)], *again, *last)


def _name(stage: Attack) -> str:
    return getattr(stage.func if isinstance(stage, partial) else stage, "__name__", "")


def _substitutes(modules: Modules) -> dict[str, nn.Module]:
    """The module g for each name."""
    if isinstance(modules, str):
        raise TypeError(f"bpda: expected names of modules, got {modules!r}: write [{modules!r}]")
    given = modules if isinstance(modules, Mapping) else {n: nn.Identity() for n in modules}
    for name, module in given.items():
        if not (isinstance(name, str) and name and isinstance(module, nn.Module)):
            raise ValueError(
                "bpda: expected names of modules, or a mapping of names to modules, got "
                f"{name!r:.60}: {type(module).__name__}"
            )
    if not given:
        raise ValueError("bpda: expected at least one name of a module, got none")
    return dict(given)


def check_modules(model: nn.Module, modules: Modules) -> None:
    """Refuse names that no module of `model` has, before anything is attacked; as `bpda`."""
    for name in _substitutes(modules) if modules else ():
        _named(model, name)


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    """The module of that name, or all of that class."""
    while isinstance(model, Surrogate):
        model = model.get_submodule("model")
    known = {path: module for path, module in model.named_modules() if path}
    if name in known:
        return [known[name]]
    found = [module for module in known.values() if type(module).__name__ == name]
    if not found:
        some = ", ".join([*list(known)[:_FEW], *(["..."] if len(known) > _FEW else [])])
        raise ValueError(
            f"bpda: {type(model).__name__} has no module of the name or class {name!r:.60}; it "
            f"has {some or 'none'}"
        )
    return found


@contextmanager
def _replaced_backward(model: nn.Module, given: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the backward pass of the modules of each name is that of the module given for it."""
    with ExitStack() as hooks:
        swaps: dict[str, list[_Swap]] = {}
        for name, substitute in given.items():
            swaps[name] = []
            for module in _named(model, name):
                swap = _Swap(name, substitute)
                swaps[name].append(swap)
                hooks.enter_context(module.register_forward_pre_hook(swap.before))
                hooks.enter_context(module.register_forward_hook(swap.after))
        yield
        for name, own in swaps.items():
            if not any(swap.called for swap in own):
                raise ValueError(
                    f"bpda: no pass of the model calls {name!r}: name a module that its forward "
                    "calls (of TorchScript none can be named)"
                )


class _Swap:
    """Hooks of one module: it is passed an input without a graph, its output gets that of g."""

    def __init__(self, name: str, substitute: nn.Module) -> None:
        self.name, self.substitute = name, substitute
        self.inputs, self.called = list[Tensor](), False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the input; the module gets a copy, which it may change in place."""
        if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            raise ValueError(
                f"bpda: {self.name!r} takes something else than a floating tensor first: name "
                "another module"
            )
        self.called = True
        self.inputs.append(args[0])
        return (args[0].detach().clone(), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Join the output to the graph of g at the input."""
        inputs = self.inputs.pop()
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            raise ValueError(f"bpda: {self.name!r} returns no floating tensor: name another module")
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return output
        stand_in = self.substitute(inputs)
        if stand_in.shape != output.shape:
            raise ValueError(
                f"bpda: {self.name!r} makes {tuple(output.shape)} of {tuple(inputs.shape)}, its "
                f"substitute {tuple(stand_in.shape)}: give {{{self.name!r}: MODULE}} of that shape"
            )
        joined: Tensor = _Join.apply(output.detach(), stand_in)
        return joined


class _Join(torch.autograd.Function):
    """The first of two tensors, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, stand_in: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
