"""The sharpness-aware family by name: each a pair of an ascent rule and a gradient rule.

A method is one function, and its place in `METHODS`. Its keyword-only arguments, with their ranges
and defaults, are the settings that a recipe has for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import ParamSpec, TypedDict, Unpack

from flatreg.data.configuration import first_mistake, number
from flatreg.data.text import did_you_mean
from flatreg.models.heads import find_head
from flatreg.optimizers.ascent import (
    NO_MOMENTUM,
    Adaptive,
    Friendly,
    Global,
    Layerwise,
    Momentum,
    Random,
    Relative,
    Stale,
)
from flatreg.optimizers.gradient import Mixed, Reuse, SurrogateGap
from flatreg.optimizers.inner_optimizer import refuse_base
from flatreg.optimizers.parameter_state import Scope, last_blocks
from flatreg.optimizers.sharpness_aware import SharpnessAware
from flatreg.terms.protocol import Amount, Count, Fraction, Number, Share


class Options(TypedDict, total=False):
    """What every method takes besides its own: see `SharpnessAware`."""

    scope: Scope | None
    begin: int
    tail: float
    micro_batches: int
    sync_perturbation: bool


class Interval(Options, total=False):
    """The same for methods whose steps can be spaced out."""

    every: int


P = ParamSpec("P")
_MODULES = ("model", "head")  # what some methods take after the optimizer


def _of_an_optimizer(method: Callable[P, SharpnessAware]) -> Callable[P, SharpnessAware]:
    """A method that says what it takes to those who know SAM(parameters, AdamW, ...)."""

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> SharpnessAware:
        if args:
            refuse_base(args[0])
        for second in (*args[1:2], *(kwargs[name] for name in _MODULES if name in kwargs)):
            if not isinstance(second, nn.Module):
                hint = ": give settings by name, as rho=0.05" if isinstance(second, Real) else ""
                raise TypeError(
                    f"expected a module after the optimizer, got a {type(second).__name__}{hint}"
                )
        check_settings(method, kwargs)
        return method(*args, **kwargs)

    return checked


def check_settings(method: Callable[..., SharpnessAware], settings: Mapping[str, Any]) -> None:
    """Refuse settings that the method has not, or that are out of their range, by its own names.

    Raises:
        ValueError: there is one.
    """
    parameters = inspect.signature(method, eval_str=True).parameters
    own = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    known = [*own, *get_type_hints(Interval)]
    for name, value in settings.items():
        place = f"{method.__name__}: {name}"
        if name not in known and name not in parameters:
            near = did_you_mean(name, known)
            raise ValueError(f"{place}: expected one of {', '.join(known)}; no such setting{near}")
        if name in own and name not in ("rho", "gamma"):  # radii, and WSAM's, say it themselves
            if isinstance(value, bool):
                raise ValueError(f"{place}: expected a number, got {value}")
            try:
                TypeAdapter(own[name]).validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{place}: {first_mistake(error)}") from None


@_of_an_optimizer
def SAM(base: Optimizer, *, rho: Amount = 0.05, **options: Unpack[Interval]) -> SharpnessAware:
    """Sharpness-aware minimisation (Foret et al., ICLR 2021): `Global`, `Perturbed`.

    With `scope=head` and a bound objective, at the price of a plain step.
    """
    return SharpnessAware(base, rho=rho, ascent=Global(), **options)


@_of_an_optimizer
def ASAM(
    base: Optimizer, *, rho: Amount = 0.5, eta: Amount = 0.01, **options: Unpack[Interval]
) -> SharpnessAware:
    """Adaptive SAM (Kwon et al., ICML 2021): `Adaptive`; its radius is about ten times SAM's."""
    return SharpnessAware(base, rho=rho, ascent=Adaptive(eta=eta), **options)


@_of_an_optimizer
def RelativeSAM(
    base: Optimizer, model: nn.Module, *, rho: Amount = 0.05, **options: Unpack[Interval]
) -> SharpnessAware:
    """SAM over the perturbations that match relative flatness: `Relative`; ours.

    `model` tells which parameters are grouped or transposed convolutions.
    """
    return SharpnessAware(base, rho=rho, ascent=Relative(), model=model, **options)


@_of_an_optimizer
def HeadRelativeSAM(
    base: Optimizer, head: nn.Module, *, rho: Amount = 0.05, **options: Unpack[Interval]
) -> SharpnessAware:
    """`RelativeSAM` on the head alone: with a bound objective, at the price of a plain step; ours.

    `head` is the last linear map, as a module: `find_head(model, inputs).layer`, which holds all
    layers that make it up. A recipe says `kind: RelativeSAM` with `scope: head`.
    """
    options["scope"] = head
    return RelativeSAM(base, head, rho=rho, **options)


@_of_an_optimizer
def RandomSAM(
    base: Optimizer, *, rho: Amount = 0.05, **options: Unpack[Interval]
) -> SharpnessAware:
    """Average-case: the gradient at weights displaced at random; one pass. `Random`."""
    return SharpnessAware(base, rho=rho, ascent=Random(), **options)


@_of_an_optimizer
def MomentumSAM(
    base: Optimizer, *, rho: Amount = 0.3, **options: Unpack[Interval]
) -> SharpnessAware:
    """Momentum-SAM (Becker, Altrock, Risse, 2024): `Momentum`; one gradient a step.

    The default is that of the authors' code; the runs that they describe have rho=3.

    Raises:
        ValueError: a group of `base` has momentum=0 and a radius.
    """
    wrapper = SharpnessAware(base, rho=rho, ascent=Momentum(), **options)
    if any(group.get("momentum") == 0 and group["sam_rho"] != 0 for group in base.param_groups):
        raise ValueError(NO_MOMENTUM)
    return wrapper


@_of_an_optimizer
def StaleSAM(base: Optimizer, *, rho: Amount = 0.05, **options: Unpack[Interval]) -> SharpnessAware:
    """SAM along the gradient of the last step, the idea of AsyncSAM (Jo, Lim, Lee, 2025): `Stale`.

    One gradient a step, and a copy of the weights in memory.
    """
    return SharpnessAware(base, rho=rho, ascent=Stale(), **options)


@_of_an_optimizer
def FriendlySAM(
    base: Optimizer,
    *,
    rho: Amount = 0.05,
    sigma: Amount = 1.0,
    decay: Share = 0.9,
    **options: Unpack[Interval],
) -> SharpnessAware:
    """Friendly SAM (Li et al., CVPR 2024): `Friendly`; `decay` is the paper's lambda."""
    return SharpnessAware(base, rho=rho, ascent=Friendly(sigma=sigma, decay=decay), **options)


@_of_an_optimizer
def GSAM(
    base: Optimizer, *, rho: Amount = 0.05, alpha: Amount = 0.4, **options: Unpack[Interval]
) -> SharpnessAware:
    """Surrogate-gap SAM (Zhuang et al., ICLR 2022): `Global`, `SurrogateGap`.

    The paper lowers rho along with the learning rate; set it in the groups after each scheduler
    step: `group["sam_rho"] = rho_min + (rho_max - rho_min) * group["lr"] / lr_max`.
    """
    return SharpnessAware(base, rho=rho, gradient=SurrogateGap(alpha=alpha), **options)


@_of_an_optimizer
def WSAM(
    base: Optimizer,
    *,
    rho: Amount = 0.05,
    gamma: Annotated[Number, Field(ge=0, lt=1)] = 0.9,
    **options: Unpack[Interval],
) -> SharpnessAware:
    """Weighted SAM (Yue et al., KDD 2023): `Mixed` with weight gamma/(1 - gamma).

    Both parts go through the base optimizer. The authors' default, which takes the sharpness part
    out of it, moves the weights past clipping and loss scaling, and is not offered.

    Raises:
        ValueError: gamma is not in [0, 1).
    """
    gamma = number("gamma", gamma, "[0, 1)")
    return SharpnessAware(base, rho=rho, gradient=Mixed(weight=gamma / (1 - gamma)), **options)


@_of_an_optimizer
def GNP(
    base: Optimizer, *, rho: Amount = 0.05, alpha: Amount = 0.5, **options: Unpack[Interval]
) -> SharpnessAware:
    """Gradient-norm penalty (Zhao et al., ICML 2022): `Mixed`; lambda of the paper is alpha rho."""
    return SharpnessAware(base, rho=rho, gradient=Mixed(weight=alpha), **options)


@_of_an_optimizer
def LookSAM(
    base: Optimizer,
    *,
    rho: Amount = 0.05,
    alpha: Amount = 0.7,
    every: Count = 5,
    **options: Unpack[Options],
) -> SharpnessAware:
    """LookSAM (Liu et al., CVPR 2022): `Reuse` between perturbations on every so many steps."""
    return SharpnessAware(base, rho=rho, gradient=Reuse(alpha=alpha), every=every, **options)


@_of_an_optimizer
def AWP(base: Optimizer, *, gamma: Amount = 0.01, **options: Unpack[Interval]) -> SharpnessAware:
    """Adversarial weight perturbation (Wu, Xia, Wang, NeurIPS 2020): `Layerwise`.

    The weight-space half of adversarial training: with a criterion that attacks, bound by
    `objective.bind`, both passes see the attacked batch. `gamma` is the paper's (0.01 for PGD
    training, 0.005 for TRADES) and is `sam_rho` in the groups; `begin` is its warm-up in steps (the
    paper's is ten epochs). The authors step while the weights are perturbed and let the perturbed
    pass move BatchNorm statistics; here weight decay acts on the weights themselves and statistics
    are those of the unperturbed pass.
    """
    return SharpnessAware(base, rho=gamma, ascent=Layerwise(), **options)


METHODS: tuple[Callable[..., SharpnessAware], ...] = (
    SAM,
    ASAM,
    RelativeSAM,
    RandomSAM,
    MomentumSAM,
    StaleSAM,
    FriendlySAM,
    GSAM,
    WSAM,
    GNP,
    LookSAM,
    AWP,
)


class MethodSettings(BaseModel):
    """What a recipe says of any method; each has its own settings besides.

    `scope` is the head or the number of last blocks, all parameters by default. Before
    `begin_epoch`, the warm-up, the optimizer takes plain steps; with `tail`, also while its
    learning rate is more than so large a part of the highest so far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: ClassVar[Callable[..., SharpnessAware]]

    scope: Literal["head"] | Count | None = None
    every: Count = 1
    begin_epoch: Amount = 0.0
    tail: Fraction = 1.0
    micro_batches: Count = 1
    sync_perturbation: bool = False


def settings_of(methods: Sequence[Callable[..., SharpnessAware]]) -> Any:
    """The union of the methods' settings, told apart by `kind`, each read off a signature."""
    found = []
    for method in methods:
        kind = method.__name__
        fields: dict[str, Any] = {"kind": (Literal[kind], kind)}
        for name, parameter in inspect.signature(method, eval_str=True).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                required = parameter.default is parameter.empty
                fields[name] = (parameter.annotation, ... if required else parameter.default)
        settings = create_model(kind, __base__=MethodSettings, __doc__=method.__doc__, **fields)
        settings.method = method
        found.append(settings)
    return Annotated[Union[tuple(found)], Field(discriminator="kind")]  # noqa: UP007


if TYPE_CHECKING:
    Wrapper = MethodSettings
else:
    Wrapper = settings_of(METHODS)


def wrap(
    settings: Wrapper, base: Optimizer, model: nn.Module, inputs: Tensor, steps_per_epoch: int
) -> SharpnessAware:
    """Wrap `base` by the method of these settings.

    Args:
        settings: of a recipe.
        base: the optimizer of `model`.
        model: a timm model behind its normalisation.
        inputs: two images, on which the head is proven where it is the scope.
        steps_per_epoch: of the training; turns `begin_epoch` into a step.

    Raises:
        ValueError: no head is found, or the model has fewer blocks.
    """
    method = type(settings).method
    options: dict[str, Any] = settings.model_dump(exclude={"kind", "scope", "begin_epoch"})
    options["begin"] = round(settings.begin_epoch * steps_per_epoch)
    if settings.scope == "head":
        options["scope"] = find_head(model, inputs).layer
    elif settings.scope is not None:
        options["scope"] = last_blocks(model, settings.scope)
    if "model" in inspect.signature(method).parameters:
        options["model"] = model
    return method(base, **options)
