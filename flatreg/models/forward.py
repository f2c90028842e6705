"""One forward pass as a record: what a term may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from flatreg.models.compiled import is_compiled, sharded_parts
from flatreg.models.derivative_check import copied
from flatreg.models.entrance import as_logits, check_weights, pass_copy
from flatreg.models.heads import Head, first_argument
from flatreg.models.pass_start import PassStart
from flatreg.models.state import kept_buffers, kept_gradients, untouched


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that `model` is, or that lies right within it."""
    inner: Any = getattr(model, "_forward_module", model)  # Lightning Fabric's
    inner = getattr(inner, "_orig_mod", inner)  # compiled DDP: as Accelerate nests them
    return inner if isinstance(inner, DistributedDataParallel) else None


def local_module(model: nn.Module) -> nn.Module:
    """The module inside DDP: auxiliary passes must not arm its reducer or broadcast its buffers."""
    ddp = ddp_of(model)
    return model if ddp is None else local_module(ddp.module)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """The module to attack and evaluate: no DDP, torch.compile or autocast, float32 at least.

    Accelerate's mixed precision wraps `forward` in an autocast; it is removed here and put back at
    the end. A bfloat16 model is copied to float32, which is exact, and stays as it is.

    Raises:
        ValueError: the weights are float16, in which attacks find gradients of zero; or they are
            sharded by FSDP2, whose processes must make the same number of passes, and attacks that
            stop early do not.
    """
    module: Any = local_module(model)
    while hasattr(module, "_orig_mod"):
        module = local_module(module._orig_mod)
    if sharded_parts(module):
        raise ValueError(
            "verdicts need whole weights, got a model under FSDP2: gather its weights in a copy"
        )
    dtypes = {p.dtype for p in module.parameters()}
    if torch.float16 in dtypes:
        raise ValueError(
            "verdicts are float32: expected a float32 or bfloat16 model, got torch.float16 "
            "(model.float())"
        )
    # A prepared model may lie inside another, in an average of the weights or behind a transform.
    owns: list[dict[str, Any]] = [part.__dict__ for part in module.modules()]
    names = ("forward", "_compiled_call_impl")
    wrapped = [{name: own[name] for name in names if name in own} for own in owns]
    try:
        for own in owns:
            if "_original_forward" in own:  # Accelerate's mark
                own["forward"] = own["_original_forward"]
            own["_compiled_call_impl"] = None  # set by module.compile()
        whole = copied(module).float() if torch.bfloat16 in dtypes else module
        device = next((p.device.type for p in module.parameters()), "cpu")
        with torch.autocast(device, enabled=False):
            yield whole
    finally:
        for own, before in zip(owns, wrapped, strict=True):
            for name in names:
                own.pop(name, None)
            own.update(before)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[nn.Module]:
    """The module to evaluate, as `in_float32` gives it: in eval mode, and in the end as it was.

    A caller's `inference_mode` is left meanwhile: no graph can be built in it.

    Raises:
        TypeError: this is no module.
        ValueError: as in `in_float32`; a weight is nan, infinite or without a value; an exported
            program.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module, got a {type(model).__name__}: the model comes first, "
            "and a function goes into a module"
        )
    for name, weight in model.named_parameters():
        if is_lazy(weight) or weight.is_meta:
            raise ValueError(
                f"expected weights with values, {name!r} of {type(model).__name__} has none: pass "
                "a batch through a lazy module first, load weights of the meta device"
            )
    with torch.inference_mode(False), in_float32(model) as module, untouched(module):
        check_weights(module)  # first: torch gives no flags back to weights of inference mode
        with kept_gradients(module):
            yield module


@dataclass(frozen=True, eq=False)
class Forward:
    """One pass of a batch through a model.

    Attributes:
        model: the module itself, never its DDP wrapper.
        inputs: `(batch, ...)`; part of the graph when a term requires `"input_gradient"`.
        labels: class indices `(batch,)`, or probabilities `(batch, classes)`.
        logits: `(batch, classes)`.
        head: the last linear map, when a term requires `"features"`.
        captured: input of the head in this pass; read it as `features`.
        precision: autocast as the head saw it.
        start: where the pass started, for others to be compared with it.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    logits: Tensor
    head: Head | None = None
    captured: Tensor | None = None
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    start: PassStart | None = None

    @property
    def features(self) -> Tensor:
        """Input of the head `(batch, features)`.

        Raises:
            ValueError: the pass captured none.
        """
        if self.captured is None:
            raise ValueError(
                'this pass captured no features: a term that reads them requires "features"'
            )
        return self.captured

    @property
    def weight(self) -> Tensor:
        """Weight of the head `(classes, features)`.

        Raises:
            ValueError: the pass has no head.
        """
        if self.head is None:
            raise ValueError('this pass has no head: a term that reads it requires "features"')
        # Reading a weight that is computed may move buffers, as spectral norm does.
        with self.again() if self.head.is_computed else nullcontext():
            return self.head.weight

    def again(self) -> AbstractContextManager[None]:
        """Within, passes start where this one did, and leave no trace in buffers and streams.

        They draw the same dropout masks, so that what they differ in is their inputs or weights.
        """
        return kept_buffers(self.model) if self.start is None else self.start.again()

    def at(self, inputs: Tensor) -> Forward:
        """Pass other inputs, of the same labels, as `again` has it."""
        with self.again():
            return run_forward(self.model, inputs, self.labels, self.head, self.start)

    def logits_at(self, inputs: Tensor) -> Tensor:
        """Logits at other inputs, as `again` has it."""
        return self.at(inputs).logits

    @property
    def drew(self) -> bool:
        """Whether the pass drew random numbers, as far as is known."""
        return self.start is not None and self.start.drew

    def is_repeatable(self, rounding: float = 1e-3) -> bool:
        """Whether the pass, made again from its start, gives the same logits, up to rounding."""
        repeated, logits = self.logits_at(self.inputs).detach(), self.logits.detach()
        rounding = max(rounding, 16 * torch.finfo(logits.dtype).eps)
        # Infinities and nans differ by nothing; each class by its own size, for one may be masked.
        same = (repeated == logits) | (repeated.isnan() & logits.isnan())
        apart = torch.where(same, 0, (repeated - logits).abs())
        size = torch.where(logits.isfinite(), logits.abs(), 0).amax(0)
        return bool((apart <= rounding * size + torch.finfo(logits.dtype).tiny).all())

    def of_rows(self, rows: Tensor) -> Forward:
        """Pass part of the batch by itself, as `again` has it; in the graph if the inputs were."""
        inputs = self.inputs.detach()[rows].requires_grad_(self.inputs.requires_grad)
        with self.again():
            return run_forward(self.model, inputs, self.labels[rows], self.head, self.start)

    def through_head(self) -> Forward:
        """The same pass with the head evaluated anew, at the weights it has now."""
        if self.head is None:
            return self
        with self.precision():
            logits = self.head.logits(self.features)
        return replace(self, logits=logits.to(self.logits.dtype))


def run_forward(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    head: Head | None = None,
    start: PassStart | None = None,
) -> Forward:
    """Pass a batch through `model` (a DDP wrapper too), capturing the inputs of `head` on the way.

    Raises:
        ValueError: a layer of the head was not called exactly once; the model returns no logits,
            as distilled models of timm do under `set_distilled_training(True)`.
    """
    branches = head.branches if head else ()
    calls: list[list[tuple[Tensor, Callable[[], AbstractContextManager[None]]]]]
    calls = [[] for _ in branches]

    def capture(_: nn.Module, args: Any, named: Any, own: list[Any]) -> None:
        features = first_argument(args, named)
        own.append((features, _autocast_now(features.device.type)))

    with ExitStack() as hooks:
        for branch, own in zip(branches, calls, strict=True):
            kept = partial(capture, own=own)
            hooks.enter_context(branch.register_forward_pre_hook(kept, with_kwargs=True))
        logits = as_logits(pass_copy(model, inputs), len(inputs))
    for own, name in zip(calls, head.names if head else (), strict=True):
        if len(own) != 1:
            compiled = not own and is_compiled(model)
            hint = (
                ": hooks set after torch.compile has traced the model are not seen, so evaluate "
                "the objective before any other pass"
                if compiled
                else ": if the model has switched to another, make a new Objective"
            )
            raise ValueError(
                f"the head {name!r} must run once in a pass, it ran {len(own)} times{hint}"
            )
    if start is not None:
        start.holds_behind(logits, *(own[0][0] for own in calls))
    if head is None:
        return Forward(local_module(model), inputs, labels, logits, start=start)
    captured, precision = head.features([own[0][0] for own in calls]), calls[-1][0][1]
    return Forward(local_module(model), inputs, labels, logits, head, captured, precision, start)


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[None]]:
    """Make the autocast context that is on now; without its cache of weights, which may move."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)
