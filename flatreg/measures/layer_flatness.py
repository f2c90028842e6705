r"""Relative flatness of any layer, and of all layers from one Hessian-vector product.

.. math:: \kappa_l = \sum_{s,s'} \langle w_s, w_{s'} \rangle \operatorname{Tr} H_{s,s'}
          = \mathbb{E}\, \langle V_l, (H V)_l \rangle , \qquad V_l = \sqrt n\, W_l P D

W is a linear layer's weight, or a convolution's as (outputs, n = inputs x kernel), each group of a
grouped one by itself; H is the Hessian of the mean loss, P a random permutation of the n columns
and D random signs. Then E[V_si V_s'j] = <w_s, w_s'> [i = j], which is all it takes; signs of
different layers and groups are independent, so what lies between them vanishes in expectation. No
matrix is factorised, and V is differentiable in W. Beside L Z (L a Cholesky factor or the
symmetric root of W W^T, Z random signs) and W R (R random signs) its standard deviation was the
lowest or level with it, on trained layers of six shapes.

Relative flatness: Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative Flatness and
Generalization", NeurIPS 2021. Trace: Hutchinson, Comm. Statist. Simulation Comput., 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatreg.measures.estimate import Estimate
from flatreg.measures.parameters import (
    Curvature,
    LossInWeights,
    SampleLoss,
    curvature_product,
    inner,
)
from flatreg.models.double_backward import Method
from flatreg.models.forward import local_module
from flatreg.models.precision import cross_entropy
from flatreg.models.state import untouched


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
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear | _ConvNd) or weight is None or id(weight) in weights:
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


@dataclass(frozen=True)
class LayerFlatness:
    """Flatness of one layer; **larger means sharper**. The unit is that of the loss.

    Attributes:
        name: path of the layer.
        kappa: relative flatness.
        trace: trace of the layer's block of the curvature matrix.
        layerwise: ||W||_F^2 times the trace, a coarser relative flatness.
    """

    name: str
    kappa: Estimate
    trace: Estimate
    layerwise: Estimate


@dataclass(frozen=True)
class NetworkFlatness:
    """Flatness of every layer, by name, and of all together.

    Attributes:
        layers: each layer's.
        kappa: sum of kappa over the layers, with its own standard error: the layers share probes.
        trace: sum of the traces.
    """

    layers: dict[str, LayerFlatness]
    kappa: Estimate
    trace: Estimate


@dataclass(frozen=True, eq=False)
class FlatnessDraws:
    """One draw a probe, of one batch: what `combine_flatness` averages over batches.

    Attributes:
        names: of the layers.
        kappa: `(probes, layers)`.
        trace: `(probes, layers)`.
        squared_norms: ||W||_F^2 `(layers,)`.
        samples: in the batch.
    """

    names: tuple[str, ...]
    kappa: Tensor
    trace: Tensor
    squared_norms: Tensor
    samples: int


def relative_probe(layer: Layer, generator: torch.Generator | None = None) -> Tensor:
    """Draw V = sqrt(n) W P D, shaped like the weight and differentiable in it.

    Args:
        layer: whose weight W is.
        generator: of the draw, on any device; left out, the default one of the weight's device.
    """
    maps = layer.as_maps(layer.weight)
    groups, _, n = maps.shape
    device = maps.device if generator is None else generator.device
    order = torch.randperm(n, generator=generator, device=device).to(maps.device)
    signs = _signs((groups, 1, n), maps, generator)
    return layer.as_weight(n**0.5 * maps[..., order] * signs)


def _signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randint(0, 2, shape, generator=generator, device=device).to(like) * 2 - 1


def layer_flatness(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    loss: SampleLoss = cross_entropy,
    layers: Sequence[str] | None = None,
    num_probes: int = 32,
    curvature: Curvature = "hessian",
    method: Method = "double_backward",
    seed: int = 0,
) -> NetworkFlatness:
    r"""Relative flatness and trace of every linear layer and convolution, on one batch.

    Unbiased, by two products with the curvature matrix a probe. Below the head the Hessian is not
    positive semi-definite and kappa may be negative; with the Gauss-Newton matrix every draw of
    the sum over the layers is at least 0. The model is evaluated in eval mode and left untouched.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        inputs: `(batch, ...)`.
        labels: `(batch, ...)`, handed to `loss`.
        loss: `(logits, labels) -> (batch,)`; its mean over the batch is what is differentiated.
        layers: paths of the layers; left out, all.
        num_probes: independent draws, of which the standard error is taken. It does not cover the
            choice of the samples.
        curvature: "hessian" or "gauss_newton"; they agree on the head.
        method: "finite_difference" does without second derivatives, at an error of the order of
            its squared step, 1e-2 of the weights.
        seed: of the probes.

    Returns:
        Estimates by layer and for the sum.

    Raises:
        ValueError: there is no such layer, or the model cannot be differentiated twice.
    """
    draws = flatness_draws(
        model,
        inputs,
        labels,
        loss=loss,
        layers=layers,
        num_probes=num_probes,
        curvature=curvature,
        method=method,
        seed=seed,
    )
    return combine_flatness([draws])


def flatness_draws(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    loss: SampleLoss = cross_entropy,
    layers: Sequence[str] | None = None,
    num_probes: int = 32,
    curvature: Curvature = "hessian",
    method: Method = "double_backward",
    seed: int = 0,
) -> FlatnessDraws:
    """Draws behind `layer_flatness`, whose arguments these are; the same seed, the same probes.

    >>> model = nn.Linear(2, 3)
    >>> batches = [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    >>> flatness = combine_flatness([flatness_draws(model, *batch) for batch in batches])
    >>> flatness.kappa.n
    32
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    module = local_module(model)
    chosen = linear_layers(module, layers)
    generator = torch.Generator().manual_seed(seed)
    kappa, trace = [], []
    with untouched(module):
        at = LossInWeights.of(module, inputs, labels, loss, [layer.parameter for layer in chosen])
        product = curvature_product(at, curvature, method)
        for _ in range(num_probes):
            with torch.no_grad():
                relative = [relative_probe(layer, generator) for layer in chosen]
                plain = [_signs(w.shape, w, generator) for w in at.weights.values()]
            kappa.append(inner(relative, product(relative)))
            trace.append(inner(plain, product(plain)))
    weights = [w.detach() for w in at.weights.values()]
    names = tuple(layer.name for layer in chosen)
    norms = inner(weights, weights)
    return FlatnessDraws(names, torch.stack(kappa), torch.stack(trace), norms, len(inputs))


def combine_flatness(draws: Sequence[FlatnessDraws]) -> NetworkFlatness:
    """Average over batches, each counted by its samples.

    Args:
        draws: of one model at one set of weights, all with the same probes (the same seed).

    Raises:
        ValueError: there are none, or they are of different layers or numbers of probes.
    """
    if not draws:
        raise ValueError("draws: expected at least one batch, got none")
    first = draws[0]
    if any(d.names != first.names or d.kappa.shape != first.kappa.shape for d in draws):
        raise ValueError("draws: expected the same layers and number of probes in every batch")
    samples = sum(d.samples for d in draws)
    kappa = torch.stack([d.kappa.double() * (d.samples / samples) for d in draws]).sum(0)
    trace = torch.stack([d.trace.double() * (d.samples / samples) for d in draws]).sum(0)
    layers = {
        name: LayerFlatness(
            name,
            Estimate.mean(kappa[:, i]),
            Estimate.mean(trace[:, i]),
            Estimate.mean(trace[:, i] * first.squared_norms[i]),
        )
        for i, name in enumerate(first.names)
    }
    return NetworkFlatness(layers, Estimate.mean(kappa.sum(1)), Estimate.mean(trace.sum(1)))
