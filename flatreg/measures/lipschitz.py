r"""Lipschitz numbers of the features in L2, each marked an estimate or a certificate.

.. math:: \|\phi(x + \delta) - \phi(x)\|_2 \le L \|\delta\|_2

An estimate is the largest stretch that was found, a lower bound on L. A certificate is a product of
bounds, one a block, an upper bound on L everywhere; it exists only where every block is covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flatreg.data.configuration import whole
from flatreg.models.double_backward import refuse_missing_derivatives, twice_differentiable
from flatreg.models.entrance import outside_inference
from flatreg.models.normalize import Normalize
from flatreg.models.precision import at_least_float32
from flatreg.threat import unit_length

Kind = Literal["estimate", "certificate"]
Pair = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class Lipschitz:
    """A Lipschitz number in L2, one for all inputs or `(batch,)`, and what it is worth.

    >>> print(Lipschitz(2.0, "estimate"))
    at least 2 (estimate)
    >>> print(Lipschitz(2.0, "certificate"))
    at most 2 (certificate)
    """

    value: float | Tensor
    kind: Kind

    def __str__(self) -> str:
        side = "at least" if self.kind == "estimate" else "at most"
        if isinstance(self.value, Tensor) and not self.value.numel():
            return f"unknown, of 0 inputs ({self.kind})"
        if isinstance(self.value, Tensor) and self.value.numel() > 1:
            low, high = float(self.value.min()), float(self.value.max())
            return f"{side} {low:.3g} to {high:.3g} over {len(self.value)} inputs ({self.kind})"
        return f"{side} {float(self.value):.3g} ({self.kind})"


@torch.inference_mode(False)
@torch.enable_grad()
def lipschitz_estimate(
    features_at: Callable[[Tensor], Tensor], inputs: Tensor, *, steps: int = 20, seed: int = 0
) -> Lipschitz:
    r"""Largest stretch of the features found at each input: power iteration on the Jacobian.

    .. math:: \max_k \|J v_k\|, \qquad v_{k+1} = J^T J v_k / \|J^T J v_k\|

    One forward pass, then two backward passes a step: J v is the derivative of J^T u in u.

    Args:
        features_at: inputs `(batch, ...)` to features `(batch, ...)`, each sample's from its own
            input, as in eval mode.
        inputs: `(batch, ...)`.
        steps: of the power iteration, at least 1.
        seed: of the first directions.

    Returns:
        An **estimate**, `(batch,)`, features per input unit: never above the Lipschitz constant
        (up to rounding), however many steps.

    Raises:
        ValueError: `steps` is below 1, or an operator lacks a second derivative.

    >>> lipschitz_estimate(lambda x: x @ torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(1, 2))
    Lipschitz(value=tensor([3.]), kind='estimate')
    """
    steps = whole("steps", steps, 1)
    generator = torch.Generator().manual_seed(seed)
    v = _unit(torch.randn(inputs.shape, generator=generator).to(inputs))
    largest = _norm(torch.zeros_like(inputs))
    with twice_differentiable():
        x = outside_inference(inputs).requires_grad_()
        features = features_at(x)
        u = torch.zeros_like(features, requires_grad=True)
        (pulled,) = torch.autograd.grad(features, x, u, create_graph=True)
        refuse_missing_derivatives(pulled, "lipschitz_estimate", "another activation")
        for _ in range(steps):
            (stretched,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            largest = torch.maximum(largest, _norm(stretched))
            (v,) = torch.autograd.grad(features, x, stretched, retain_graph=True)
            v = _unit(v)
    return Lipschitz(largest, "estimate")


def feature_displacement(
    lipschitz: Lipschitz | float | Tensor,
    eps: float | Tensor,
    norm: Literal["linf", "l2", "l1"],
    shape: Sequence[int],
) -> float | Tensor:
    r"""Radius in feature space of an eps-ball around an input: the R that feature bounds take.

    .. math:: R = L \max_{\|\delta\| \le \epsilon} \|\delta\|_2, \qquad
              \max = \epsilon \sqrt n \text{ (Linf)},\ \epsilon \text{ (L2, L1)}

    A radius from an estimate bounds nothing: what is computed from it is an estimate too.

    Args:
        lipschitz: L in L2, scalar or `(batch,)`.
        eps: radius in input units, scalar or `(batch,)`.
        norm: of the ball.
        shape: of one input, `(channels, height, width)`; n is its product.

    Returns:
        L2 length in feature space; a number, or `(batch,)`.

    Raises:
        ValueError: an unknown norm.

    >>> feature_displacement(2.0, 0.1, "linf", (1, 2, 2))
    0.4
    """
    widths = {"linf": math.prod(shape) ** 0.5, "l2": 1.0, "l1": 1.0}
    if norm not in widths:
        raise ValueError(f"norm must be 'linf', 'l2' or 'l1', got {norm!r}")
    constant = lipschitz.value if isinstance(lipschitz, Lipschitz) else lipschitz
    radius: float | Tensor = constant * eps * widths[norm]
    return radius


@torch.no_grad()
def lipschitz_certificate(module: nn.Module, *, before: nn.Module | None = None) -> Lipschitz:
    r"""Product of bounds on the Lipschitz constants of the blocks of a feed-forward network.

    Covered: `nn.Sequential`, nested; `nn.Linear`; `nn.Conv2d` with zero padding; BatchNorm and
    Dropout in eval mode; flatreg's normalisation; pointwise activations (ReLU, ReLU6, LeakyReLU,
    ELU, Tanh, Hardtanh, Sigmoid, SiLU, GELU); average and maximum pooling; Flatten and Identity.

    Args:
        module: covered from end to end.
        before: stop at this part of it, the head say, for the constant of its input.

    Returns:
        A **certificate**, one number: an upper bound on the constant (up to rounding), over all
        inputs, and loose: norms of layers are attained in directions that do not line up.

    Raises:
        ValueError: a block is not covered (its name and the reason are given), or `before` is not
            a part of `module`.

    >>> lipschitz_certificate(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Sigmoid()))
    Lipschitz(value=0.25, kind='certificate')
    """
    product = 1.0
    for name, block in _blocks(module, type(module).__name__):
        if block is before:
            return Lipschitz(product, "certificate")
        product *= _block_bound(name, block)
    if before is not None:
        raise ValueError(
            f"no block of {type(module).__name__} is the {type(before).__name__} given"
        )
    return Lipschitz(product, "certificate")


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Leaves in the order in which they run; a block that is there twice comes twice."""
    if type(module).forward is not nn.Sequential.forward or _altered(module):
        yield name, module
        return
    for key, child in module._modules.items():  # named_children leaves repetitions out
        if child is not None:
            yield from _blocks(child, f"{name}.{key}")


def _altered(module: nn.Module) -> bool:
    """Whether this instance may compute something else than its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _block_bound(name: str, block: nn.Module) -> float:
    refusal = f"no certificate: {name} ({type(block).__name__})"
    if _altered(block):
        raise ValueError(f"{refusal} has a hook or a forward of its own")
    for kind, bound in _BOUNDS.items():
        # A subclass with a forward of its own is another function; a parametrized layer has none.
        if isinstance(block, kind) and type(block).forward is kind.forward:
            try:
                return bound(block)
            except ValueError as error:
                raise ValueError(f"{refusal} {error}") from None
    if isinstance(block, nn.MultiheadAttention):
        raise ValueError(f"{refusal} has no Lipschitz constant: attention multiplies its inputs")
    raise ValueError(f"{refusal} is not covered: its forward may branch, add or multiply")


def _conv2d(block: nn.Conv2d) -> float:
    """Bound the norm of a convolution with zero padding, whatever the size of the image.

    The smaller of sqrt(||.||_1 ||.||_inf) of the operator and of ||W as out x (in h w)||_2 times
    the root of the number of patches that share a pixel.
    """
    if block.padding_mode != "zeros" or type(block)._conv_forward is not nn.Conv2d._conv_forward:
        raise ValueError(f"pads by {block.padding_mode!r}: only plain zero padding is covered")
    w = rearrange(block.weight.double(), "(g o) i h w -> g o i h w", g=block.groups)
    largest_row = w.abs().sum((2, 3, 4)).amax(1)
    largest_column = w.abs().sum((1, 3, 4)).amax(1)
    kernel = torch.linalg.matrix_norm(rearrange(w, "g o i h w -> g o (i h w)"), 2)
    shared = _windows_sharing(block.kernel_size, block.stride, block.dilation)
    bound = torch.minimum((largest_row * largest_column).sqrt(), kernel * shared**0.5)
    return float(bound.amax())  # groups see inputs of their own


def _windows_sharing(kernel: Pair, stride: Pair, dilation: Pair = 1) -> int:
    """Largest number of windows that one pixel is in."""
    sides = zip(_pair(kernel), _pair(stride), _pair(dilation), strict=True)
    # Offsets a with a * dilation = const (mod stride) recur every stride / gcd.
    return math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in sides)


def _pair(value: Pair) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _batch_norm(block: nn.BatchNorm2d) -> float:
    if block.training or block.running_var is None:
        raise ValueError("normalises by batch statistics, which couple samples: call eval()")
    scale = (block.running_var.double() + block.eps).rsqrt()
    return float((scale if block.weight is None else scale * block.weight.abs()).amax())


def _dropout(block: nn.Dropout) -> float:
    if block.training and block.p > 0:
        raise ValueError("is random in training mode: call eval()")
    return 1.0


def _max_pool(block: nn.MaxPool2d) -> float:
    return math.sqrt(_windows_sharing(block.kernel_size, block.stride, block.dilation))


def _avg_pool(block: nn.AvgPool2d) -> float:
    """A mean of n numbers is at most their L2 length / sqrt(n); at the border n may be 1."""
    cells = math.prod(_pair(block.kernel_size))
    full = not any(_pair(block.padding)) and not block.ceil_mode
    mean = 1 / math.sqrt(cells) if full else 1.0
    if block.divisor_override:
        mean = math.sqrt(cells) / block.divisor_override
    return mean * math.sqrt(_windows_sharing(block.kernel_size, block.stride))


def _global_pool(block: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) -> float:
    if block.output_size not in (1, (1, 1), [1, 1]):
        raise ValueError("has windows that depend on the size of its input: only size 1 is covered")
    return 1.0


_BOUNDS: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.Linear: lambda block: float(torch.linalg.matrix_norm(block.weight.double(), 2)),
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: lambda block: float(1 / block.std.double().min()),
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveMaxPool2d: _global_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.LeakyReLU: lambda block: max(1.0, abs(block.negative_slope)),
    nn.ELU: lambda block: max(1.0, abs(block.alpha)),
    nn.Sigmoid: lambda _: 0.25,
    nn.SiLU: lambda _: 1.0999,  # its slope peaks at 1.09984
    nn.GELU: lambda _: 1.129,  # 1.128904, and 1.128994 with approximate="tanh"
}
for _kind in (nn.Identity, nn.Flatten, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh):
    _BOUNDS[_kind] = lambda _: 1.0


def _norm(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(at_least_float32(vectors).flatten(1), dim=1)
    return length


def _unit(vectors: Tensor) -> Tensor:
    return unit_length(at_least_float32(vectors)).to(vectors)
