"""The threat model: eps-balls in [0,1] pixel space, and the seeded noise attacks start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


def check_eps(eps: float | Tensor) -> None:
    """Refuse an eps outside [0, 1].

    Raises:
        ValueError: eps is negative or above 1, as when given in 0-255 units.

    >>> check_eps(8)
    Traceback (most recent call last):
    ValueError: eps must be in [0, 1] pixel units, got 8 (for 8 grey levels of 255 write 8/255)
    """
    low, high = (float(eps.min()), float(eps.max())) if isinstance(eps, Tensor) else (eps, eps)
    if not (0 <= low and high <= 1):
        wrong = high if high > 1 else low
        hint = f" (for {wrong:g} grey levels of 255 write {wrong:g}/255)" if wrong > 1 else ""
        raise ValueError(f"eps must be in [0, 1] pixel units, got {wrong:g}{hint}")


def check_unit_range(inputs: Tensor) -> None:
    """Refuse images that are not in [0,1], as normalised ones are.

    Raises:
        ValueError: a pixel lies outside [0, 1] or is not a number.
    """
    if not inputs.numel():
        return
    low, high = float(inputs.min()), float(inputs.max())
    if not (0 <= low and high <= 1):
        raise ValueError(
            f"inputs must be images in [0, 1], got values from {low:.3g} to {high:.3g}: "
            "normalise inside the model, with flatreg.with_normalization(model, mean, std)"
        )


def to_unit_range(images: Tensor) -> Tensor:
    """Turn uint8 images to float32 in [0,1]; leave float images as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_linf(norm: str) -> None:
    """Refuse a norm the attacks do not have.

    Raises:
        ValueError: `norm` is not "linf".
    """
    if norm != "linf":
        raise ValueError(
            f"norm must be 'linf', got {norm!r}: no attack for another norm exists yet"
        )


def per_sample(values: float | Tensor, like: Tensor) -> Tensor:
    """Shape a scalar or a `(batch,)` tensor to `(batch, 1, ...)`, to broadcast over `like`."""
    tensor = torch.as_tensor(values, dtype=like.dtype, device=like.device).expand(len(like))
    return tensor.reshape(-1, *[1] * (like.ndim - 1))


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Maximise the inner product with `gradient` over the unit ball of `norm`, per sample.

    Linf: sign(g). L2: g / ||g||, zero where g = 0. The maximum itself is the dual norm of g.
    """
    if norm == "linf":
        return gradient.sign()
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_sample(length.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def project(perturbed: Tensor, inputs: Tensor, eps: Tensor) -> Tensor:
    """Project onto the Linf ball of radius `eps` around `inputs`, cut with the box [0,1]."""
    return perturbed.clamp(inputs - eps, inputs + eps).clamp(0, 1)


def uniform_noise(like: Tensor, *, seed: int, stream: int, indices: Sequence[int]) -> Tensor:
    """Noise in [-1, 1] shaped as `like`, an independent stream per (seed, stream, sample index).

    Keyed by the sample and not by the batch, so a verdict does not depend on batch size, on which
    samples have left the batch, or on how many processes share the work.
    """
    noise = np.empty(like.shape, dtype=np.float32)
    for row, index in enumerate(indices):
        np.random.default_rng([seed, stream, index]).random(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise).to(like) * 2 - 1
