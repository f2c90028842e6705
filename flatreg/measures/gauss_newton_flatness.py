r"""Relative flatness of all layers as a penalty: per sample, never negative, differentiable.

.. math:: \operatorname{Var}_p(u) = \sum_s p_s (u_s - \sum_t p_t u_t)^2 , \qquad u = J V

with p = softmax(logits), J the Jacobian of the logits in the weights and V a draw of
`relative_probe` for every layer: an unbiased draw of the Gauss-Newton relative flatness, summed
over the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from flatreg.measures.layer_flatness import Layer, linear_layers, relative_probe
from flatreg.measures.parameters import (
    ALTERNATIVE,
    Vector,
    displaced,
    finite_step,
    push_forward,
    refuse_sharded,
)
from flatreg.models.double_backward import Method, refuse_double_backward
from flatreg.models.forward import local_module
from flatreg.models.precision import at_least_float32
from flatreg.models.state import frozen_statistics, record_rng


def gauss_newton_flatness(
    model: nn.Module,
    inputs: Tensor,
    logits: Tensor,
    *,
    layers: Sequence[Layer] | None = None,
    generator: torch.Generator | None = None,
    method: Method = "finite_difference",
    step: float | None = None,
    central: bool = False,
    per_fan_in: bool = False,
) -> Tensor:
    r"""Gauss-Newton relative flatness, summed over layers, from one probe: per sample, >= 0.

    .. math:: \operatorname{Var}_p(u) = \sum_s p_s (u_s - \sum_t p_t u_t)^2 , \qquad u = J V

    with p = softmax(logits) and J the Jacobian of the logits in the weights: for cross-entropy (it
    needs no labels) an unbiased draw of what `layer_flatness` measures with
    `curvature="gauss_newton"`, a sample at a time. Differentiable in the weights, through J, V and
    p. **Larger means sharper.**

    Args:
        model: in the mode it trains in; BatchNorm statistics do not move.
        inputs: `(batch, ...)`.
        logits: of `model` at `inputs` `(batch, classes)`, with their graph.
        layers: see `linear_layers`; left out, those that are trained. Hand them in while
            training, to save the search.
        generator: of the probe; left out, the default one.
        method: "finite_difference" takes u from one more forward pass, at the weights + h V, and
            works under DDP, autocast and torch.compile. "double_backward" takes u from the graph
            of `logits`, exactly; attention must have run under `twice_differentiable`.
        step: length of h V as a share of that of the weights. Left out, 1e-2, and 0.1 for logits
            in half precision, where 1e-2 drowns in rounding.
        central: take u from two forward passes, at the weights +- h V, which draw the same random
            numbers; for a model with dropout.
        per_fan_in: divide each layer's part by its n, the inputs of one output: the second-order
            term of the loss under W -> W (I + M), M random with entries of variance 1/n.

    Returns:
        `(batch,)`, in the unit of the loss, float32 at least.

    Raises:
        ValueError: the model draws random numbers and `central` is off, cannot be differentiated
            twice, is sharded by FSDP2, or trains none of its layers.
    """
    model = local_module(model)
    refuse_sharded(model)
    chosen = _trained(linear_layers(model)) if layers is None else tuple(layers)
    probe = [relative_probe(layer, generator) for layer in chosen]
    if per_fan_in:
        fans = [layer.as_maps(layer.weight).shape[2] for layer in chosen]
        probe = [v / n**0.5 for v, n in zip(probe, fans, strict=True)]
    if method == "double_backward":
        _refuse_third_derivative(model)
        weights = [layer.weight for layer in chosen]
        return _variance(logits, push_forward(logits, weights, create_graph=True)(probe))
    if step is None:
        step = 1e-2 if logits.dtype in (torch.float32, torch.float64) else 0.1
    h = finite_step([layer.weight for layer in chosen], probe, step)
    if central:
        ahead, behind = _logits_at(model, inputs, chosen, probe, [h, -h])
        return _variance(logits, (ahead - behind) / (2 * h))
    streams = _random_streams(logits)
    (ahead,) = _logits_at(model, inputs, chosen, probe, [h])
    if any(
        not torch.equal(*states) for states in zip(streams, _random_streams(logits), strict=True)
    ):
        raise ValueError(
            "gauss_newton_flatness compares two passes, and this model draws random numbers in "
            "each (dropout): use central=True"
        )
    return _variance(logits, (ahead - at_least_float32(logits)) / h)


def _refuse_third_derivative(model: nn.Module) -> None:
    refuse_double_backward(model, "gauss_newton_flatness", ALTERNATIVE)
    if any(isinstance(m, _BatchNorm | _InstanceNorm) and m.training for m in model.modules()):
        raise ValueError(
            "gauss_newton_flatness by double backward needs a third derivative, which BatchNorm "
            f"and InstanceNorm lack in train mode: use {ALTERNATIVE}"
        )


def _logits_at(
    model: nn.Module, inputs: Tensor, layers: Sequence[Layer], probe: Vector, steps: Vector
) -> Vector:
    """Logits at the weights + step * probe, every pass with the same random numbers."""
    weights = [layer.weight for layer in layers]
    restore_rng = record_rng(model)
    passes = []
    for step in steps:
        restore_rng()
        moved = displaced(weights, probe, step)
        named = {layer.parameter: w for layer, w in zip(layers, moved, strict=True)}
        with frozen_statistics(model), warnings.catch_warnings():
            # torch.compile looks at the .grad of every weight, and these are no leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            passes.append(at_least_float32(functional_call(model, named, (inputs,))))
    return passes


def _random_streams(like: Tensor) -> Vector:
    """States of the generators that a pass on the device of `like` draws from."""
    states = [torch.get_rng_state()]
    if like.device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(like.device).get_rng_state(like.device))
    return states


def _trained(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    chosen = tuple(layer for layer in layers if layer.weight.requires_grad)
    if not chosen:
        raise ValueError(f"layers: expected one that is trained, got {len(layers)} frozen ones")
    return chosen


def _variance(logits: Tensor, change: Tensor) -> Tensor:
    """Variance of `change` under softmax(logits), about its mean: it cancels otherwise."""
    with torch.autocast(logits.device.type, enabled=False):
        p, u = F.softmax(at_least_float32(logits), 1), at_least_float32(change)
        mean = (p * u).sum(1, keepdim=True)
        return (p * (u - mean).square()).sum(1)
