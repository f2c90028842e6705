"""Find the last linear map of a classifier, and prove that it makes the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.isolation import untouched


@dataclass(frozen=True)
class Head:
    """The last linear map: logits = weight @ features + bias. `name` is its path in the model."""

    layer: nn.Linear
    name: str

    @property
    def weight(self) -> Tensor:
        """Class weights `(classes, features)`, as they are now."""
        return self.layer.weight


@torch.no_grad()
def find_head(model: nn.Module, inputs: Tensor, *, layer: str | None = None) -> Head:
    """Return the `nn.Linear` (subclasses too) whose input and weight reproduce the logits.

    One pass of two samples in eval mode, which leaves no trace in the model, records every linear
    layer that is called; the last one, or the one named `layer`, must satisfy `F.linear(features,
    weight, bias) == logits` up to rounding.

    Args:
        model: a classifier `(batch, ...) -> (batch, classes)`.
        inputs: at least one sample.
        layer: path of the head within `model`, when it is not the last linear layer called.

    Raises:
        ValueError: no such layer exists; the message says why.
    """
    names = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, output: calls.append((m, args[0], output)))
        for module in names
    ]
    try:
        with untouched(model):
            logits = model(inputs[:2])
    finally:
        for hook in hooks:
            hook.remove()
    if layer is not None:
        calls = [call for call in calls if names[call[0]] == layer]

    def refusal(reason: str) -> ValueError:
        wanted = f"layer {layer!r}" if layer else "the last linear layer"
        return ValueError(f"no head found in {type(model).__name__}: {wanted} {reason}")

    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise refusal(f"needs logits of shape (batch, classes), the model returns {shape}")
    if not calls:
        raise refusal("was not called (nn.Linear is what flatreg can use)")
    module, features, output = calls[-1]
    name = names[module]
    if sum(called[0] is module for called in calls) > 1:
        raise refusal(f"({name}) is called more than once in a pass")
    if features.ndim != 2 or module.out_features != logits.shape[1]:
        raise refusal(
            f"({name}) maps {tuple(features.shape)} to {module.out_features} outputs, "
            f"the logits have shape {tuple(logits.shape)}"
        )
    # In the precision of the layer's output: autocast, if any, was inside the model.
    dtype, eps = output.dtype, torch.finfo(output.dtype).eps
    features, weight = features.to(dtype), module.weight.to(dtype)
    bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.to(dtype)
    remade = F.linear(features, weight, bias)
    # Rounding of a sum is bounded by its terms; 8 covers the order in which a kernel adds them.
    scale = F.linear(features.abs().float(), weight.abs().float(), bias.abs().float())
    error = torch.maximum((remade - output).abs().float() / 8, (output - logits).abs().float())
    if not bool((error <= eps * scale).all()):
        raise refusal(f"({name}) does not reproduce the logits: off by {float(error.max()):.3g}")
    return Head(module, name)
