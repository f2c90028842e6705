"""Proof on a model that its derivatives of higher order are what they should be.

torch has operators whose derivatives leave a part out in silence: the third one of LayerNorm, the
second one of weight normalisation and of any function with a backward of its own that computes
outside of the graph. A loss that differentiates twice then has a wrong gradient, and only a
comparison shows it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flatreg.models.double_backward import twice_differentiable
from flatreg.models.entrance import as_logits, pass_copy
from flatreg.models.pass_start import PassStart

_SAMPLES, _DRAWS = 2, 3
# Steps, relative to the weights, and how far their differences may lie apart, relative to them. The
# larger are for models that compute in float32 within; at the smallest these see rounding alone.
_FINE, _COARSE = ((1e-7, 1e-6, 1e-5), 1e-5), ((1e-3, 3e-3, 1e-2), 5e-3)
_WRONG = 5  # times that
# What has been proven, for the parameters that are trained, and the kinds and modes of the modules.
_Case = tuple[int, str, tuple[bool, ...], tuple[tuple[type[nn.Module], bool], ...]]
_PROVEN: WeakKeyDictionary[nn.Module, set[_Case]] = WeakKeyDictionary()

Leaves = Literal["inputs", "weights"]


def check_derivatives(
    model: nn.Module, inputs: Tensor, order: int, of: Leaves, *, what: str, alternative: str
) -> None:
    """Compare the derivative of this order, by autograd, with a difference of the one below.

    A copy of the model in float64 passes two samples, every time with the same random numbers, and
    is differentiated along random directions. Nothing is concluded where differences of several
    steps do not agree, and where the first derivative is not that of the pass: such a model stops
    gradients on purpose. A model is checked once for each derivative, and again when a module of
    another class takes the place of one.

    Args:
        model: the module itself, in the mode it trains in; it stays as it is.
        inputs: `(batch, ...)`.
        order: 2 or 3.
        of: what the derivatives below this order are in; the last one is in inputs and weights.
        what: that needs the derivative, for the message.
        alternative: that needs forward passes only, for the message.

    Raises:
        ValueError: autograd has a wrong derivative, or none.
    """
    trained = tuple(p.requires_grad for p in model.parameters())
    case = order, of, trained, tuple((type(m), m.training) for m in model.modules())
    known = _PROVEN.setdefault(model, set())
    if case in known or inputs.device.type == "mps":  # which has no float64
        return
    named = f"{what} needs derivatives of order {order}"
    try:
        probe = _Probe.of(model, inputs, of)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{named}, and a copy of this model to prove them on makes no pass of two samples "
            f"({_reason(error)}): use {alternative}"
        ) from error
    try:
        for got, want, agrees in probe.compared(order):
            if not agrees:
                raise ValueError(
                    f"{named}, and autograd has a wrong one on this model, {got:.4g} instead of "
                    f"{want:.4g}: an operator leaves a part out (LayerNorm in order 3, weight "
                    f"normalisation in order 2); use {alternative}"
                )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"{named} that this model lacks ({_reason(error)}): use {alternative}"
        ) from error
    known.add(case)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


@dataclass(frozen=True, eq=False)
class _Probe:
    """A copy of a model, in float64 if it runs in that, and what it is differentiated in.

    Attributes:
        module: the copy.
        start: of every pass.
        points: two samples.
        below: points or weights, in which the derivatives below the last one are.
        last: points and weights that are trained.
    """

    module: nn.Module
    start: PassStart
    points: Tensor
    below: Sequence[Tensor]
    last: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor, of: Leaves) -> _Probe:
        """Copy the model, and try a pass.

        Raises:
            RuntimeError: it makes no pass.
            TypeError: it cannot be copied.
        """
        try:
            return cls._in(torch.float64, model, inputs, of)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a pass that fixes its precision
            return cls._in(None, model, inputs, of)

    @classmethod
    def _in(cls, dtype: torch.dtype | None, model: nn.Module, inputs: Tensor, of: Leaves) -> _Probe:
        points = inputs[:_SAMPLES].detach().clone()
        with warnings.catch_warnings():
            # The copy of a scripted module has weights that are no leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            module = copied(model).to(dtype)
        if points.is_floating_point():
            points = points.to(dtype or points.dtype).requires_grad_()
        weights: list[Tensor] = [p for p in module.parameters() if p.requires_grad and p.is_leaf]
        if weights:
            # Fresh models have weights that are zero, and behind them activations at a kink.
            noise = _direction(weights, torch.Generator().manual_seed(1))
            _move(weights, [d + 0.01 * d.sgn() for d in noise], 0.1)
        start = PassStart(module)
        with torch.no_grad(), start.again():
            as_logits(pass_copy(module, points), len(points))
        varying = [points] if points.requires_grad else []
        below = varying if of == "inputs" else weights
        return cls(module, start, points, below, [*varying, *weights])

    @torch.enable_grad()
    def compared(self, order: int) -> list[tuple[float, float, bool]]:
        """Derivatives by autograd, by a difference of those below, and whether they agree.

        Along several directions, for one may hide a part by chance; none where the model stops
        gradients.
        """
        if not self.below or not all(self._compare(1, draw)[2] for draw in range(_DRAWS)):
            return []
        return [self._compare(order, draw) for draw in range(_DRAWS)]

    def _compare(self, order: int, draw: int) -> tuple[float, float, bool]:
        generator = torch.Generator().manual_seed(2 + draw)
        below = [_direction(self.below, generator) for _ in range(order - 1)]
        last = _direction(self.last, generator)
        got = _inner(_gradient(self._derivative(below), self.last), last).item()
        want, tolerance = _difference(lambda: self._derivative(below), self.last, last)
        if order > 1:  # a first one that is off by little, as of spectral norm, hides larger gaps
            tolerance *= _WRONG
        return got, want, not abs(got - want) > tolerance * max(abs(got), abs(want))

    def _derivative(self, directions: Sequence[Sequence[Tensor]]) -> Tensor:
        """Of the logits, with alternating signs (their sum may be constant), along these."""
        with self.start.again(), twice_differentiable():
            logits = as_logits(pass_copy(self.module, self.points), len(self.points))
        signs = 1 - 2 * (torch.arange(logits.shape[1], device=logits.device) % 2)
        value = (logits * signs).sum()
        for along in directions:
            value = _inner(_gradient(value, self.below, create_graph=True), along)
        return value


def copied(model: nn.Module) -> nn.Module:
    """A copy; tensors that a pass has left in a module, with their graph, are copied without it."""
    left: dict[int, Tensor] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                left[id(value)] = value.detach().clone()
        elif isinstance(value, Mapping):
            collect(tuple(value.values()))
        elif isinstance(value, list | tuple | set):
            for part in value:
                collect(part)

    for module in model.modules():
        collect(tuple(v for k, v in vars(module).items() if k not in ("_modules", "_parameters")))
    return copy.deepcopy(model, left)


def _direction(leaves: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random, of the size of each leaf."""
    noise = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in leaves]
    sizes = [t.detach().abs().square().mean().sqrt() + 1e-3 for t in leaves]
    return [n * size for n, size in zip(noise, sizes, strict=True)]


def _gradient(
    value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    if not value.requires_grad:  # the derivative below is constant
        return [torch.zeros_like(t) for t in leaves]
    return torch.autograd.grad(
        value, list(leaves), create_graph=create_graph, materialize_grads=True
    )


def _inner(gradients: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    products = [(g.conj() * d).sum().real for g, d in zip(gradients, along, strict=True)]
    return torch.stack(products).sum()


def _difference(
    value: Callable[[], Tensor], leaves: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[float, float]:
    """Central difference and its tolerance where those of several steps agree; or infinity.

    Two fine steps, or three coarse ones: what is computed in half precision within is a staircase,
    whose differences agree by chance, and are zero on a stair.
    """
    for (steps, apart), needed in ((_FINE, 2), (_COARSE, 3)):
        found: list[float] = []
        for step in steps:
            ends = []
            for sign in (1, -1):
                _move(leaves, along, sign * step)
                ends.append(value().item())
                _move(leaves, along, -sign * step)
            found.append((ends[0] - ends[1]) / (2 * step))
            recent = found[-needed:]
            size = max(map(abs, recent))
            if len(recent) == needed and 0 < max(recent) - min(recent) <= apart * size:
                return recent[0], apart
    return math.nan, math.inf


@torch.no_grad()
def _move(leaves: Sequence[Tensor], along: Sequence[Tensor], step: float) -> None:
    torch._foreach_add_(list(leaves), list(along), alpha=step)
