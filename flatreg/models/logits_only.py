"""Models that return more than logits, such as those of transformers, as images to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class LogitsOnly(nn.Module):
    """A model, `model`, of whose outputs the logits are kept."""

    def __init__(self, model: nn.Module, output: str | int = "logits") -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, inputs: Tensor) -> Any:
        """Pass `inputs` `(batch, ...)`; the result is not looked at, as that of any model."""
        outputs: Any = self.model(inputs)
        named = isinstance(self.output, str) and not isinstance(outputs, Mapping)
        try:
            return getattr(outputs, str(self.output)) if named else outputs[self.output]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected outputs with {self.output!r}, {type(self.model).__name__} returns "
                f"{_described(outputs)}: give their name or place as logits_only(model, output)"
            ) from error


def logits_only(model: nn.Module, output: str | int = "logits") -> LogitsOnly:
    """Put a model that returns several outputs into a module that returns its logits alone.

    Image classifiers of Hugging Face transformers return such outputs. The result is a model as
    every part of flatreg takes it: it shares the parameters of `model`, and its head is found in
    it. `flatreg.with_normalization` goes around it.

    Args:
        model: it takes a batch of images as its first argument, and needs no other.
        output: where the logits are: their name, as attribute or key, or their place in a tuple.

    Raises:
        ValueError: the model lies in DDP, which goes around the result. A pass: there is no such
            output.
        TypeError: this is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"logits_only: expected an nn.Module, got a {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("logits_only goes inside DDP: give it the module, and DDP its result")
    return LogitsOnly(model, output)


def _described(outputs: object) -> str:
    """Kind of some outputs, with their names or their number."""
    kind = type(outputs).__name__
    if isinstance(outputs, Mapping):
        return f"a {kind} with {', '.join(map(str, outputs))}"
    return f"a {kind} of {len(outputs)}" if isinstance(outputs, (tuple, list)) else f"a {kind}"
