"""The wrapper: an existing optimizer, an ascent rule and a gradient rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatreg.data.configuration import switch, whole
from flatreg.models.pass_start import PassStart, second_pass
from flatreg.models.state import random_streams
from flatreg.optimizers.ascent import Ascent, Global, WithoutGradient, perturb, restore
from flatreg.optimizers.closure import (
    GradientVersions,
    gradient_versions,
    is_unchanged,
    refuse_made,
    stepping_closure,
    take_gradients,
    unwritten,
)
from flatreg.optimizers.data_parallel import refuse_engines
from flatreg.optimizers.gradient import GradientRule, Perturbed, between, combine, prime
from flatreg.optimizers.inner_optimizer import find_instance, offered, refuse_base, step_of
from flatreg.optimizers.parameter_state import (
    OURS,
    RHO,
    Memory,
    ParameterState,
    Scope,
    check_radius,
    complete_groups,
    follow,
    hidden_from,
    layouts_of,
    make_states,
    take_in,
    with_ours,
    without_ours,
)
from flatreg.optimizers.timing import Timing

_GLOBAL, _PERTURBED = Global(), Perturbed()
_PRESENT = (
    "step(closure) found gradients present already (GradScaler, accumulation, no zero_grad before "
    "it): take both passes with flatreg.backward"
)
_OWN = (
    "base rho ascent gradient every begin tail micro_batches sync_perturbation "
    "_states _everywhere _layouts gradients_are_ready _warned _primed reads_frozen"
).split()


def _of_base(name: str) -> Any:
    """An attribute that is the base optimizer's own.

    One source of truth: FSDP2's prepare and load_state_dict replace it on whichever they hold.
    """
    return property(
        lambda wrapper: getattr(wrapper.base, name),
        lambda wrapper, value: setattr(wrapper.base, name, value),
    )


class _StandIn(Optimizer):
    def step(self, closure: Any = None) -> Any:
        pass


class SharpnessAware(Optimizer):
    """An existing optimizer instance, timm's included, that steps on a sharpness-aware gradient.

    `param_groups`, `state` and `defaults` *are* those of `base`, so schedulers, Accelerate and
    checkpoints see the base optimizer; a checkpoint of either loads into the other. Each group has
    entries of its own, `sam_rho` and those of `Timing`, and the state of a parameter what rules
    remember of it; `base.step` sees none of them. Whatever else `base` offers, as `train` and
    `eval` of schedule-free optimizers, is called on it. Weights are perturbed within a pass alone.

    Take both passes with `flatreg.backward`, which is correct under accumulation, AMP, clipping and
    DDP; or with `perturbed()`, where your loop makes the passes; or with `step(closure)`.
    `flatreg.SAM`, `flatreg.ASAM` and the others are pairs of rules by their published names.

    Args:
        base: the optimizer that steps.
        rho: size of the perturbation, as the ascent rule means it; a group may have its own in
            `param_groups[i]["sam_rho"]`, and schedules may change it there.
        ascent: where to perturb the weights.
        gradient: what to step on, given both gradients.
        scope: what to perturb, as a module or parameters; all by default. The other parameters
            step on the gradient at the perturbed weights as well.
        model: tells ascent rules that read weights as linear maps which are grouped convolutions.
        every: perturb on every so many steps.
        begin: perturb from this step on, counted from 0; the steps before are the base's own.
        tail: perturb only while the learning rate, the largest of the groups, is at most so large a
            part of the highest that a step was taken at. A warm-up is at the highest so far, and so
            no tail; with a constant rate there is none. All steps by default.
        micro_batches: split the batch of a bound objective into so many, each with a perturbation
            of its own (m-sharpness); each is normalised by its own BatchNorm statistics.
        sync_perturbation: under DDP, perturb all processes alike, along the averaged gradient; by
            default each perturbs along its own, and one all-reduce a step is saved. Sharded
            gradients (FSDP2) are always averaged.

    Attributes:
        gradients_are_ready: whether `.grad` holds the sharpness-aware gradient, for `step` to use.

    Raises:
        TypeError: `base` is no optimizer, or `scope` neither a module nor parameters.
        ValueError: `base` is sharpness-aware already or needs a closure or second derivatives to
            step; it has no learning rate that falls, for a tail; an argument is out of its range;
            the message names it.
    """

    param_groups: list[dict[str, Any]] = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: dict[str, Any] = _of_base("defaults")
    # Hooks on checkpoints are those of the base optimizer, which writes and reads them.
    register_state_dict_pre_hook: Any = _of_base("register_state_dict_pre_hook")
    register_state_dict_post_hook: Any = _of_base("register_state_dict_post_hook")
    register_load_state_dict_pre_hook: Any = _of_base("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook: Any = _of_base("register_load_state_dict_post_hook")

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
        tail: float = 1.0,
        micro_batches: int = 1,
        sync_perturbation: bool = False,
    ) -> None:
        refuse_base(base)
        if find_wrapper(base):
            raise ValueError(
                f"expected an optimizer not sharpness-aware yet, got a {type(base).__name__}"
            )
        check_radius("rho", rho)
        if ascent.needs_layout and model is None:
            raise ValueError(f"{type(ascent).__name__} needs model, for grouped convolutions")
        self.rho, self.ascent, self.gradient = rho, ascent, gradient
        self.every, self.begin, self.tail = every, begin, tail
        self._timing.check(base)
        self.micro_batches = whole("micro_batches", micro_batches, 1)
        self.sync_perturbation = switch("sync_perturbation", sync_perturbation)
        own = [p for group in base.param_groups for p in group["params"]]
        self._layouts = layouts_of(model)
        self._states = make_states(own, scope, self._layouts)
        self._everywhere = scope is None
        self.gradients_are_ready = self._warned = self._primed = False
        self.reads_frozen = True  # till a step has shown that forward writes no weights
        self._stepped_on = self._made = GradientVersions()
        # torch's constructor registers hooks, and adds a group: to a stand-in, as optimizers may
        # act on new groups, or forbid them.
        self.base: Optimizer = _StandIn([torch.empty(0)], {})
        super().__init__([{"params": []}], {})
        self.base = base
        complete_groups(self.base, self.rho)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_stepped_on": [], "_made": []})

    def __getattr__(self, name: str) -> Any:
        """Whatever else the base optimizer offers in public."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return offered(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is the base optimizer's on the base optimizer."""
        ours = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        theirs = not ours and "base" in vars(self) and hasattr(self.base, name)
        super().__setattr__(name, value) if not theirs else setattr(self.base, name, value)

    def __repr__(self) -> str:
        rules = f"rho={self.rho}, ascent={self.ascent}, gradient={self.gradient}"
        return f"SharpnessAware({rules}, base={self.base!r})"

    @property
    def _timing(self) -> Timing:
        return Timing(every=self.every, begin=self.begin, tail=self.tail)  # may be set at any time

    @property
    def has_begun(self) -> bool:
        """Whether `begin` is over and the learning rate in its tail; other steps are plain."""
        return self._timing.has_begun(self.base)

    @property
    def perturbs_now(self) -> bool:
        """Whether this step perturbs, given `every`, `begin` and `tail`."""
        return self._timing.perturbs(self.base)

    @property
    def needs_first_pass(self) -> bool:
        """Whether a step that perturbs needs the gradient at the weights."""
        return self.gradient.combines or not isinstance(self.ascent, WithoutGradient)

    def parameter_states(self) -> list[ParameterState]:
        """All parameters of all groups, in order, with what the wrapper knows of each.

        Raises:
            ValueError: a group has `rho`, which is neither read here nor known to the base; a
                parameter came after the wrapping, whose layout the ascent rule cannot know.
        """
        complete_groups(self.base, self.rho)
        pairs = [(p, group[RHO]) for group in self.base.param_groups for p in group["params"]]
        self._states = follow(self._states, [weight for weight, _ in pairs], self._newcomer)
        for state, (weight, rho) in zip(self._states, pairs, strict=True):
            if state.weight is not weight or not isinstance(state.memory, Memory):
                state.memory = Memory(self.base, weight)
            state.weight, state.rho = weight, rho
        return list(self._states)

    def _newcomer(self, weight: Tensor) -> ParameterState:
        """State of a parameter that came after the wrapping."""
        (state,) = make_states([weight], None, self._layouts)
        state.in_scope = self._everywhere
        known = any(weight is p for p, *_ in self._layouts)
        if self.ascent.needs_layout and state.in_scope and weight.ndim > 2 and not known:
            raise ValueError(
                f"{type(self.ascent).__name__} does not know the layer of a parameter of shape "
                f"{tuple(weight.shape)} that came later: wrap again, with the model it is part of"
            )
        return state

    def parameters(self, *, perturbed: bool = False) -> list[Tensor]:
        """All parameters of all groups, in order; or only those in the scope."""
        return [s.weight for s in self.parameter_states() if s.in_scope or not perturbed]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; `sam_rho` may be one of its entries.

        Outside a scope that was given, the new parameters are not perturbed.
        """
        self.base.add_param_group(param_group)
        complete_groups(self.base, self.rho)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as the base optimizer does."""
        self._made = []
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, with the entries that the wrapper has in them."""
        complete_groups(self.base, self.rho)
        return with_ours(self.base.state_dict(), self.base)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; one of a plain base optimizer has no `sam_rho`: today's is kept.

        It has no highest learning rate either. With a `tail`, that is a warning.
        """
        kept = [{k: group[k] for k in OURS} for group in self.param_groups]
        self.base.load_state_dict(without_ours(state_dict, self.base))
        take_in(state_dict, self.base)
        self._timing.check_loaded(self.base)
        for group, values in zip(self.param_groups, kept, strict=True):
            for key, value in values.items():
                group.setdefault(key, value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Without closure: the base optimizer's step, after `backward` or `perturbed`.

        With one (LBFGS convention: it clears all gradients, evaluates, calls backward and returns
        the loss): both passes, with the same random streams, then the base step; returns the
        unperturbed loss. A method of one gradient takes one pass, as in `backward`. BatchNorm
        statistics of the modules that the closure names move in the first pass alone. What
        Lightning does to the gradients after its closure, as clipping, is done once, to the
        gradient that is stepped on. After `backward`, a closure that makes no gradients is called
        once (Lightning's manual optimisation passes its hooks so).

        Raises:
            TypeError: `closure` cannot be called.
            RuntimeError: a closure is given and gradients are present already, as under a
                GradScaler or with accumulation: use `flatreg.backward`; the closure did not call
                backward; the base optimizer needs a closure or second derivatives.
        """
        loss, estimated = None, self.gradients_are_ready or closure is not None
        if closure is None:
            self._warn_of_a_plain_step()
        elif not callable(closure):
            raise TypeError(
                f"step expected a closure or nothing, got a {type(closure).__name__}: call "
                "flatreg.backward(optimizer, closure, ...) and then step()"
            )
        elif self.gradients_are_ready:
            before = gradient_versions(self.parameters())
            with torch.enable_grad():
                loss = closure()
            if not is_unchanged(self.parameters(), before):
                raise RuntimeError(_PRESENT)
        else:
            loss = self._both_passes(closure)
        if not estimated and not self._primed:
            # The distributed checkpoints of torch take such a step, of zero gradients, to learn
            # what there is to load: it gives rules their memory, empty.
            self._primed = True
            prime(self.ascent, self.gradient, self.parameter_states())
        around: AbstractContextManager[None] = nullcontext()
        if isinstance(self.ascent, WithoutGradient):
            around = self.ascent.around_step(self.parameter_states())
        with around, hidden_from(self.base):
            result = step_of(self.base)
        self._stepped_on = [] if closure is None else gradient_versions(self.parameters())
        self._timing.count(self.base, ours=estimated)
        self.gradients_are_ready, self._made = False, []
        return result if closure is None else loss

    def _both_passes(self, closure: Callable[[], Any]) -> Any:
        changed = not is_unchanged(self.parameters(), self._stepped_on)
        if changed and any(p.grad is not None and bool(p.grad.any()) for p in self.parameters()):
            raise RuntimeError(_PRESENT)
        self.zero_grad()  # the last call kept its gradients for callers that read them afterwards
        evaluate, finish, models = stepping_closure(closure, self.parameters())
        replay = self.record_rng()
        start = PassStart(*models, reads=self.reads_frozen) if models else None
        with torch.enable_grad():
            if self.perturbs_now and not self.needs_first_pass:
                with self.perturbed():
                    loss = evaluate()
            else:
                loss = evaluate()
                if self.perturbs_now:
                    with self.perturbed(replay), nullcontext() if start is None else start.again():
                        evaluate()
                elif self.has_begun:
                    between(self.gradient, self.parameter_states())
            finish()
        return loss

    def record_rng(self) -> Callable[[], None]:
        """Record the random streams as they are; the result puts them back, as for `perturbed`."""
        return random_streams(self).put_back

    @contextmanager
    def perturbed(self, replay: Callable[[], None] | None = None) -> Iterator[None]:
        """Weights at w + e(w) inside, bit for bit back at w afterwards, also when the body raises.

        The gradients present at entry give the direction and are consumed: inside, `.grad` starts
        from None, and what the body accumulates there, with what the gradient rule adds to it, is
        what `step` uses. Where their norm is zero or not finite (a GradScaler's overflow) nothing
        is perturbed. Nothing is perturbed either on a step that `every`, `begin` or `tail` skip. A
        method that takes one gradient a step needs none at entry, and no pass before.

        Args:
            replay: what `record_rng()` returned before the first pass. The body draws the same
                random numbers again, as dropout masks, and the streams go on as after one pass.

        Raises:
            RuntimeError: the body drew random numbers, and there is nothing to replay; gradients
                are those that an earlier `perturbed` made: no step was taken on them.
        """
        refuse_made(self.parameters(), self._made)
        states = self.parameter_states()
        refuse_engines(None, self.parameters())
        plain = take_gradients(self.parameters())
        perturbs = self.perturbs_now
        again = perturbs and self.needs_first_pass and any(g is not None for g in plain)
        saved = perturb(self.ascent, states, plain, owned=False) if perturbs else []
        if not self.gradient.combines:
            plain.clear()  # the second pass may need the memory
        try:
            # After the perturbation, which may be a random one.
            before = random_streams(self)
            if replay is not None:
                replay()
            only = [] if self.needs_first_pass else [weight for weight, _ in saved]
            with second_pass() if again else unwritten(only, reads=self.reads_frozen):
                yield
        finally:
            restore(saved)  # before the error leaves, so that training may go on
        if replay is not None:
            before.put_back()
        elif again and not before.are(random_streams(self)):
            raise RuntimeError(
                "the pass within perturbed() drew random numbers (dropout?), others than the first "
                "pass: call replay = optimizer.record_rng() before that, then perturbed(replay)"
            )
        if not perturbs and self.has_begun:
            between(self.gradient, states)
        elif perturbs and self.gradient.combines:
            combine(self.gradient, states, plain)
        self.reads_frozen = self.reads_frozen and not perturbs
        self.gradients_are_ready, self._made = True, gradient_versions(self.parameters())

    def _warn_of_a_plain_step(self) -> None:
        if self.gradients_are_ready or self._warned:
            return
        if not any(p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters()):
            return  # nothing to step on, or how distributed checkpoints make the state
        self._warned = True
        warnings.warn(
            "a sharpness-aware optimizer steps on gradients that loss.backward() made: this is a "
            "plain step of the base optimizer; call flatreg.backward(optimizer, closure, ...)",
            stacklevel=4,
        )


def find_wrapper(optimizer: Any) -> SharpnessAware | None:
    """The sharpness-aware optimizer at or within `optimizer`: Accelerate, Lookahead and others.

    Raises:
        ValueError: a ZeroRedundancyOptimizer lies around it.
    """
    # Lightning's own wrapper takes the class of what it wraps, and has no base.
    return find_instance(optimizer, SharpnessAware, having="base")
