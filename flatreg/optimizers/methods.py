"""The sharpness-aware family by name: each a pair of an ascent rule and a gradient rule."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypedDict, Unpack

from flatreg.optimizers.ascent import Adaptive, Friendly, Global, Layerwise, Random, Relative
from flatreg.optimizers.gradient import Mixed, Reuse, SurrogateGap
from flatreg.optimizers.sharpness_aware import Scope, SharpnessAware


class Options(TypedDict, total=False):
    """What every method takes besides its own: see `SharpnessAware`."""

    scope: Scope | None
    begin: int
    micro_batches: int
    sync_perturbation: bool


class Interval(Options, total=False):
    """The same for methods whose steps can be spaced out."""

    every: int


def SAM(base: Optimizer, *, rho: float = 0.05, **options: Unpack[Interval]) -> SharpnessAware:
    """Sharpness-aware minimisation (Foret et al., ICLR 2021): `Global`, `Perturbed`.

    With `scope=head` and a bound objective, at the price of a plain step.
    """
    return SharpnessAware(base, rho=rho, ascent=Global(), **options)


def ASAM(
    base: Optimizer, *, rho: float = 0.5, eta: float = 0.01, **options: Unpack[Interval]
) -> SharpnessAware:
    """Adaptive SAM (Kwon et al., ICML 2021): `Adaptive`; its radius is about ten times SAM's."""
    return SharpnessAware(base, rho=rho, ascent=Adaptive(eta=eta), **options)


def RelativeSAM(
    base: Optimizer, model: nn.Module, *, rho: float = 0.05, **options: Unpack[Interval]
) -> SharpnessAware:
    """SAM over the perturbations that match relative flatness: `Relative`; ours.

    `model` tells which parameters are grouped or transposed convolutions.
    """
    return SharpnessAware(base, rho=rho, ascent=Relative(), model=model, **options)


def HeadRelativeSAM(
    base: Optimizer, head: nn.Module, *, rho: float = 0.05, **options: Unpack[Interval]
) -> SharpnessAware:
    """`RelativeSAM` on the head alone: with a bound objective, at the price of a plain step; ours.

    `head` is the last linear map, as a module: `find_head(model, inputs).layer`, which holds all
    layers that make it up.
    """
    options["scope"] = head
    return RelativeSAM(base, head, rho=rho, **options)


def RandomSAM(base: Optimizer, *, rho: float = 0.05, **options: Unpack[Interval]) -> SharpnessAware:
    """Average-case: the gradient at weights displaced at random; one pass. `Random`."""
    return SharpnessAware(base, rho=rho, ascent=Random(), **options)


def FriendlySAM(
    base: Optimizer,
    *,
    rho: float = 0.05,
    sigma: float = 1.0,
    decay: float = 0.9,
    **options: Unpack[Interval],
) -> SharpnessAware:
    """Friendly SAM (Li et al., CVPR 2024): `Friendly`; `decay` is the paper's lambda."""
    return SharpnessAware(base, rho=rho, ascent=Friendly(sigma=sigma, decay=decay), **options)


def GSAM(
    base: Optimizer, *, rho: float = 0.05, alpha: float = 0.4, **options: Unpack[Interval]
) -> SharpnessAware:
    """Surrogate-gap SAM (Zhuang et al., ICLR 2022): `Global`, `SurrogateGap`.

    The paper lowers rho along with the learning rate; set it in the groups after each scheduler
    step: `group["rho"] = rho_min + (rho_max - rho_min) * group["lr"] / lr_max`.
    """
    return SharpnessAware(base, rho=rho, gradient=SurrogateGap(alpha=alpha), **options)


def WSAM(
    base: Optimizer, *, rho: float = 0.05, gamma: float = 0.9, **options: Unpack[Interval]
) -> SharpnessAware:
    """Weighted SAM (Yue et al., KDD 2023): `Mixed` with weight gamma/(1 - gamma).

    Both parts go through the base optimizer. The authors' default, which takes the sharpness part
    out of it, moves weights behind the back of clipping and loss scaling and is not offered.

    Raises:
        ValueError: gamma is not in [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    return SharpnessAware(base, rho=rho, gradient=Mixed(weight=gamma / (1 - gamma)), **options)


def GNP(
    base: Optimizer, *, rho: float = 0.05, alpha: float = 0.5, **options: Unpack[Interval]
) -> SharpnessAware:
    """Gradient-norm penalty (Zhao et al., ICML 2022): `Mixed`; lambda of the paper is alpha rho."""
    return SharpnessAware(base, rho=rho, gradient=Mixed(weight=alpha), **options)


def LookSAM(
    base: Optimizer,
    *,
    rho: float = 0.05,
    alpha: float = 0.7,
    every: int = 5,
    **options: Unpack[Options],
) -> SharpnessAware:
    """LookSAM (Liu et al., CVPR 2022): `Reuse` between perturbations on every so many steps."""
    return SharpnessAware(base, rho=rho, gradient=Reuse(alpha=alpha), every=every, **options)


def AWP(base: Optimizer, *, gamma: float = 0.01, **options: Unpack[Interval]) -> SharpnessAware:
    """Adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020): `Layerwise`.

    The weight-space half of adversarial training: with a criterion that attacks, bound by
    `objective.bind`, both passes see the attacked batch. `gamma` is the paper's (0.01 for PGD
    training, 0.005 for TRADES) and is `rho` in the groups; `begin` is its warm-up in steps (the
    paper's is ten epochs). The authors step while the weights are perturbed and let the perturbed
    pass move BatchNorm statistics; here weight decay acts on the weights themselves and statistics
    are those of the unperturbed pass.
    """
    return SharpnessAware(base, rho=gamma, ascent=Layerwise(), **options)
