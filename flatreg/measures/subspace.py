"""The span of the principal components of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatreg.precision import at_least_float32

_NEGLIGIBLE = 1e-8  # variance, relative to the largest, below which a direction is rounding


@dataclass(frozen=True, eq=False)
class Subspace:
    """Principal subspace of images.

    Attributes:
        mean: mean image, of the shape of one.
        basis: orthonormal rows `(rank, pixels)`.
        explained: share of the images' variance along each row `(rank,)`, descending.
    """

    mean: Tensor
    basis: Tensor
    explained: Tensor
    _placed: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False
    )

    def project(self, vectors: Tensor) -> Tensor:
        """Orthogonal projection of `vectors` `(batch, ...)`, in their dtype."""
        flat = at_least_float32(vectors).flatten(1)
        basis = self._basis_like(flat)
        with torch.autocast(vectors.device.type, enabled=False):
            return (flat @ basis.T @ basis).reshape(vectors.shape).to(vectors.dtype)

    def _basis_like(self, flat: Tensor) -> Tensor:
        """Basis on the device and in the dtype of `flat`, made once."""
        key = (flat.device, flat.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # kept for training, whoever asks first
                # A cast to higher precision keeps the lower one's rounding: orthonormalise anew.
                exact = torch.linalg.qr(self.basis.to(flat.dtype).T)[0].T
                self._placed[key] = exact.to(flat.device)
        return self._placed[key]


def principal_subspace(
    stream: Callable[[], Iterator[Tensor]],
    rank: int,
    *,
    oversampling: int,
    power_iterations: int,
    seed: int,
) -> Subspace:
    r"""Top principal components of a stream of images, by a randomised range finder.

    .. math:: Q \leftarrow \operatorname{orth}(C\,Q) \quad (\text{repeated}), \qquad
              Q^T C Q = V \Lambda V^T, \qquad \text{basis} = (Q V)^T

    with C the covariance, known by its products only. Halko, Martinsson, Tropp, "Finding structure
    with randomness", SIAM Review 2011. Directions without variance are left out, so the basis may
    have fewer rows than `rank`.

    Args:
        stream: starts a pass over the images, in batches `(n, ...)` of floats.
        rank: number of components.
        oversampling: further random directions carried along for accuracy.
        power_iterations: products with C before the last; passes over the stream = this + 2.
        seed: of the random start.

    Raises:
        ValueError: there are no more images, or no more pixels, than `rank`.
    """
    mean, count = _mean(stream)
    pixels = mean.numel()
    if rank > min(count - 1, pixels):
        raise ValueError(
            f"rank must be at most {min(count - 1, pixels)} for {count} images of {pixels} pixels, "
            f"got {rank}"
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(pixels, min(rank + oversampling, pixels), generator=generator).to(mean)
    directions = torch.linalg.qr(start)[0]
    for _ in range(power_iterations):
        directions = torch.linalg.qr(_covariance_product(stream, mean, directions)[0])[0]
    product, variance = _covariance_product(stream, mean, directions)
    small = directions.T @ product
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    values, rotation = values.flip(0)[:rank], rotation.flip(1)[:, :rank]
    kept = values > _NEGLIGIBLE * values[0]
    basis = torch.linalg.qr(directions @ rotation[:, kept])[0].T.contiguous()
    return Subspace(mean, basis, values[kept] / variance)


def _mean(stream: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, int]:
    """Mean image and number of images."""
    mean, count = torch.zeros(()), 0
    for batch in stream():
        if count and batch.shape[1:] != mean.shape:
            raise ValueError(
                f"images must have one shape, got {tuple(mean.shape)} and {tuple(batch.shape[1:])}"
            )
        count += len(batch)
        mean = mean.to(batch) + (batch - mean.to(batch)).sum(0) / count
    return mean, count


def _covariance_product(
    stream: Callable[[], Iterator[Tensor]], mean: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Scatter matrix times `directions` `(pixels, k)`, and its trace."""
    product, trace = torch.zeros_like(directions), mean.new_zeros(())
    for batch in stream():
        centred = (batch - mean).flatten(1)
        product += centred.T @ (centred @ directions)
        trace += centred.square().sum()
    return product, trace
