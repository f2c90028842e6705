"""The wrapper: an existing optimizer, an ascent rule and a gradient rule."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from flatreg.optimizers.ascent import Ascent, Global, Gradients, ParameterState, perturb, restore
from flatreg.optimizers.gradient import GradientRule, Perturbed, between, combine

Scope = nn.Module | Iterable[Tensor]
GradientVersions = list[tuple[weakref.ref[Tensor], int]]


def make_states(
    parameters: Sequence[Tensor], scope: Scope | None, model: nn.Module | None
) -> list[ParameterState]:
    """States of the parameters: in the scope or not, and their layout in `model`.

    Raises:
        ValueError: a parameter of the scope is none of the optimizer's.
    """
    inside = None
    if scope is not None:
        chosen = list(scope.parameters() if isinstance(scope, nn.Module) else scope)
        inside = {id(p) for p in chosen}
        missing = len(inside - {id(p) for p in parameters})
        if missing or not chosen:
            raise ValueError(
                f"scope: expected parameters of the base optimizer, got {len(chosen)} of which "
                f"{missing} are not its own"
            )
    layouts = {
        id(module.weight): (module.groups, isinstance(module, _ConvTransposeNd))
        for module in (() if model is None else model.modules())
        if isinstance(module, _ConvNd)
    }
    return [
        ParameterState(p, 0.0, inside is None or id(p) in inside, *layouts.get(id(p), (1, False)))
        for p in parameters
    ]


def last_blocks(model: nn.Module, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` blocks of a timm model or of an `nn.Sequential`.

    The head is a block of its own. Blocks are timm's, those of layer-wise learning rates
    (`group_matcher`); those of an `nn.Sequential` are its children that have parameters.

    Raises:
        ValueError: the model does not say what its blocks are, or has fewer.
    """
    blocks = _blocks(model)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count: expected 1 to {len(blocks)} blocks, got {count}")
    return [p for block in blocks[-count:] for p in block]


def _blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    matcher = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters  # where timm models are, timm is

        named = dict(model.named_parameters())
        layers = group_parameters(model, matcher(coarse=False))
        return [[named[name] for name in names] for names in layers.values()]
    if isinstance(model, nn.Sequential):
        children = [child for child in model if any(True for _ in child.parameters())]
        if len(children) == 1:  # as `with_normalization` wraps a model
            return _blocks(children[0])
        return [list(child.parameters()) for child in children]
    raise ValueError(
        f"{type(model).__name__} has no group_matcher and is no nn.Sequential: "
        "pass the parameters of its last blocks yourself"
    )


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


def _is_unchanged(parameters: Sequence[Tensor], before: GradientVersions) -> bool:
    """Whether the same gradients are present as `before`, and nobody has written to them."""
    now = gradient_versions(parameters)
    return len(now) == len(before) and all(
        g() is old() and version == old_version
        for (g, version), (old, old_version) in zip(now, before, strict=True)
    )


_GLOBAL, _PERTURBED = Global(), Perturbed()
_STATE = "sharpness_aware"
_PRESENT = (
    "step(closure) found gradients present already (GradScaler, accumulation, no zero_grad before "
    "it): take both passes with flatreg.backward"
)
_OWN = (
    "base rho ascent gradient every begin micro_batches sync_perturbation "
    "_states _steps _everywhere gradients_are_ready _warned"
).split()


def _of_base(name: str) -> Any:
    """An attribute that is the base optimizer's own.

    One source of truth: FSDP2's prepare and load_state_dict replace it on whichever they hold.
    """
    return property(
        lambda wrapper: getattr(wrapper.base, name),
        lambda wrapper, value: setattr(wrapper.base, name, value),
    )


class SharpnessAware(Optimizer):
    """An existing optimizer instance, timm's included, that steps on a sharpness-aware gradient.

    `param_groups`, `state` and `defaults` *are* those of `base`, with `rho` added to each group, so
    schedulers, Accelerate and checkpoints see the base optimizer; a checkpoint of either loads into
    the other. Weights are perturbed only between the two passes.

    Take both passes with `flatreg.backward`, which is correct under accumulation, AMP, clipping and
    DDP; or with `perturbed()`, where your loop makes the passes; or with `step(closure)`.
    `flatreg.SAM`, `flatreg.ASAM` and the others are pairs of rules by their published names.

    Args:
        base: the optimizer that steps.
        rho: size of the perturbation, as the ascent rule means it; a group may have its own in
            `param_groups[i]["rho"]`, and schedules may change it there.
        ascent: where to perturb the weights.
        gradient: what to step on, given both gradients.
        scope: what to perturb, as a module or parameters; all by default. The other parameters
            step on the gradient at the perturbed weights as well.
        model: tells ascent rules that read weights as linear maps which are grouped convolutions.
        every: perturb on every so many steps.
        begin: perturb from this step on, counted from 0; the steps before are the base's own.
        micro_batches: split the batch of a bound objective into so many, each with a perturbation
            of its own (m-sharpness); each is normalised by its own BatchNorm statistics.
        sync_perturbation: under DDP, perturb all processes alike, along the averaged gradient; by
            default each perturbs along its own, and one all-reduce a step is saved. Sharded
            gradients (FSDP2) are always averaged.

    Attributes:
        gradients_are_ready: whether `.grad` holds the sharpness-aware gradient, for `step` to use.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    param_groups: list[dict[str, Any]] = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: dict[str, Any] = _of_base("defaults")

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float = 0.05,
        ascent: Ascent = _GLOBAL,
        gradient: GradientRule = _PERTURBED,
        scope: Scope | None = None,
        model: nn.Module | None = None,
        every: int = 1,
        begin: int = 0,
        micro_batches: int = 1,
        sync_perturbation: bool = False,
    ) -> None:
        if not isinstance(base, Optimizer) or find_wrapper(base):
            raise ValueError(f"base must be an optimizer, not sharpness-aware yet, got {base!r}")
        if rho < 0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        for name, value, least in (
            ("every", every, 1),
            ("begin", begin, 0),
            ("micro_batches", micro_batches, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if ascent.needs_layout and model is None:
            raise ValueError(f"{type(ascent).__name__} needs model, for grouped convolutions")
        self.base, self.rho, self.ascent, self.gradient = base, rho, ascent, gradient
        self.every, self.begin = every, begin
        self.micro_batches, self.sync_perturbation = micro_batches, sync_perturbation
        own = [p for group in base.param_groups for p in group["params"]]
        self._states = make_states(own, scope, model)
        self._everywhere = scope is None
        self._steps = 0
        self.gradients_are_ready = self._warned = False
        self._stepped_on: GradientVersions = []
        groups, state, defaults = base.param_groups, base.state, base.defaults
        super().__init__([{"params": []}], defaults)  # registers hooks; its groups are thrown away
        self.param_groups, self.state, self.defaults = groups, state, defaults
        for group in groups:
            group.setdefault("rho", rho)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_stepped_on": []})

    def __repr__(self) -> str:
        rules = f"rho={self.rho}, ascent={self.ascent}, gradient={self.gradient}"
        return f"SharpnessAware({rules}, base={self.base!r})"

    @property
    def perturbs_now(self) -> bool:
        """Whether this step perturbs, given `every` and `begin`."""
        since = self._steps - self.begin
        return since >= 0 and since % self.every == 0

    def parameter_states(self) -> list[ParameterState]:
        """All parameters of all groups, in order, with what the wrapper knows of each."""
        pairs = [(p, group["rho"]) for group in self.base.param_groups for p in group["params"]]
        for weight, _ in pairs[len(self._states) :]:  # groups that came after the wrapping
            self._states.append(ParameterState(weight, in_scope=self._everywhere))
        for state, (weight, rho) in zip(self._states, pairs, strict=True):
            # FSDP2 replaces the parameters in the groups, and schedules change rho there.
            state.weight, state.rho = weight, rho
        return list(self._states)

    def parameters(self, *, perturbed: bool = False) -> list[Tensor]:
        """All parameters of all groups, in order; or only those in the scope."""
        return [s.weight for s in self.parameter_states() if s.in_scope or not perturbed]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; `rho` may be one of its entries.

        Outside a scope that was given, the new parameters are not perturbed.
        """
        self.base.add_param_group(param_group)
        self.param_groups[-1].setdefault("rho", self.rho)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with `rho` among the settings of each group.

        What rules remember between steps, and the number of steps where `every` or `begin` count
        them, comes under one further key, which a plain optimizer ignores.
        """
        memory = {i: dict(s.memory) for i, s in enumerate(self.parameter_states()) if s.memory}
        if not memory and self.every == 1 and self.begin == 0:
            return self.base.state_dict()
        return {**self.base.state_dict(), _STATE: {"steps": self._steps, "memory": memory}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; one of a plain base optimizer has no rho, and today's is kept."""
        rhos = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != _STATE})
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
        own = state_dict.get(_STATE, {"steps": self._steps, "memory": {}})
        self._steps = own["steps"]
        for i, state in enumerate(self.parameter_states()):
            kept = own["memory"].get(i, {})
            state.memory = {n: t.to(state.weight.device, copy=True) for n, t in kept.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Without closure: the base optimizer's step, after `backward` or `perturbed`.

        With one (LBFGS convention: it clears gradients, evaluates, calls backward and returns the
        loss): both passes, then the base step; returns the unperturbed loss. BatchNorm statistics
        move in both passes, because no model is known here. After `backward`, a closure that makes
        no gradients is called once (Lightning's manual optimisation passes its hooks so).

        Raises:
            RuntimeError: a closure is given and gradients are present already, as under a
                GradScaler or with accumulation: use `flatreg.backward`.
        """
        loss = None
        if closure is None:
            self._warn_of_a_plain_step()
        elif self.gradients_are_ready:
            before = gradient_versions(self.parameters())
            with torch.enable_grad():
                loss = closure()
            if not _is_unchanged(self.parameters(), before):
                raise RuntimeError(_PRESENT)
        else:
            loss = self._both_passes(closure)
        result = self.base.step()
        self._stepped_on = [] if closure is None else gradient_versions(self.parameters())
        self._steps += 1
        self.gradients_are_ready = False
        return result if closure is None else loss

    def _both_passes(self, closure: Callable[[], Any]) -> Any:
        present = any(p.grad is not None for p in self.parameters())
        if present and not _is_unchanged(self.parameters(), self._stepped_on):
            raise RuntimeError(_PRESENT)
        self.zero_grad()  # the last call kept its gradients for callers that read them afterwards
        with torch.enable_grad():
            loss = closure()
            if self.perturbs_now:
                with self.perturbed():
                    closure()
            else:
                between(self.gradient, self.parameter_states())
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Weights at w + e(w) inside, bit for bit back at w afterwards, also when the body raises.

        The gradients present at entry give the direction and are consumed: inside, `.grad` starts
        from None, and what the body accumulates there, with what the gradient rule adds to it, is
        what `step` uses. Where their norm is zero or not finite (a GradScaler's overflow) nothing
        is perturbed. Nothing is perturbed either on a step that `every` or `begin` skip.
        """
        states = self.parameter_states()
        plain = take_gradients(self.parameters())
        if not self.perturbs_now:
            yield
            between(self.gradient, states)
        else:
            saved = perturb(self.ascent, states, plain, owned=False)
            if not self.gradient.combines:
                plain.clear()  # the second pass may need the memory
            try:
                yield
            finally:
                restore(saved)  # before the error leaves, so that training may go on
            if self.gradient.combines:
                combine(self.gradient, states, plain)
        self.gradients_are_ready = True

    def _warn_of_a_plain_step(self) -> None:
        ready = self.gradients_are_ready or all(p.grad is None for p in self.parameters())
        if ready or self._warned:
            return
        self._warned = True
        warnings.warn(
            "a sharpness-aware optimizer steps on gradients that loss.backward() made: this is a "
            "plain step of the base optimizer; call flatreg.backward(optimizer, closure, ...)",
            stacklevel=4,
        )


def find_wrapper(optimizer: Any) -> SharpnessAware | None:
    """The sharpness-aware optimizer at or within `optimizer`: Accelerate, Lookahead and others."""
    # Lightning's own wrapper takes the class of what it wraps, and has no base.
    if isinstance(optimizer, SharpnessAware) and "base" in vars(optimizer):
        return optimizer
    inner = [o for o in vars(optimizer).values() if isinstance(o, Optimizer)]
    return next((found for o in inner if (found := find_wrapper(o))), None)
