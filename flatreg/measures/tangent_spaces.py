"""What the fitted manifolds are made of.

One principal subspace of all images, or one tangent space an image, spanned by its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from einops import einsum
from torch import Tensor

from flatreg.models.precision import at_least_float32
from flatreg.threat import check_unit_range, to_unit_range

if TYPE_CHECKING:
    from sklearn.neighbors import NearestNeighbors

_NEGLIGIBLE = 1e-8  # variance, relative to the largest, below which a direction is rounding
_CHUNK = 16  # tangent spaces at a time: 16 neighbours of 224 x 224 pixels in float64 are 0.3 GB
_ROUNDING = 1e-4  # singular value, relative to the largest, below which a direction is rounding
_ORTHONORMAL = 1e-3  # largest product of two rows of a basis that is one
_CACHE_BYTES = 2**31  # of tangent spaces that are kept; later ones are made anew every time


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

    def checked(self) -> Subspace:
        """Itself.

        Raises:
            ValueError: the tensors are not of the shapes above, or not finite numbers; the rows are
                not orthonormal.
        """
        for name in ("mean", "basis", "explained"):
            values = getattr(self, name)
            if not (values.is_floating_point() and bool(values.isfinite().all())):
                raise ValueError(f"expected {name} as finite numbers, got others")
        rank = len(self.explained) if self.explained.ndim == 1 else -1
        if self.basis.shape != (rank, self.mean.numel()) or rank < 1:
            raise ValueError(
                f"expected a basis of {self.mean.numel()} pixels a row and a share of the variance "
                f"for each row, got {tuple(self.basis.shape)} and {tuple(self.explained.shape)}"
            )
        products = self.basis.double() @ self.basis.double().T
        if float((products - torch.eye(rank)).abs().max()) > _ORTHONORMAL:
            raise ValueError("expected a basis of orthonormal rows, got others")
        return self

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
            with torch.inference_mode(False):  # it is kept, and may serve training later
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


class Neighbourhoods:
    """Images and the nearest neighbours of each, from which tangent spaces are made on demand.

    Everything is on the CPU, where scikit-learn searches; results move to where they are used.

    Attributes:
        images: `(n, ...)` as they were given, uint8 or float.
        neighbours: `(n, k)`, indices of the nearest other images, nearest first.
    """

    def __init__(self, images: Tensor, neighbours: Tensor) -> None:
        self.images, self.neighbours = images, neighbours
        self._flat = _flat(images)
        self._index: NearestNeighbors | None = None
        self._tangents: dict[tuple[int, int], Tensor] = {}
        self._last: tuple[Tensor, list[int]] | None = None

    @classmethod
    def among(cls, images: Tensor, count: int) -> Neighbourhoods:
        """Find the `count` nearest neighbours of every image."""
        images = images.detach().cpu()
        index = _searched(_flat(images), count)
        found = cls(images, torch.from_numpy(index.kneighbors(return_distance=False)))
        found._index = index
        return found

    def checked(self) -> Neighbourhoods:
        """Itself.

        Raises:
            ValueError: the tensors are not of the shapes above, the images no images, or the
                neighbours no indices of images.
        """
        count = len(self.images)
        check_unit_range(to_unit_range(self.images))
        known = self.neighbours
        whole = known.dtype == torch.int64 and known.ndim == 2 and len(known) == count > 0
        if not (whole and known.numel() and 0 <= int(known.min()) <= int(known.max()) < count):
            raise ValueError(
                f"expected neighbours as indices (n, k) of {count} images, got {known.dtype} of "
                f"shape {tuple(known.shape)}"
            )
        return self

    def project(self, inputs: Tensor, vectors: Tensor, rank: int) -> Tensor:
        """Project `vectors` onto the tangent spaces at the images nearest to `inputs`."""
        flat = at_least_float32(vectors).flatten(1)
        with torch.autocast(vectors.device.type, enabled=False):
            bases = self._bases(self._nearest(inputs), rank).to(flat)
            coordinates = einsum(bases, flat, "b r d, b d -> b r")
            tangent = einsum(bases, coordinates, "b r d, b r -> b d")
        return tangent.reshape(vectors.shape).to(vectors.dtype)

    def tangent_bases(self, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Tangent spaces at the images `index` `(batch,)`.

        Returns:
            Orthonormal rows `(batch, rank, pixels)` in float64, zero where the neighbours span
            less, and the share of their squared distances along each `(batch, rank)`.
        """
        offsets = self._flat[self.neighbours[index]].double() - self._flat[index].double()[:, None]
        _, values, directions = torch.linalg.svd(offsets, full_matrices=False)
        kept = (values > _ROUNDING * values[:, :1])[:, :rank].double()
        squared = values.square()
        total = squared.sum(1, keepdim=True)
        explained = squared[:, :rank] / torch.where(total > 0, total, 1)
        return directions[:, :rank] * kept[:, :, None], explained * kept

    def _nearest(self, inputs: Tensor) -> list[int]:
        """Index of the image nearest to each input; kept for the last batch, which terms repeat."""
        queries = _flat(inputs.detach().cpu())
        if self._last is not None and torch.equal(self._last[0], queries):
            return self._last[1]
        if self._index is None:
            self._index = _searched(self._flat, 1)
        rows = self._index.kneighbors(
            queries.to(self._flat.dtype).numpy(), n_neighbors=1, return_distance=False
        )
        self._last = (queries.clone(), rows[:, 0].tolist())
        return self._last[1]

    def _bases(self, index: list[int], rank: int) -> Tensor:
        """Tangent bases at these images, from the cache where they are in it."""
        known = {row: self._tangents[rank, row] for row in index if (rank, row) in self._tangents}
        missing = sorted(set(index) - set(known))
        for start in range(0, len(missing), _CHUNK):
            rows = missing[start : start + _CHUNK]
            known |= dict(zip(rows, self.tangent_bases(torch.tensor(rows), rank)[0], strict=True))
        for row in missing:
            if (len(self._tangents) + 1) * known[row].nbytes <= _CACHE_BYTES:
                self._tangents[rank, row] = known[row].clone()  # not a view of its whole chunk
        return torch.stack([known[row] for row in index])


def _flat(images: Tensor) -> Tensor:
    """Images as rows of floats in [0,1]."""
    return at_least_float32(to_unit_range(images)).flatten(1)


def _searched(rows: Tensor, count: int) -> NearestNeighbors:
    from sklearn.neighbors import NearestNeighbors  # a second to import

    return NearestNeighbors(n_neighbors=count).fit(rows.numpy())
