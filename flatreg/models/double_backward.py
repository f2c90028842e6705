"""Derivatives of derivatives: where they run, and where they must be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from flatreg.models.compiled import is_compiled, sharded_parts

Method = Literal["finite_difference", "double_backward"]

# What to use instead, unless a measure says better: all that have a `method` can do without.
_BY_PASSES = 'method="finite_difference"'
_KINKED = ("ReluBackward", "LeakyReluBackward", "HardtanhBackward", "PreluKernelBackward")


def twice_differentiable() -> AbstractContextManager[None]:
    """Run attention by its formula: the fused kernels have no second derivative."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def check_method(method: str) -> None:
    """Refuse an unknown way to differentiate.

    Raises:
        ValueError: `method` is not one of `Method`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be 'finite_difference' or 'double_backward', got {method!r}")


def refuse_double_backward(model: nn.Module, what: str, alternative: str = _BY_PASSES) -> None:
    """Refuse a model that cannot be differentiated twice, or is so silently wrong.

    Args:
        model: as it is trained, wrappers included.
        what: that needs the second derivative, for the message.
        alternative: that needs forward passes only, for the message.

    Raises:
        ValueError: a part is sharded by FSDP2, compiled, or DDP with a static graph.
    """
    if sharded_parts(model):
        reason = "FSDP2 frees the weights a second derivative needs"
    elif is_compiled(model):
        reason = "torch.compile has no second derivative"
    elif any(isinstance(m, DistributedDataParallel) and m.static_graph for m in model.modules()):
        reason = "DDP(static_graph=True) makes its gradient silently wrong"
    else:
        return
    raise ValueError(f"{what} differentiates twice, and {reason}: use {alternative}")


def is_piecewise_linear(outputs: Tensor) -> bool:
    """Whether the pass behind `outputs` went through ReLU or its kin.

    Between their kinks such a network is linear in its input: second derivatives see the curvature
    of the softmax only.
    """
    return any(node.name().startswith(_KINKED) for node in graph_nodes(outputs))


def is_reentrant(outputs: Tensor) -> bool:
    """Whether the pass behind `outputs` was checkpointed with `use_reentrant=True`.

    Its backward pass reaches `.grad` alone: `autograd.grad` and `backward(inputs=)` fail.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(outputs))


def differentiable_gradient(
    outputs: Tensor,
    inputs: Tensor,
    weights: Tensor | None = None,
    *,
    what: str,
    alternative: str = _BY_PASSES,
) -> Tensor:
    r"""Gradient of :math:`\langle w, \text{outputs} \rangle` in `inputs`, itself differentiable.

    Args:
        outputs: of a pass of `inputs`, of any shape.
        inputs: requiring grad and in the graph of `outputs`.
        weights: w, of the shape of `outputs`; a gradient of the result flows through it too. Left
            out, ones.
        what: that needs the second derivative, for the message.
        alternative: that needs forward passes only, for the message.

    Returns:
        Shaped as `inputs`.

    Raises:
        ValueError: the graph holds an operator without a second derivative.
    """
    w = torch.ones_like(outputs) if weights is None else weights.to(outputs)
    (gradient,) = torch.autograd.grad(outputs, inputs, w, create_graph=True)
    refuse_missing_derivatives(gradient, what, alternative)
    return gradient


def pull_back(
    outputs: Sequence[Tensor], points: Sequence[Tensor], *, create_graph: bool = False
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Make the map of v to the gradient of <outputs, v> in `points`; it keeps the graph.

    Args:
        outputs: in whose graph the points are; one without a graph counts as a constant.
        points: where to differentiate.
        create_graph: whether the result is to be differentiated in its turn.
    """
    varying = [t for t in outputs if t.requires_grad]

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        if not varying:
            return [torch.zeros_like(t) for t in points]
        along = [v.to(t) for v, t in zip(vector, outputs, strict=True) if t.requires_grad]
        graph = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
        return list(torch.autograd.grad(varying, points, along, **graph))

    return product


def refuse_missing_derivatives(tensor: Tensor, what: str, alternative: str = _BY_PASSES) -> None:
    """Find operators without a second derivative by name, before a backward pass fails on them.

    Args:
        tensor: a gradient, with its graph.
        what: that needs the second derivative, for the message.
        alternative: that needs forward passes only, for the message.

    Raises:
        ValueError: the graph holds such an operator.
    """
    if any(node.name().endswith("NotImplemented") for node in graph_nodes(tensor)):
        raise ValueError(
            f"{what} needs a second derivative that an operator of this model lacks "
            f"(hardsigmoid is one, fused attention another): use {alternative}"
        )


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Nodes of the autograd graph behind `tensor`."""
    seen, queue = set(), [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue += [next_node for next_node, _ in node.next_functions]
