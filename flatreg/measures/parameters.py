"""The weights: which are linear maps, and the loss of a batch as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatreg.models.compiled import sharded_parts
from flatreg.models.double_backward import is_reentrant
from flatreg.models.entrance import check_weights, outside_inference, pass_copy
from flatreg.models.forward import local_module
from flatreg.models.precision import at_least_float32, cross_entropy
from flatreg.models.state import modes_of, put_modes

SampleLoss = Callable[[Tensor, Tensor], Tensor]
Vector = list[Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or a convolution, as `groups` linear maps.

    Attributes:
        name: path of the module.
        parameter: path of its weight.
        weight: the weight itself.
        groups: of a grouped convolution, each of which is a linear map of its own.
        transposed: a transposed convolution, whose first axis is its input.
    """

    name: str
    parameter: str
    weight: Tensor
    groups: int = 1
    transposed: bool = False

    def as_maps(self, weight: Tensor) -> Tensor:
        """Reshape a tensor like the weight to (groups, outputs, inputs)."""
        return as_maps(weight, self.groups, self.transposed)

    def as_weight(self, maps: Tensor) -> Tensor:
        """Undo `as_maps`."""
        return as_weight(maps, self.weight.shape, self.transposed)


def as_maps(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Weight of a linear layer or a convolution, reshaped to (groups, outputs, inputs)."""
    flat = weight.reshape(*weight.shape[:2], -1)
    pattern = "(g i) o k -> g o (i k)" if transposed else "(g o) i k -> g o (i k)"
    return rearrange(flat, pattern, g=groups)


def as_weight(maps: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """Undo `as_maps` for a weight of this shape."""
    pattern = "g o (i k) -> (g i) o k" if transposed else "g o (i k) -> (g o) i k"
    return rearrange(maps, pattern, k=shape[2:].numel()).reshape(shape)


def linear_layers(model: nn.Module, names: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """Linear layers and convolutions of `model` (a DDP wrapper too), in order; tied weights once.

    Weights that are no parameter of their module (weight norm by parametrization) and the input
    projection of `nn.MultiheadAttention` are not among them.

    Args:
        model: any module.
        names: paths of the wanted layers; left out, all.

    Raises:
        ValueError: a name is no such layer, or there is none at all.
    """
    found: dict[str, Layer] = {}
    weights: set[int] = set()
    for name, module in local_module(model).named_modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            continue  # first: modules of TorchScript have no such dictionary of parameters
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in weights:
            continue
        weights.add(id(weight))
        found[name] = Layer(
            name,
            f"{name}.weight" if name else "weight",
            weight,
            module.groups if isinstance(module, _ConvNd) else 1,
            isinstance(module, _ConvTransposeNd),
        )
    chosen = list(found) if names is None else list(names)
    missing = [name for name in chosen if name not in found]
    if missing or not chosen:
        raise ValueError(
            f"layers: expected linear layers or convolutions of {type(model).__name__}, "
            f"got {missing or 'none'}"
        )
    return tuple(found[name] for name in chosen)


@dataclass(frozen=True, eq=False)
class LossInWeights:
    """Mean loss of one batch as a function of some of the weights; the model is not touched.

    Attributes:
        model: the module itself, never its DDP wrapper.
        inputs: `(batch, ...)`.
        labels: `(batch, ...)`, handed to `loss`.
        loss: `(logits, labels) -> (batch,)`.
        weights: where to take derivatives, by path: leaves that share the model's storage.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: SampleLoss
    weights: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        loss: SampleLoss = cross_entropy,
        layers: Sequence[str] | None = None,
    ) -> LossInWeights:
        """In the weights of the `linear_layers` of these paths; left out, in all parameters.

        Raises:
            ValueError: there is no sample; the model is sharded by FSDP2, has no such layer, or a
                weight that is not finite.
        """
        if not len(inputs):
            raise ValueError("expected a batch of one sample or more, got an empty one")
        model = local_module(model)
        refuse_sharded(model)
        check_weights(model)
        chosen = dict(model.named_parameters())
        if layers is not None:
            chosen = {la.parameter: chosen[la.parameter] for la in linear_layers(model, layers)}
        leaves = {path: p.detach().requires_grad_() for path, p in chosen.items()}
        return cls(model, outside_inference(inputs), outside_inference(labels), loss, leaves)

    def logits(self, weights: Vector) -> Tensor:
        """Logits `(batch, classes)` at these weights.

        Raises:
            ValueError: the model has a reentrant checkpoint, or casts its layers to and fro.
        """
        named = dict(zip(self.weights, weights, strict=True))
        with computed_anew(self.model):
            return _logits(partial(functional_call, self.model, named), self.inputs, weights)

    def __call__(self, weights: Vector) -> Tensor:
        """Mean loss at these weights."""
        return self.loss(self.logits(weights), self.labels).mean()

    @torch.enable_grad()
    def gradient(self, weights: Vector) -> tuple[Tensor, Vector]:
        """Mean loss at these weights and its gradient, both detached."""
        points = [w.detach().requires_grad_() for w in weights]
        named = dict(zip((f"model.{path}" for path in self.weights), points, strict=True))
        within = _LossAndGradient(self.model, self.loss, points)
        with computed_anew(self.model):
            found: tuple[Tensor, Vector] = functional_call(
                within, named, (self.inputs, self.labels)
            )
        return found


@contextmanager
def computed_anew(model: nn.Module) -> Iterator[None]:
    """Pass at other weights: modules use nothing that they computed of them before, nor keep it."""
    modes = modes_of(model)
    put_modes(modes)
    try:
        yield
    finally:
        put_modes(modes)


def _logits(model: Callable[[Tensor], Tensor], inputs: Tensor, weights: Vector) -> Tensor:
    graded = [w for w in weights if torch.is_grad_enabled() and w.requires_grad]
    before = [(w.dtype, get_gradient_edge(w).node) for w in graded]
    # The gradient of the inputs shows a reentrant checkpoint, which hides the weights in it: their
    # derivatives would be 0.
    logits: Tensor = pass_copy(model, inputs.detach().requires_grad_(inputs.is_floating_point()))
    if isinstance(logits, Tensor) and is_reentrant(logits):
        raise ValueError(
            "curvature in the weights does not see through checkpoints with use_reentrant=True: "
            "set use_reentrant=False, or switch checkpointing off"
        )
    # A weight that was cast and cast back has another node than the graph: its derivatives would
    # be 0.
    after = [(w.dtype, get_gradient_edge(w).node) for w in graded]
    if any(a[0] == b[0] and a[1] != b[1] for a, b in zip(after, before, strict=True)):
        raise ValueError(
            "curvature in the weights needs layers that stay as they are in a pass, this forward "
            "casts or moves them and puts them back: use autocast, or cast their weights where "
            "they are used, as F.linear(x, self.head.weight.bfloat16())"
        )
    return logits


class _LossAndGradient(nn.Module):
    """A functional call of it ends after the backward pass, which may run layers anew."""

    def __init__(self, model: nn.Module, loss: SampleLoss, points: Vector) -> None:
        super().__init__()
        self.model, self.loss, self.points = model, loss, points

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Vector]:
        value = self.loss(_logits(self.model, inputs, self.points), labels).mean()
        found = torch.autograd.grad(value, self.points, materialize_grads=True)
        return value.detach(), list(found)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that cannot be replaced in a functional call.

    Raises:
        ValueError: a part of the model is sharded by FSDP2.
    """
    if sharded_parts(model):
        raise ValueError("curvature in the weights needs whole weights, got a model under FSDP2")


def finite_step(weights: Vector, direction: Vector, step: float) -> Tensor:
    """Factor h at which h `direction` is `step` times as long as `weights`; a constant."""
    norm = torch.linalg.vector_norm
    size, length = (
        norm(torch.stack([norm(at_least_float32(t.detach())) for t in v]))
        for v in (weights, direction)
    )
    return torch.where((size > 0) & (length > 0), step * size / length, step)


def displaced(weights: Vector, direction: Vector, step: Tensor) -> Vector:
    """The point `weights` + `step` `direction`, in the precision of the weights."""
    return [w + (step * d).to(w.dtype) for w, d in zip(weights, direction, strict=True)]


def inner(first: Vector, second: Vector) -> Tensor:
    """Inner products, one a tensor `(len,)`, in float32 at least."""
    pairs = zip(map(at_least_float32, first), map(at_least_float32, second), strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs])


def gaussian(weights: Vector, generator: torch.Generator) -> Vector:
    """Standard normal, shaped like the weights, drawn on the CPU: the same on every device."""
    return [torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device) for w in weights]
