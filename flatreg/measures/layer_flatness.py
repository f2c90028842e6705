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

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from flatreg.data.configuration import switch, whole
from flatreg.measures.estimate import Estimate
from flatreg.measures.parameters import (
    Layer,
    LossInWeights,
    SampleLoss,
    Vector,
    computed_anew,
    displaced,
    finite_step,
    inner,
    linear_layers,
    refuse_sharded,
)
from flatreg.measures.weight_hessian import Matrix, curvature_product, push_forward
from flatreg.models.derivative_check import check_derivatives
from flatreg.models.double_backward import Method, check_method, refuse_double_backward
from flatreg.models.entrance import as_logits, pass_copy
from flatreg.models.forward import local_module
from flatreg.models.pass_start import NO_TASK, PassStart, at_the_end_of_backward, on_gradient
from flatreg.models.precision import at_least_float32, cross_entropy
from flatreg.models.state import kept_buffers, untouched

_CHECKPOINTED = (
    "gauss_newton_flatness moves weights for a pass of its own, and checkpointing would run that "
    'pass anew at the weights as they are: switch it off, or use method="double_backward"'
)


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
    matrix: Matrix = "hessian",
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
        matrix: "hessian" or "gauss_newton"; they agree on the head.
        method: "finite_difference" does without second derivatives, at an error of the order of
            its squared step, 1e-2 of the weights.
        seed: of the probes.

    Returns:
        Estimates by layer and for the sum.

    Raises:
        ValueError: there is no such layer, an unknown matrix or method, or the model cannot be
            differentiated twice.
    """
    draws = flatness_draws(
        model,
        inputs,
        labels,
        loss=loss,
        layers=layers,
        num_probes=num_probes,
        matrix=matrix,
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
    matrix: Matrix = "hessian",
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
    num_probes = whole("num_probes", num_probes, 1)
    module = local_module(model)
    chosen = linear_layers(module, layers)
    names = tuple(layer.name for layer in chosen)
    generator = torch.Generator().manual_seed(seed)
    kappa, trace = [], []
    with untouched(module):
        at = LossInWeights.of(module, inputs, labels, loss, names)
        product = curvature_product(at, matrix, method)
        for _ in range(num_probes):
            with torch.no_grad():
                relative = [relative_probe(layer, generator) for layer in chosen]
                plain = [_signs(w.shape, w, generator) for w in at.weights.values()]
            kappa.append(inner(relative, product(relative)))
            trace.append(inner(plain, product(plain)))
    weights = [w.detach() for w in at.weights.values()]
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
    again: Callable[[], AbstractContextManager[None]] | None = None,
) -> Tensor:
    r"""Gauss-Newton relative flatness, summed over layers, from one probe: per sample, >= 0.

    .. math:: \operatorname{Var}_p(u) = \sum_s p_s (u_s - \sum_t p_t u_t)^2 , \qquad u = J V

    with p = softmax(logits), J the Jacobian of the logits in the weights and V a draw of
    `relative_probe` for every layer. For cross-entropy (it needs no labels) an unbiased draw of
    what `layer_flatness` measures with `matrix="gauss_newton"`, a sample at a time. Differentiable
    in the weights, through J, V and p. **Larger means sharper.**

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
        central: take u from two forward passes, at the weights +- h V.
        per_fan_in: divide each layer's part by its n, the inputs of one output: the second-order
            term of the loss under W -> W (I + M), M random with entries of variance 1/n.
        again: context within which a pass starts where that of `logits` did, so that it draws the
            same random numbers (`PassStart.again`); left out, all passes here start where the call
            does.

    Returns:
        `(batch,)`, in the unit of the loss, float32 at least.

    Raises:
        ValueError: an unknown method; the model draws random numbers and `central` is off, cannot
            be differentiated twice, is sharded by FSDP2, or trains none of its layers.
    """
    check_method(method)
    central, per_fan_in = switch("central", central), switch("per_fan_in", per_fan_in)
    model = local_module(model)
    refuse_sharded(model)
    if layers is None:
        found = linear_layers(model)
        layers = [layer for layer in found if layer.weight.requires_grad]
        if not layers:
            raise ValueError(f"layers: expected one that is trained, got {len(found)} frozen ones")
    weights = [layer.weight for layer in layers]
    probe = [relative_probe(layer, generator) for layer in layers]
    if per_fan_in:
        fans = [layer.as_maps(layer.weight).shape[2] for layer in layers]
        probe = [v / n**0.5 for v, n in zip(probe, fans, strict=True)]
    if method == "double_backward":
        refuse_double_backward(model, "gauss_newton_flatness")
        check_derivatives(
            model,
            inputs,
            3,
            "weights",
            what="gauss_newton_flatness",
            alternative='method="finite_difference"',
        )
        return _variance(logits, push_forward(logits, weights, create_graph=True)(probe))
    if step is None:
        step = 1e-2 if logits.dtype in (torch.float32, torch.float64) else 0.1
    h = finite_step(weights, probe, step)
    start = PassStart(model)
    if central:
        ahead, behind = _logits_at(model, inputs, layers, probe, [h, -h], again or start.again)
        return _variance(logits, (ahead - behind) / (2 * h))
    with kept_buffers(model) if again is None else nullcontext():
        (ahead,) = _logits_at(model, inputs, layers, probe, [h], again or nullcontext)
    start.ends()
    if again is None and start.drew:
        raise ValueError(
            "gauss_newton_flatness compares two passes, and this model draws random numbers in "
            "each (dropout): use central=True, or say by again= how the pass of logits started"
        )
    return _variance(logits, (ahead - at_least_float32(logits)) / h)


def _logits_at(
    model: nn.Module,
    inputs: Tensor,
    layers: Sequence[Layer],
    probe: Vector,
    steps: Vector,
    again: Callable[[], AbstractContextManager[None]],
) -> Vector:
    """Logits at the weights + step * probe, every pass within `again`."""
    weights = [layer.weight for layer in layers]
    passes = []
    for step in steps:
        moved = displaced(weights, probe, step)
        named = {layer.parameter: w for layer, w in zip(layers, moved, strict=True)}
        with again(), computed_anew(model), warnings.catch_warnings():
            # torch.compile reads the .grad of every weight, and these are no leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            outputs = pass_copy(partial(functional_call, model, named), inputs)
            logits = as_logits(outputs, len(inputs))
        modules = [model.get_submodule(layer.name) for layer in layers]
        _refuse_forward_in_backward_of(logits, modules, _CHECKPOINTED)
        passes.append(at_least_float32(logits))
    return passes


def _variance(logits: Tensor, change: Tensor) -> Tensor:
    """Variance of `change` under softmax(logits), about its mean: it cancels otherwise."""
    with torch.autocast(logits.device.type, enabled=False):
        p, u = F.softmax(at_least_float32(logits), 1), at_least_float32(change)
        mean = (p * u).sum(1, keepdim=True)
        return (p * (u - mean).square()).sum(1)


class _Refusal:
    """A hook that raises where a backward pass runs its module forward anew."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.handles: list[RemovableHandle] = []

    def begin(self, modules: Sequence[nn.Module]) -> None:
        """A backward pass has come so far that it may."""
        self.handles += [module.register_forward_pre_hook(self) for module in modules]
        at_the_end_of_backward(self.end)

    def end(self) -> None:
        """Take the hooks away."""
        while self.handles:
            self.handles.pop().remove()

    def __call__(self, module: nn.Module, args: object) -> None:
        if torch._C._current_graph_task_id() != NO_TASK:
            raise ValueError(self.why)
        self.end()  # an error has cut that backward pass short


def _refuse_forward_in_backward_of(tensor: Tensor, modules: Sequence[nn.Module], why: str) -> None:
    """Raise where a backward pass from `tensor` runs one of the modules forward anew.

    Raises:
        ValueError: in that backward pass, `why`.
    """
    on_gradient(tensor, lambda: _Refusal(why).begin(modules))
