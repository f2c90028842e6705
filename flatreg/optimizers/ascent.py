r"""Ascent rules: where to perturb the weights, given the gradient there; the perturbation itself.

Every rule maximises the linearised loss :math:`\langle g, e\rangle` over a set of perturbations
:math:`e` of size `rho`; the sets differ. `perturb` moves the weights to :math:`w + e`, `restore`
brings them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.measures.parameters import as_maps, as_weight
from flatreg.optimizers.closure import Gradients
from flatreg.optimizers.parameter_state import ParameterState, States
from flatreg.optimizers.vector import (
    Vector,
    as_sharded,
    average_whole,
    chunks,
    displace,
    inner,
    is_sharded,
    norm,
    norm_of_norms,
    norms,
    refuse_sparse,
    safe_inverse,
    shards,
    undo,
)
from flatreg.terms.protocol import Amount, Share

Saved = list[tuple[Tensor, Tensor]]
Scale = Tensor | float
NO_MOMENTUM = (
    "expected a base optimizer with a momentum of each weight in its state, got one without: write "
    "SGD(..., momentum=0.9) or another base, set sam_rho=0 in groups without, or use StaleSAM"
)


class Ascent(Protocol):
    """An ascent rule, frozen and its own configuration.

    `needs_layout` is True where the rule reads weights as linear maps, for which the wrapper has to
    know the model. A rule that needs no first pass is a `WithoutGradient` as well.
    """

    needs_layout: ClassVar[bool]

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """Scales, 0-d, one for each parameter; turns `gradients`, in place, into directions.

        The perturbation of a parameter is rho * scale * direction.

        Args:
            states: the parameters.
            gradients: one for each, multiplied by `loss_scale`.
            loss_scale: of a GradScaler or an accelerator.
        """


@runtime_checkable
class WithoutGradient(Ascent, Protocol):
    """An ascent rule that knows its directions before any pass: one gradient a step."""

    def directions(self, states: States) -> list[Tensor | None]:
        """What `__call__` gets as gradients, its own to write; None where a weight stays."""

    def around_step(self, states: States) -> AbstractContextManager[None]:
        """What the rule takes from the step of the base optimizer, and from its `.grad` before."""


@configuration
class Global:
    r"""One L2 ball over all weights: :math:`e = \rho\, g / \|g\|`.

    Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021.
    """

    needs_layout: ClassVar[bool] = False

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """Scale of the gradient: see `Ascent`."""
        return _one_scale(gradients)


@configuration
class Adaptive:
    r"""A ball that scales with the weights, :math:`\|T^{-1} e\| \le \rho`.

    .. math:: e = \rho\, T^2 g / \|T g\|, \qquad T = |w| + \eta

    for every parameter (the authors' code has T = 1 on biases). Invariant under a rescaling of the
    weights that does not change the network's function.

    Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning
    of Deep Neural Networks", ICML 2021.
    """

    eta: Amount = 0.01
    needs_layout: ClassVar[bool] = False

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """T^2 g, and 1/||T g||: see `Ascent`."""
        ws, gs = shards([s.weight for s in states]), shards(gradients)
        lengths: list[Tensor] = []
        for part in chunks(ws):
            t = torch._foreach_abs(ws[part])
            torch._foreach_add_(t, self.eta)
            torch._foreach_mul_(gs[part], t)
            lengths += norms(gs[part])
            torch._foreach_mul_(gs[part], t)
            del t  # or it would live beside that of the next chunk
        return _one_scale(gradients, norm_of_norms(lengths, gradients))


@configuration
class Layerwise:
    r"""A ball for each matrix, in proportion to it: :math:`e_l = \rho\,\|w_l\|\,g_l/\|g_l\|`.

    Parameters of fewer than two axes stay where they are, as in the authors' code.

    Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020.
    """

    needs_layout: ClassVar[bool] = False

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """||w||/||g|| for each layer: see `Ascent`."""
        nothing = torch.zeros((), device=gradients[0].device)
        return [
            norm([s.weight]) * safe_inverse(norm([g])) if g.ndim > 1 else nothing.to(g.device)
            for s, g in zip(states, gradients, strict=True)
        ]


@configuration
class Relative:
    r"""The perturbations that match relative flatness, :math:`\{W M : \|M\|_F \le \rho\}`.

    .. math:: e(W) = \rho\, W (W^\top G) / \|W^\top G\|_F, \qquad G = \partial L/\partial W

    with one norm over all layers; W is output times input, convolutions reshaped, each group of a
    grouped one by itself. Parameters of fewer than two axes stay where they are. Equivariant under
    W -> W/c with the layer's input scaled by c. Ours; the set is that of Petzka, Kamp, Adilova,
    Sminchisescu, Boley, "Relative Flatness and Generalization", NeurIPS 2021.

    Of complex weights, the conjugate transpose.

    Raises:
        ValueError: weights are sharded, as under FSDP2; the rule needs them whole.
    """

    needs_layout: ClassVar[bool] = True

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """W W^T G, and 1/||W^T G||: see `Ascent`."""
        if is_sharded([s.weight for s in states]):
            raise ValueError("the relative ascent rule needs whole weights, got FSDP2's shards")
        squared = []
        for state, gradient in zip(states, gradients, strict=True):
            if gradient.ndim > 1:
                w = as_maps(state.weight, state.groups, state.transposed)
                g = as_maps(gradient, state.groups, state.transposed)
                # (W W^H) G is W (W^H G) at the price of the smaller Gram matrix.
                wide = w.shape[-1] > w.shape[-2]
                direction = (w @ w.mH) @ g if wide else w @ (w.mH @ g)
                squared.append(inner([g], [direction]))  # <G, W W^T G> = ||W^T G||^2
                gradient.copy_(as_weight(direction, gradient.shape, state.transposed))
        if not squared:
            return [torch.zeros((), device=g.device) for g in gradients]
        length = torch.stack([s.to(squared[0].device) for s in squared]).sum().sqrt()
        scale, nothing = safe_inverse(length), torch.zeros_like(length)
        return [(scale if g.ndim > 1 else nothing).to(g.device) for g in gradients]


@configuration
class Random(Global):
    r"""Average-case: :math:`e = \rho\, z/\|z\|`, z standard normal. One gradient.

    Draws from torch's default generator, so that processes perturb differently unless the
    perturbation is synchronised.

    Raises:
        ValueError: some weights are sharded by FSDP2, and others whole.
    """

    def directions(self, states: States) -> list[Tensor | None]:
        """z: see `WithoutGradient`."""
        sharded = [is_sharded([state.weight]) for state in states]
        if any(sharded) and not all(sharded):
            raise ValueError("a random perturbation needs all weights sharded by FSDP2, or none")
        return [torch.randn_like(state.weight) for state in states]

    def around_step(self, states: States) -> AbstractContextManager[None]:
        """Nothing: see `WithoutGradient`."""
        return nullcontext()


@configuration
class Momentum(Global):
    r"""Against the momentum of the base optimizer: :math:`e = -\rho\, v/\|v\|`. One gradient.

    v is what the base optimizer keeps before this step, in its state: `momentum_buffer` as SGD,
    `exp_avg` as Adam, or `momentum`. Weights move by -v, so e looks ahead, as Nesterov's step, and
    the gradient there is the one that the base optimizer steps on. The first step is plain, as v is
    0, and so it is for a weight that the last step did not reach, which did not move. The authors
    keep the weights perturbed between two steps; here they are w there.

    Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational
    Overhead", arXiv 2401.12033, 2024.

    Raises:
        ValueError: after a step, the base optimizer has no momentum of a weight.
    """

    def directions(self, states: States) -> list[Tensor | None]:
        """-v: see `WithoutGradient`."""
        found = [None if "unreached" in state.memory else state.momentum for state in states]
        pairs = zip(found, states, strict=True)
        return [None if v is None else -v.to(state.weight.dtype) for v, state in pairs]

    @contextmanager
    def around_step(self, states: States) -> Iterator[None]:
        """Looks whether the step left a momentum, and whom it passed by: see `WithoutGradient`."""
        inside = [state for state in states if state.in_scope]
        refuse_sparse([state.weight.grad for state in inside])
        reached = [state.weight.grad is not None for state in inside]
        yield
        for state, moved in zip(inside, reached, strict=True):
            if moved and state.momentum is None and state.rho != 0:
                raise ValueError(NO_MOMENTUM)
            if moved:
                state.memory.pop("unreached", None)
            elif state.momentum is not None:
                state.memory["unreached"] = torch.ones(())


@configuration
class Stale(Global):
    r"""Along the gradient of the last step: :math:`e = \rho\, g_{t-1}/\|g_{t-1}\|`. One gradient.

    :math:`g_{t-1}` is the gradient that the base optimizer stepped on last: at weights perturbed in
    their turn, of all micro-batches, averaged over processes, clipped. It takes a copy of the
    weights in memory. One that is not finite leaves the one before. The first step is plain.

    The idea is that of Jo, Lim, Lee, "Asynchronous Sharpness-Aware Minimization for Fast and
    Accurate Deep Learning", arXiv 2503.11147, 2025, who take :math:`g_{t-1}` at the weights
    themselves, in a process of its own.

    Raises:
        ValueError: a gradient is sparse.
    """

    def directions(self, states: States) -> list[Tensor | None]:
        """The last gradient: see `WithoutGradient`."""
        kept = [(state.memory.get("last_gradient"), state.weight.dtype) for state in states]
        return [None if g is None else g.to(dtype, copy=True) for g, dtype in kept]

    @contextmanager
    def around_step(self, states: States) -> Iterator[None]:
        """Keeps a copy of the gradient: see `WithoutGradient`."""
        inside = [state for state in states if state.in_scope]
        found = [state.weight.grad for state in inside if state.weight.grad is not None]
        refuse_sparse(found)
        if found:
            with torch.no_grad():
                finite = norm(found).isfinite()
                for state in inside:
                    gradient = state.weight.grad
                    if gradient is not None and "last_gradient" not in state.memory:
                        state.memory["last_gradient"] = torch.zeros_like(gradient)
                    if "last_gradient" in state.memory:
                        (kept,) = shards([state.memory["last_gradient"]])
                        (new,) = shards([torch.zeros_like(kept) if gradient is None else gradient])
                        kept.copy_(torch.where(finite.to(kept.device), new, kept))
        yield


@configuration
class Friendly:
    r"""Along the batch's own noise: the gradient less its running mean.

    .. math:: e = \rho\,d/\|d\|, \; d = g - \sigma m, \; m \leftarrow \lambda m + (1-\lambda) g

    with m from before the update. m starts as the first gradient, after the first step, as in the
    authors' code. It is kept unscaled, in float32 at least, and skips batches whose gradient is
    zero until it has started, or overflowed at any time.

    Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024.
    """

    sigma: Amount = 1.0
    decay: Share = 0.9
    needs_layout: ClassVar[bool] = False

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """d, and 1/||d||: see `Ascent`."""
        length = norm(gradients)
        finite = length.isfinite()
        flags: dict[Any, tuple[Tensor, Tensor]] = {}  # on each device, made once
        for whole, gradient, state in zip(gradients, shards(gradients), states, strict=True):
            device, memory = gradient.device, state.memory
            wide = torch.promote_types(gradient.dtype, torch.float32)
            if (device, wide) not in flags:
                counts = (finite & (length > 0)).to(device)
                flags[device, wide] = finite.to(device, wide.to_real()), counts
            usable, counts = flags[device, wide]
            scale = loss_scale.to(device) if isinstance(loss_scale, Tensor) else loss_scale
            unscaled = torch.where(counts, gradient.to(wide) / scale, 0)
            if "friendly_mean" not in memory:
                memory["friendly_mean"] = as_sharded(torch.zeros_like(unscaled), whole)
                memory["friendly_started"] = torch.zeros((), device=device, dtype=usable.dtype)
            (mean,), started = shards([memory["friendly_mean"]]), memory["friendly_started"]
            gradient.copy_(gradient - self.sigma * mean * scale)
            # All of the first gradient, of later ones 1 - decay, of an overflow nothing.
            part = usable.addcmul(usable, started.to(usable), value=-self.decay)
            mean.lerp_(unscaled, part.to(mean.dtype))
            started.logical_or_(counts)
        return _one_scale(gradients)


def _one_scale(directions: Vector, length: Tensor | None = None) -> list[Tensor]:
    """1/norm for all, the same tensor for all on one device."""
    scale = safe_inverse(norm(directions) if length is None else length)
    on = {device: scale.to(device) for device in {d.device for d in directions}}
    return [on[d.device] for d in directions]


@torch.no_grad()
def perturb(
    ascent: Ascent,
    states: States,
    gradients: Gradients,
    *,
    owned: bool,
    loss_scale: Scale = 1.0,
    average: Callable[[Sequence[Tensor]], None] | None = None,
) -> Saved:
    """Move the weights to w + e(w); `restore` brings them back.

    Args:
        ascent: the rule.
        states: the parameters; those outside the scope stay where they are.
        gradients: one for each, or None where a pass did not reach it; a rule that needs none has
            directions of its own in their place.
        owned: whether the memory of the gradients may be used up. Gradients that DDP has reduced
            may be views into its buckets, which must not be written.
        loss_scale: what the gradients were multiplied by.
        average: averages tensors over processes, in place.

    Returns:
        The weights that moved, each with its value before; for `undo`, DTensors with their shards.

    Raises:
        ValueError: a gradient is sparse; as the rule.
    """
    moved: list[ParameterState] = []
    directions: list[Tensor] = []
    pairs = zip(states, gradients, strict=True)
    inside = [(s, g) for s, g in pairs if s.in_scope and s.weight.requires_grad]
    if isinstance(ascent, WithoutGradient):
        chosen = [state for state, _ in inside]
        inside, owned = list(zip(chosen, ascent.directions(chosen), strict=True)), True
    for state, gradient in inside:
        if gradient is None:
            if average is None:
                continue
            direction = torch.zeros_like(state.weight)  # another process may have a gradient here
        else:
            refuse_sparse([gradient])
            own = owned and gradient.dtype == state.weight.dtype
            direction = gradient if own else gradient.to(state.weight.dtype, copy=True)
        moved.append(state)
        directions.append(direction)
    if not moved:
        return []
    if average is not None:
        average(directions)
    average_whole(directions, [state.weight for state in states])
    scales = ascent(moved, directions, loss_scale)
    weights = shards([state.weight for state in moved])
    saved = [(s.weight, w) for s, w in zip(moved, weights, strict=True) if w is not s.weight]
    try:
        displace(weights, shards(directions), _times_rho(scales, moved), saved)
    except BaseException:
        undo(saved)  # an interrupt may come halfway
        raise
    torch.clear_autocast_cache()  # it may hold copies of the weights as they were
    return saved


@torch.no_grad()
def restore(saved: Saved) -> None:
    """Bring back, bit for bit, the weights that `perturb` moved."""
    undo(saved)
    saved.clear()  # what comes next may need the memory
    torch.clear_autocast_cache()


def _times_rho(scales: Sequence[Tensor], states: States) -> list[Tensor]:
    """Products of scale and rho; equal pairs share a tensor, which `displace` applies at once."""
    products: dict[tuple[int, float], Tensor] = {}
    for scale, state in zip(scales, states, strict=True):
        key = (id(scale), float(state.rho))
        if key not in products:
            products[key] = scale * state.rho
    return [products[id(s), float(state.rho)] for s, state in zip(scales, states, strict=True)]
