r"""Ascent rules: where to perturb the weights, given the gradient there.

Every rule maximises the linearised loss :math:`\langle g, e\rangle` over a set of perturbations
:math:`e` of size `rho`; the sets differ. The wrapper applies :math:`w + e`, takes the second
gradient there, and brings the weights back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor

from flatreg.optimizers.vector import (
    Vector,
    chunks,
    inner,
    is_sharded,
    norm,
    norm_of_shards,
    safe_inverse,
    shards,
)


@dataclass
class Slot:
    """What the wrapper knows of one parameter.

    Attributes:
        perturbed: whether it lies in the scope.
        groups: of a grouped convolution, each of which is a linear map of its own.
        transposed: a transposed convolution, whose first axis is its input.
        memory: what rules keep between steps, by name.
    """

    perturbed: bool = True
    groups: int = 1
    transposed: bool = False
    memory: dict[str, Tensor] = field(default_factory=dict)


class Ascent(Protocol):
    """An ascent rule, frozen and its own configuration.

    `uses_gradient` is False where the direction is drawn at random and no first pass is needed;
    `needs_layout` is True where the rule reads weights as linear maps, for which the wrapper has to
    know the model.
    """

    uses_gradient: ClassVar[bool]
    needs_layout: ClassVar[bool]

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """Turn `gradients`, in place, into directions; return a 0-d scale for each.

        The perturbation is rho * scale * direction. `loss_scale` is what the gradients carry.
        """


@dataclass(frozen=True, kw_only=True)
class Global:
    r"""One L2 ball over all weights: :math:`e = \rho\, g / \|g\|`.

    Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021.
    """

    uses_gradient: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = False

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """Scale of the gradient: see `Ascent`."""
        return _one_scale(gradients)


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    r"""A ball that scales with the weights, :math:`\|T^{-1} e\| \le \rho`.

    .. math:: e = \rho\, T^2 g / \|T g\|, \qquad T = |w| + \eta

    for every parameter (the authors' code has T = 1 on biases). Invariant under rescaling that
    leaves the network's function alone.

    Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning
    of Deep Neural Networks", ICML 2021.
    """

    eta: float = 0.01
    uses_gradient: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = False

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """T^2 g, and 1/||T g||: see `Ascent`."""
        ws, gs, norms = shards(weights), shards(gradients), list[Tensor]()
        for part in chunks(ws):
            t = torch._foreach_abs(ws[part])
            torch._foreach_add_(t, self.eta)
            torch._foreach_mul_(gs[part], t)
            norms.append(norm(gs[part]))
            torch._foreach_mul_(gs[part], t)
            del t  # or it would live beside that of the next chunk
        return _one_scale(gradients, norm_of_shards(norms, gradients))


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    r"""A ball for each matrix, in proportion to it: :math:`e_l = \rho\,\|w_l\|\,g_l/\|g_l\|`.

    Parameters of fewer than two axes stay where they are, as in the authors' code.

    Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020.
    """

    uses_gradient: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = False

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """||w||/||g|| for each layer: see `Ascent`."""
        nothing = torch.zeros((), device=gradients[0].device)
        return [
            norm([w]) * safe_inverse(norm([g])) if w.ndim > 1 else nothing.to(g.device)
            for w, g in zip(weights, gradients, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Relative:
    r"""The perturbations that match relative flatness, :math:`\{W M : \|M\|_F \le \rho\}`.

    .. math:: e(W) = \rho\, W (W^\top G) / \|W^\top G\|_F, \qquad G = \partial L/\partial W

    with one norm over all layers; W is output times input, convolutions reshaped, each group of a
    grouped one by itself. Parameters of fewer than two axes stay where they are. Equivariant under
    W -> W/c with the layer's input scaled by c. Ours; the set is that of Petzka, Kamp, Adilova,
    Sminchisescu, Boley, "Relative Flatness and Generalization", NeurIPS 2021.

    Raises:
        ValueError: weights are sharded, as under FSDP2; the rule needs them whole.
    """

    uses_gradient: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """W W^T G, and 1/||W^T G||: see `Ascent`."""
        if is_sharded(weights):
            raise ValueError("the relative ascent rule needs whole weights, got FSDP2's shards")
        squared = []
        for weight, gradient, slot in zip(weights, gradients, slots, strict=True):
            if weight.ndim > 1:
                w, g = _as_maps(weight, slot), _as_maps(gradient, slot)
                # (W W^T) G is W (W^T G) at the price of the smaller Gram matrix.
                wide = w.shape[-1] > w.shape[-2]
                direction = (w @ w.mT) @ g if wide else w @ (w.mT @ g)
                squared.append(inner([g], [direction]))  # <G, W W^T G> = ||W^T G||^2
                gradient.copy_(_as_weight(direction, weight, slot))
        if not squared:
            return [torch.zeros((), device=g.device) for g in gradients]
        length = torch.stack([s.to(squared[0].device) for s in squared]).sum().sqrt()
        scale, nothing = safe_inverse(length), torch.zeros_like(length)
        return [
            (scale if w.ndim > 1 else nothing).to(g.device)
            for w, g in zip(weights, gradients, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Random(Global):
    r"""Average-case: :math:`e = \rho\, z/\|z\|`, z standard normal. One pass, no gradient.

    Draws from torch's default generator, so each process goes its own way unless the perturbation
    is synchronised.
    """

    uses_gradient: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Friendly:
    r"""Along the batch's own noise: the gradient less its running mean.

    .. math:: e = \rho\,d/\|d\|, \; d = g - \sigma m, \; m \leftarrow \lambda m + (1-\lambda) g

    with m from before the update (zero on the first step), as in the authors' code. m is kept
    unscaled, in float32 at least, and skips batches whose gradient overflowed.

    Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024.
    """

    sigma: float = 1.0
    decay: float = 0.9
    uses_gradient: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = False

    def __call__(
        self, weights: Vector, gradients: Vector, slots: Sequence[Slot], loss_scale: Tensor | float
    ) -> list[Tensor]:
        """d, and 1/||d||: see `Ascent`."""
        usable = norm(gradients).isfinite()
        for gradient, slot in zip(shards(gradients), slots, strict=True):
            scale = loss_scale.to(gradient.device) if isinstance(loss_scale, Tensor) else loss_scale
            wide = torch.promote_types(gradient.dtype, torch.float32)
            unscaled = torch.where(usable.to(gradient.device), gradient.to(wide) / scale, 0)
            mean = slot.memory.get("friendly_mean")
            if mean is None:
                slot.memory["friendly_mean"] = unscaled
                continue
            gradient.copy_(gradient - self.sigma * mean * scale)
            mean.lerp_(unscaled, usable.to(gradient.device, wide) * (1 - self.decay))
        return _one_scale(gradients)


def _one_scale(directions: Vector, length: Tensor | None = None) -> list[Tensor]:
    """1/norm for all, the same tensor for all on one device."""
    scale = safe_inverse(norm(directions) if length is None else length)
    on = {device: scale.to(device) for device in {d.device for d in directions}}
    return [on[d.device] for d in directions]


def _as_maps(weight: Tensor, slot: Slot) -> Tensor:
    """Weight as linear maps (groups, outputs, inputs)."""
    flat = weight.reshape(*weight.shape[:2], -1)
    if slot.transposed:
        return rearrange(flat, "(g i) o k -> g o (i k)", g=slot.groups)
    return rearrange(flat, "(g o) i k -> g o (i k)", g=slot.groups)


def _as_weight(maps: Tensor, weight: Tensor, slot: Slot) -> Tensor:
    k = weight.shape[2:].numel()
    if slot.transposed:
        return rearrange(maps, "g o (i k) -> (g i) o k", k=k).reshape(weight.shape)
    return rearrange(maps, "g o (i k) -> (g o) i k", k=k).reshape(weight.shape)
