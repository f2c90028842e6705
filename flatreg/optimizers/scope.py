"""Scopes: which parameters a perturbation moves, and as which linear maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatreg.optimizers.ascent import Slot

Scope = nn.Module | Iterable[Tensor]


def make_slots(
    parameters: Sequence[Tensor], scope: Scope | None, model: nn.Module | None
) -> list[Slot]:
    """One slot a parameter: in the scope or not, and its layout in `model`.

    Raises:
        ValueError: a parameter of the scope is none of the optimizer's.
    """
    inside = None
    if scope is not None:
        chosen = list(scope.parameters() if isinstance(scope, nn.Module) else scope)
        inside = {id(p) for p in chosen}
        missing = len(inside - {id(p) for p in parameters})
        if missing or not chosen:
            raise ValueError(
                f"scope: expected parameters of the base optimizer, got {len(chosen)} of which "
                f"{missing} are not its own"
            )
    layouts = {
        id(module.weight): (module.groups, isinstance(module, _ConvTransposeNd))
        for module in (() if model is None else model.modules())
        if isinstance(module, _ConvNd)
    }
    slots = []
    for p in parameters:
        groups, transposed = layouts.get(id(p), (1, False))
        slots.append(Slot(inside is None or id(p) in inside, groups, transposed))
    return slots


def last_blocks(model: nn.Module, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` blocks of a timm model or of an `nn.Sequential`.

    The head is a block of its own. Blocks are timm's, those of layer-wise learning rates
    (`group_matcher`); those of an `nn.Sequential` are its children that have parameters.

    Raises:
        ValueError: the model does not say what its blocks are, or has fewer.
    """
    blocks = _blocks(model)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count: expected 1 to {len(blocks)} blocks, got {count}")
    return [p for block in blocks[-count:] for p in block]


def _blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    matcher = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters  # where timm models are, timm is

        named = dict(model.named_parameters())
        layers = group_parameters(model, matcher(coarse=False))
        return [[named[name] for name in names] for names in layers.values()]
    if isinstance(model, nn.Sequential):
        children = [child for child in model if any(True for _ in child.parameters())]
        if len(children) == 1:  # as `with_normalization` wraps a model
            return _blocks(children[0])
        return [list(child.parameters()) for child in children]
    raise ValueError(
        f"{type(model).__name__} has no group_matcher and is no nn.Sequential: "
        "pass the parameters of its last blocks yourself"
    )
