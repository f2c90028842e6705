"""Derivatives of derivatives: where they run, and where they must be refused."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel


def twice_differentiable() -> AbstractContextManager[None]:
    """Run attention by its formula: the fused kernels have no second derivative."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def refuse_double_backward(model: nn.Module, what: str, twin: str) -> None:
    """Refuse a model that cannot be differentiated twice, or is so silently wrong.

    Args:
        model: as it is trained, wrappers included.
        what: that needs the second derivative, for the message.
        twin: that needs forward passes only, for the message.

    Raises:
        ValueError: a part is sharded by FSDP2, compiled, or DDP with a static graph.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reason = "FSDP2 frees the weights a second derivative needs"
        elif hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            reason = "torch.compile has no second derivative"
        elif isinstance(module, DistributedDataParallel) and module.static_graph:
            reason = "DDP(static_graph=True) makes its gradient silently wrong"
        else:
            continue
        raise ValueError(f"{what} differentiates twice, and {reason}: use {twin}")


def refuse_missing_derivatives(tensor: Tensor, what: str, twin: str) -> None:
    """Find operators without a second derivative by name, before a backward pass fails on them.

    Args:
        tensor: a gradient, with its graph.
        what: that needs the second derivative, for the message.
        twin: that needs forward passes only, for the message.

    Raises:
        ValueError: the graph holds such an operator.
    """
    seen, queue = set(), [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("NotImplemented"):
            raise ValueError(
                f"{what} needs a second derivative that an operator of this model lacks "
                f"(hardsigmoid is one, fused attention another): use {twin}"
            )
        queue += [next_node for next_node, _ in node.next_functions]
