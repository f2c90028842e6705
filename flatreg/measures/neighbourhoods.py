"""Nearest neighbours among images, and the tangent spaces they span."""

from __future__ import annotations

import torch
from einops import einsum
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from flatreg.precision import at_least_float32
from flatreg.threat import to_unit_range

_CHUNK = 16  # tangent spaces at a time: 16 neighbours of 224 x 224 pixels in float64 are 0.3 GB
_NEGLIGIBLE = 1e-4  # singular value, relative to the largest, below which a direction is rounding
_CACHE_BYTES = 2**31  # of tangent spaces that are kept; later ones are made anew every time


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
        index = NearestNeighbors(n_neighbors=count).fit(_flat(images).numpy())
        found = cls(images, torch.from_numpy(index.kneighbors(return_distance=False)))
        found._index = index
        return found

    def project(self, inputs: Tensor, vectors: Tensor, rank: int) -> Tensor:
        """Project `vectors` onto the tangent spaces at the images nearest to `inputs`."""
        flat = at_least_float32(vectors).flatten(1)
        with torch.autocast(vectors.device.type, enabled=False):
            bases = self._bases(self._nearest(inputs), rank).to(flat)
            shares = einsum(bases, flat, "b r d, b d -> b r")
            tangent = einsum(bases, shares, "b r d, b r -> b d")
        return tangent.reshape(vectors.shape).to(vectors.dtype)

    def tangent_bases(self, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Tangent spaces at the images `index` `(batch,)`.

        Returns:
            Orthonormal rows `(batch, rank, pixels)` in float64, zero where the neighbours span
            less, and the share of their squared distances along each `(batch, rank)`.
        """
        offsets = self._flat[self.neighbours[index]].double() - self._flat[index].double()[:, None]
        _, values, directions = torch.linalg.svd(offsets, full_matrices=False)
        kept = (values > _NEGLIGIBLE * values[:, :1])[:, :rank].double()
        squared = values.square()
        total = squared.sum(1, keepdim=True)
        shares = squared[:, :rank] / torch.where(total > 0, total, 1)
        return directions[:, :rank] * kept[:, :, None], shares * kept

    def _nearest(self, inputs: Tensor) -> list[int]:
        """Index of the image nearest to each input; terms ask again and again for one batch."""
        queries = _flat(inputs.detach().cpu())
        if self._last is not None and torch.equal(self._last[0], queries):
            return self._last[1]
        if self._index is None:
            self._index = NearestNeighbors(n_neighbors=1).fit(self._flat.numpy())
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
