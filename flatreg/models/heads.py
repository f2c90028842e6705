"""Find the last linear map of a classifier, and prove that it makes the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from flatreg.models.double_backward import graph_nodes
from flatreg.models.entrance import pass_copy
from flatreg.models.precision import at_least_float32
from flatreg.models.state import untouched

Branch = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Head:
    r"""The last linear map of a classifier, which one layer or the mean of several make up.

    The mean of n linear maps is one linear map of their inputs side by side:

    .. math:: z = \tfrac1n \sum_i (W_i \phi_i + b_i) = W \phi + b, \quad
              W = \tfrac1n [W_1 \cdots W_n], \quad b = \tfrac1n \sum_i b_i

    Attributes:
        branches: the layers, `nn.Linear` or a 1x1 `nn.Conv2d` of a 1x1 image.
        names: their paths in the model.
        is_tied: whether what comes before the layers depends on their parameters too.
    """

    branches: tuple[Branch, ...]
    names: tuple[str, ...]
    is_tied: bool = False

    @property
    def name(self) -> str:
        """Paths of the layers in the model, joined by "+"."""
        return "+".join(self.names)

    @property
    def layer(self) -> nn.Module:
        """The layer, or a list module of the layers: what a scope takes."""
        return self.branches[0] if len(self.branches) == 1 else nn.ModuleList(self.branches)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the layers."""
        return self.layer.parameters()

    @property
    def is_computed(self) -> bool:
        """Whether a pass computes what the layers hold: a parametrization, or a hook, may do so.

        Weight normalisation, spectral normalisation and pruning do.
        """
        return any(
            is_parametrized(b) or b._forward_pre_hooks or b._forward_hooks for b in self.branches
        )

    @property
    def weight(self) -> Tensor:
        """Class weights `(classes, features)`, as they are now; gradients reach the layers.

        Raises:
            ValueError: they are sharded.
        """
        if any(isinstance(branch.weight, DTensor) for branch in self.branches):
            raise ValueError(
                f"the weight of the head {self.name!r} is sharded (FSDP2): expected a whole one"
            )
        weights = [branch.weight.flatten(1) for branch in self.branches]
        return weights[0] if len(weights) == 1 else torch.cat(weights, 1) / len(weights)

    @property
    def bias(self) -> Tensor | None:
        """Bias `(classes,)`; None where no layer has one."""
        biases = [branch.bias for branch in self.branches if branch.bias is not None]
        if not biases:
            return None
        count = len(self.branches)
        return biases[0] if count == 1 else torch.stack(biases).sum(0) / count

    def features(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of the layers, in their order, side by side: `(batch, features)`."""
        # A model may have squeezed the axis of a batch of one away.
        flat = [x[None] if x.ndim == 1 else x.flatten(1) for x in inputs]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def logits(self, features: Tensor) -> Tensor:
        """Map `(batch, features)` to `(batch, classes)`, at the weights as they are now."""
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer in the pass; a 1x1 image counts as a vector."""

    layer: Branch
    name: str
    features: Tensor
    output: Tensor


@torch.no_grad()
def find_head(model: nn.Module, inputs: Tensor, *, layer: str | None = None) -> Head:
    """Return the linear map whose features and weight reproduce the logits.

    A pass of two samples in eval mode, which leaves no trace in the model, records every
    `nn.Linear` (subclasses too) and every 1x1 convolution of a 1x1 image. The last one called, or
    the one named `layer`, or the mean of the last n called, must satisfy `F.linear(features,
    weight, bias) == logits` up to rounding. A second pass replaces what these layers return by
    random numbers, which must arrive in the logits, past no other trained parameter.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        inputs: at least one sample.
        layer: path of the head within `model`, when it is not the last linear layer called.

    Raises:
        ValueError: no such map exists; the message says why.
    """
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        two = torch.cat([inputs[:2], inputs[:1]])[:2]  # a model may squeeze a batch of one
        logits, calls = _record(model, two)
        if layer is not None:
            calls = [call for call in calls if call.name == layer]
        wanted = f"layer {layer!r}" if layer else "the last linear layer"
        refused = f"no head found in {type(model).__name__}: {wanted} "
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            hint = "" if isinstance(logits, Tensor) else ": give flatreg.logits_only(model)"
            raise ValueError(
                f"{refused}needs logits of shape (batch, classes), the model returns {shape}{hint}"
            )
        if not calls:
            raise ValueError(
                f"{refused}was not called (nn.Linear and 1x1 nn.Conv2d are what flatreg can use)"
            )
        # How many of the last calls return one number a class: they may be branches of a mean.
        fits = [call.output.shape == logits.shape for call in calls]
        trailing = next((n for n, fit in enumerate(reversed(fits)) if not fit), len(fits))
        refusal = ""
        for count in (1, *range(2, trailing + 1)):
            head, branches = _head(calls[-count:]), calls[-count:]
            reason = _differs(logits, calls, count)
            if not reason:
                reason = _loses_outputs(model, two, branches)
                if not reason:
                    return replace(head, is_tied=_is_tied(head, branches))
                refusal = f"({head.name}) {reason}"  # the map is right, so this says more
            refusal = refusal or f"({head.name}) {reason}"
    raise ValueError(
        f"{refused}{refusal}: use what needs no head, as LayerFlatness for RelativeFlatness"
    )


def _record(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[_Call]]:
    """Logits and, in order, the calls of layers that could be a head."""
    calls: list[_Call] = []

    def hook(name: str, layer: Branch, args: Any, named: Any, output: Tensor) -> None:
        features = first_argument(args, named)
        if isinstance(layer, nn.Conv2d):
            if not features.shape[-2:] == output.shape[-2:] == (1, 1):
                return
            features, output = features.flatten(1), output.flatten(1)
        calls.append(_Call(layer, name, features, output))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
            if isinstance(module, nn.Linear) or (pointwise and module.groups == 1):
                own = partial(hook, name)
                hooks.enter_context(module.register_forward_hook(own, with_kwargs=True))
        with torch.enable_grad():  # for `_is_tied`
            return pass_copy(model, inputs), calls


def first_argument(args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a hook's layer was called with: `layer(x)` or `layer(input=x)`."""
    return args[0] if args else next(iter(named.values()))


def _head(calls: Sequence[_Call]) -> Head:
    return Head(tuple(call.layer for call in calls), tuple(call.name for call in calls))


def _differs(logits: Tensor, calls: Sequence[_Call], count: int) -> str:
    """Reason why the mean of the last `count` calls is not the logits; empty where it is."""
    branches = calls[-count:]
    for call in branches:
        if sum(other.layer is call.layer for other in calls) > 1:
            return "is called more than once in a pass"
        if call.features.ndim != 2 or call.output.shape != logits.shape:
            return (
                f"maps {tuple(call.features.shape)} to {call.output.shape[-1]} outputs, "
                f"the logits have shape {tuple(logits.shape)}"
            )
    eps = max(torch.finfo(t.dtype).eps for t in (logits, branches[0].output))
    scales = []
    for call in branches:
        error, scale = _linear_error(call)
        scales.append(scale)
        if not bool((error <= 8 * eps * scale).all()):  # 8 for the order in which a kernel adds
            return _off(error)
    error = (_mean([call.output for call in branches]) - logits).abs()
    return "" if bool((error <= count * eps * _mean(scales)).all()) else _off(error)


def _off(error: Tensor) -> str:
    return f"does not reproduce the logits: off by {float(error.max()):.3g}"


def _linear_error(call: _Call) -> tuple[Tensor, Tensor]:
    """Distance of a layer's output from its linear map, and the size of the terms of that sum."""
    # In the precision of the layer's output: autocast, if any, was inside the model.
    head, dtype = _head([call]), call.output.dtype
    features, weight = call.features.to(dtype), head.weight.to(dtype)
    bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias.to(dtype)
    mapped = F.linear(features, weight, bias)
    terms = (at_least_float32(t.abs()) for t in (features, weight, bias))
    return at_least_float32((mapped - call.output).abs()), F.linear(*terms)


def _loses_outputs(model: nn.Module, inputs: Tensor, branches: Sequence[_Call]) -> str:
    """Reason why random outputs of the layers do not arrive as the logits; empty where they do.

    Weights that are zero prove nothing, and a learned mixture of heads starts as their mean: random
    outputs must arrive as their mean, and no trained parameter may be met on the way.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = [
        torch.randn(call.output.shape, generator=generator).to(call.output) for call in branches
    ]
    with ExitStack() as hooks, torch.enable_grad():
        for call, new in zip(branches, outputs, strict=True):
            hooks.enter_context(
                call.layer.register_forward_hook(lambda _, args, out, new=new: new.view(out.shape))
            )
        arrived = pass_copy(model, inputs)
    eps = max(torch.finfo(t.dtype).eps for t in (arrived, *outputs))
    error = (_mean(outputs) - arrived.detach()).abs()
    if not bool((error <= len(branches) * eps * _mean([t.abs() for t in outputs])).all()):
        return f"does not make the logits alone: off by {float(error.max()):.3g}"
    leaves = {id(node.variable) for node in graph_nodes(arrived) if hasattr(node, "variable")}
    met = [name for name, p in model.named_parameters() if id(p) in leaves]
    return f"does not make the logits alone: they depend on {', '.join(met)}" if met else ""


def _is_tied(head: Head, branches: Sequence[_Call]) -> bool:
    """Whether the features depend on a parameter of the head, as with a weight of two layers."""
    own = {id(p) for p in head.parameters()}
    nodes = (node for call in branches for node in graph_nodes(call.features))
    return any(id(getattr(node, "variable", None)) in own for node in nodes)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return at_least_float32(torch.stack(list(tensors))).mean(0)
