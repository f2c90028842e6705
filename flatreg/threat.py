"""The threat model: an eps-ball cut with the box [0,1], its attacks, the points they start from.

Wherever eps is written, it is in [0,1] pixel units: the largest change of a pixel (Linf), the
Euclidean length of the change (L2), the sum of its absolute values (L1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from flatreg.data.text import one_line

if TYPE_CHECKING:
    from flatreg.attacks.options import Attack

Norm = Literal["linf", "l2", "l1"]
DenseNorm = Literal["linf", "l2"]  # those whose steepest direction moves every pixel
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
_NORMALISED, _OVERSHOT = 10, 0.1  # no (x - mean) / std of usual data exceeds the first


def check_norm(norm: str) -> Norm:
    """Refuse a norm that is none of the three.

    Raises:
        ValueError: `norm` is not "linf", "l2" or "l1".
    """
    for known in NORMS:
        if norm == known:
            return known
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def check_eps(eps: float | Tensor, norm: Norm = "linf") -> None:
    """Refuse a radius that no ball in [0,1] pixels has.

    Raises:
        TypeError: eps is no number.
        ValueError: eps is negative or not finite, or an empty tensor; for Linf it is above 1, as
            when given in 0-255 units.

    >>> check_eps(8)
    Traceback (most recent call last):
    ValueError: eps must be in [0, 1] pixel units, got 8 (for 8 grey levels of 255 write 8/255)
    """
    if not isinstance(eps, (Tensor, Real)) or isinstance(eps, bool):
        raise TypeError(f"eps: expected a number, as 8 / 255, got {one_line(repr(eps), 60)}")
    if isinstance(eps, Tensor) and (not eps.numel() or eps.is_complex()):
        raise ValueError(f"eps: expected real numbers, got {eps.dtype} of shape {tuple(eps.shape)}")
    low, high = (float(eps.min()), float(eps.max())) if isinstance(eps, Tensor) else (eps, eps)
    if norm != "linf":
        if not (0 <= low and high < float("inf")):
            raise ValueError(f"eps must be >= 0 and finite, got {low if low < 0 else high:g}")
    elif not (0 <= low and high <= 1):
        wrong = high if high > 1 else low
        hint = f" (for {wrong:g} grey levels of 255 write {wrong:g}/255)" if wrong > 1 else ""
        raise ValueError(f"eps must be in [0, 1] pixel units, got {wrong:g}{hint}")


@dataclass(frozen=True, kw_only=True)
class Threat:
    """An eps-ball around every image, cut with the box [0,1], and the attacks that search it.

    Attributes:
        norm: of the ball.
        eps: radius in [0,1] pixel units.
        attacks: the stages of a cascade, in order; see `flatreg.attacks.cascade.stages`.

    Raises:
        TypeError: eps is no number, or more than one.
        ValueError: as in `check_norm` and `check_eps`.

    >>> Threat(norm="linf", eps=0.03).key
    'linf 0.03'
    """

    norm: Norm
    eps: float
    attacks: tuple[Attack, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.eps, Tensor) and self.eps.numel() > 1:
            raise TypeError(
                f"eps: expected one number, got a tensor of shape {tuple(self.eps.shape)}: an "
                "attack called by itself takes one a sample"
            )
        check_eps(self.eps, check_norm(self.norm))
        object.__setattr__(self, "eps", float(self.eps))  # a numpy scalar would change the key

    def __hash__(self) -> int:
        return hash((self.norm, self.eps))  # an attack of yours may have no hash

    @property
    def key(self) -> str:
        """Norm and eps, as records of it are named."""
        return f"{self.norm} {self.eps!r}"


def as_radii(name: str, radii: object, norm: str) -> list[float]:
    """The grid of radii that a setting `name` gives, ascending, each once.

    Raises:
        TypeError: it is no grid of numbers.
        ValueError: as in `check_norm` and `check_eps`.

    >>> as_radii("curve", 0.1, "linf")
    Traceback (most recent call last):
    TypeError: curve: expected a grid of radii, got 0.1: write [0.1]
    """
    if isinstance(radii, str) or not isinstance(radii, Iterable) or getattr(radii, "ndim", 1) != 1:
        hint = f": write [{radii}]" if isinstance(radii, Real) else ""
        got = one_line(repr(radii), 60)
        raise TypeError(f"{name}: expected a grid of radii, got {got}{hint}")
    try:
        return sorted({Threat(norm=check_norm(norm), eps=radius).eps for radius in radii})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def check_unit_range(inputs: Tensor) -> None:
    """Refuse images that are not in [0,1], as normalised ones are, or those of 0 to 255.

    Raises:
        ValueError: a pixel lies outside [0, 1] or is not a number; the images are integers.
    """
    expected = "inputs must be images in [0, 1], got"
    if not inputs.is_floating_point():
        raise ValueError(f"{expected} {inputs.dtype}: give images / 255")
    if not inputs.numel():
        return
    pixels = inputs.detach()  # torch warns of a number that is made of a tensor with a graph
    low, high = float(pixels.min()), float(pixels.max())
    if 0 <= low and high <= 1:
        return
    if low != low:  # of nan
        raise ValueError(f"{expected} nan: leave such images out, or look for what made them")
    cure = "normalise inside the model, with flatreg.with_normalization(model, mean, std)"
    if low >= 0 and high > _NORMALISED:
        cure = f"give images / {255 if high <= 255 else 65535}"
    elif -_OVERSHOT <= low and high <= 1 + _OVERSHOT:
        cure = "if resizing or noise overshoots, give images.clamp(0, 1)"
        # A pixel that rounding has moved out of the box is not shown as 1.
        raise ValueError(f"{expected} values from {low:.9g} to {high:.9g}: {cure}")
    raise ValueError(f"{expected} values from {low:.3g} to {high:.3g}: {cure}")


def to_unit_range(images: Tensor) -> Tensor:
    """Turn uint8 images to float32 in [0,1]; leave float images as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def per_sample(values: float | Tensor, like: Tensor) -> Tensor:
    """Shape a scalar or a `(batch,)` tensor to `(batch, 1, ...)`, to broadcast over `like`.

    Raises:
        ValueError: a tensor of another shape.
    """
    tensor = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if tensor.shape not in ((), (1,), (len(like),)):
        raise ValueError(
            f"expected a number (eps, a step) or one a sample ({len(like)},), got a tensor of "
            f"shape {tuple(tensor.shape)}"
        )
    tensor = tensor.expand(len(like))
    return tensor.reshape(-1, *[1] * (like.ndim - 1))


def check_within(images: Tensor, inputs: Tensor, eps: float | Tensor, norm: Norm) -> None:
    """Refuse images that are not `within`.

    Raises:
        RuntimeError: an image is further than eps from its input, or outside [0, 1].
    """
    if not bool(within(images, inputs, eps, norm).all()):
        beyond = float((distance(images, inputs, norm) - per_sample(eps, inputs).flatten()).max())
        raise RuntimeError(
            f"an attack left its threat model: {beyond:.2g} beyond eps, or pixels outside "
            "[0, 1]; its verdicts are void"
        )


def within(images: Tensor, inputs: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Whether images `(batch, ...)` lie in the ball around their inputs, and in [0, 1]."""
    near = distance(images, inputs, norm) <= (
        per_sample(eps, inputs).flatten().double() + rounding(inputs, norm)
    )
    return near & ((images >= 0) & (images <= 1)).flatten(1).all(1)


def steepest_direction(gradient: Tensor, norm: DenseNorm) -> Tensor:
    """Maximise the inner product with `gradient` over the unit ball of `norm`, per sample.

    Linf: sign(g). L2: g / ||g||, zero where g = 0. The maximum itself is the dual norm of g.

    Raises:
        ValueError: another norm.
    """
    if norm == "linf":
        return gradient.sign()
    if norm != "l2":
        raise ValueError(f"norm must be linf or l2, got {norm!r}")
    return unit_length(gradient)


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors `(batch, ...)` divided by their L2 lengths; zero where they are.

    The gradient of a confident sample is so small that its squares underflow: such a vector, and
    one whose squares overflow, is divided by its largest entry first.
    """
    limits, size = torch.finfo(vectors.dtype), vectors.detach().flatten(1).abs().amax(1)
    usual = (size == 0) | ((size > limits.tiny**0.25) & (size < limits.max**0.25))
    scaled = vectors / per_sample(torch.where(usual, 1, size), vectors)
    length = torch.linalg.vector_norm(scaled.flatten(1), dim=1)
    return scaled / per_sample(torch.where(length > 0, length, 1), vectors)


def distance(perturbed: Tensor, inputs: Tensor, norm: Norm) -> Tensor:
    """Norm of perturbed - inputs, `(batch,)`, in float64."""
    change = (perturbed.double() - inputs.double()).flatten(1)
    length: Tensor = torch.linalg.vector_norm(change, ord=_ORD[norm], dim=1)
    return length


def rounding(inputs: Tensor, norm: Norm) -> float:
    """How far rounding x + delta to float32 can move it, in `norm`: half an ulp of 1 a pixel.

    An image further than this beyond eps has left its threat model.
    """
    return 1e-7 * whole_box(inputs, norm)


def whole_box(inputs: Tensor, norm: Norm) -> float:
    """Radius of a ball that holds all of [0,1], wherever in it the centre is."""
    pixels = max(1, inputs[0].numel()) if len(inputs) else 1
    return float({"linf": 1, "l2": pixels**0.5, "l1": pixels}[norm])


def dual_length(gradients: Tensor, norm: Norm) -> Tensor:
    """Dual norm of each gradient, `(batch,)`: the L1 norm for Linf, L2 for L2, Linf for L1."""
    length: Tensor = torch.linalg.vector_norm(gradients.flatten(1), ord=_DUAL_ORD[norm], dim=1)
    return length


def project(perturbed: Tensor, inputs: Tensor, eps: Tensor, norm: Norm) -> Tensor:
    """Nearest point (in L2) to `perturbed` in the ball around `inputs` cut with the box [0,1].

    Args:
        perturbed: `(batch, ...)`.
        inputs: centres `(batch, ...)` in [0,1].
        eps: radii, shaped to broadcast over `inputs`.
        norm: of the ball.
    """
    if norm == "linf":
        return perturbed.clamp(inputs - eps, inputs + eps).clamp(0, 1)
    change = perturbed - inputs
    length, room = change.abs().flatten(1), _room(inputs, change).flatten(1)
    radius = eps.reshape(-1, 1)
    kept = _shorten(length, room, radius) if norm == "l2" else _sparsify(length, room, radius)
    return (inputs + change.sign() * kept.reshape(change.shape)).clamp(0, 1)


def steepest_step(x: Tensor, gradient: Tensor, size: Tensor, norm: Norm) -> Tensor:
    """Maximise the inner product with `gradient` over steps of length `size` from `x`.

    Linf and L2 as in `steepest_direction`. L1: the pixels of largest gradient go to the end of the
    box, one after the other, until `size` is spent; the maximum over the ball cut with the box.
    """
    if norm != "l1":
        return x + size * steepest_direction(gradient, norm)
    slope, room = gradient.abs().flatten(1), _room(x, gradient).flatten(1)
    order = slope.sort(dim=1, descending=True, stable=True).indices
    capacity = room.gather(1, order)
    spent_before = capacity.cumsum(1) - capacity
    moved = torch.minimum((size.reshape(-1, 1) - spent_before).clamp_min(0), capacity)
    step = torch.zeros_like(room).scatter(1, order, moved).reshape(x.shape)
    return x + gradient.sign() * step


def random_point(
    inputs: Tensor, eps: Tensor, norm: Norm, *, seed: int, stream: int, indices: Sequence[int]
) -> Tensor:
    """Random point of the ball cut with the box, a stream per (seed, stream, sample index).

    Linf: uniform. L2: at distance eps, before the cut. L1: a Gaussian point, projected. Keyed by
    the sample and not by the batch, so a verdict does not depend on batch size, on which samples
    have left the batch, or on how many processes share the work.
    """
    noise = np.empty(inputs.shape, dtype=np.float32)
    for row, index in enumerate(indices):
        generator = np.random.default_rng([seed, stream, index])
        if norm == "linf":
            generator.random(dtype=np.float32, out=noise[row])
        else:
            generator.standard_normal(dtype=np.float32, out=noise[row])
    drawn = torch.from_numpy(noise).to(inputs)
    if norm == "linf":
        change = eps * (2 * drawn - 1)
    elif norm == "l2":
        change = eps * steepest_direction(drawn, "l2")
    else:
        change = drawn
    return project(inputs + change, inputs, eps, norm)


_ORD: dict[Norm, float] = {"linf": float("inf"), "l2": 2, "l1": 1}
_DUAL_ORD: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
_NEWTON, _BISECTIONS = 8, 40


def _room(inputs: Tensor, change: Tensor) -> Tensor:
    """How far each pixel can go in the direction of `change` before it leaves the box."""
    return torch.where(change > 0, 1 - inputs, inputs).clamp_min(0)


def _shorten(length: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """min(s length, room) with the s in [0, 1] that makes its L2 norm eps, if it is above.

    Newton's method on the squared norm, which is piecewise quadratic in s: it climbs to the root
    from below, so that stopping early stays inside the ball.
    """
    eps = eps.expand(len(length), 1)
    tiny = torch.finfo(length.dtype).tiny
    scale = (eps / length.norm(dim=1, keepdim=True).clamp_min(tiny)).clamp_max(1)
    for _ in range(_NEWTON):
        full = scale * length >= room
        fixed = torch.where(full, room, 0).square().sum(1, keepdim=True)
        free = torch.where(full, 0, length).square().sum(1, keepdim=True)
        root = ((eps.square() - fixed).clamp_min(0) / free.clamp_min(tiny)).sqrt().clamp_max(1)
        scale = torch.maximum(scale, root)
    return torch.minimum(scale * length, room)


def _sparsify(length: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """min(max(length - s, 0), room) with the s >= 0 that makes its sum eps, if it is above.

    The projection onto the L1 ball cut with the box: Croce and Hein, "Mind the box", ICML 2021,
    proposition 2.1; s by bisection, and from above, so that it stays inside the ball.
    """
    low = torch.zeros_like(length[:, :1])
    high = length.amax(1, keepdim=True)
    inside = torch.minimum(length, room).sum(1, keepdim=True) <= eps
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = torch.minimum((length - middle).clamp_min(0), room).sum(1, keepdim=True) > eps
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.minimum((length - torch.where(inside, 0, high)).clamp_min(0), room)
