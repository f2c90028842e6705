"""Linear layers and convolutions of a model, as the linear maps they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatreg.forward import local_module


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
        flat = weight.reshape(*weight.shape[:2], -1)
        pattern = "(g i) o k -> g o (i k)" if self.transposed else "(g o) i k -> g o (i k)"
        return rearrange(flat, pattern, g=self.groups)

    def as_weight(self, maps: Tensor) -> Tensor:
        """Undo `as_maps`."""
        pattern = "g o (i k) -> (g i) o k" if self.transposed else "g o (i k) -> (g o) i k"
        flat = rearrange(maps, pattern, k=self.weight.shape[2:].numel())
        return flat.reshape(self.weight.shape)


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
