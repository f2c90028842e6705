r"""Which directions stay on the data manifold and which leave it.

A manifold splits vectors at given inputs into (tangent, normal) parts: tangent + normal = v, and
the normal part is :math:`P v` with P a symmetric projector, constant for differentiation.

| manifold           | tangent space at x                                                        |
|--------------------|---------------------------------------------------------------------------|
| `IdentityManifold` | {0}: every direction is off-manifold                                      |
| `PCAManifold`      | the same everywhere: top principal components of the training images      |
| `LocalPCAManifold` | top directions from the training image nearest to x to its own neighbours |

A manifold is its own configuration. What `fit` finds is carried along with it and is no part of
that: not of its repr, its comparison or its dump.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, InstanceOf, TypeAdapter, model_validator
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.data.files import AGAIN, load_whole, save_whole
from flatreg.data.text import one_line
from flatreg.measures.tangent_spaces import Neighbourhoods, Subspace, principal_subspace
from flatreg.models.precision import at_least_float32
from flatreg.threat import check_unit_range, to_unit_range

if TYPE_CHECKING:
    from typing_extensions import Self


_Rank = Annotated[int, Field(ge=1)]
_Batch = Tensor | Sequence[Tensor]


@configuration
class IdentityManifold:
    """Every direction is off-manifold: the tangent space is {0}, the normal projector is I."""

    kind: Literal["IdentityManifold"] = "IdentityManifold"
    tangent_dimension: ClassVar[int] = 0

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Split `vectors` at `inputs` (both `(batch, ...)`) into (tangent, normal) parts."""
        return torch.zeros_like(vectors), vectors


class _Fitted:
    """What both fitted manifolds do with `fitted`, which their `fit` fills."""

    fitted: Any
    _state_type: ClassVar[type[Any]]
    _tensors: ClassVar[tuple[str, ...]]

    def save(self, path: str | Path) -> None:
        """Write the fitted manifold as safetensors, hyperparameters as its metadata.

        Raises:
            ValueError: not fitted.
            OSError: the file could not be written; one that was there is left as it was.
        """
        tensors = {name: getattr(self._state(), name) for name in self._tensors}
        config = TypeAdapter(type(self)).dump_python(self, mode="json")
        save_whole(Path(path), tensors, {"manifold": json.dumps(config)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, onto the CPU; `split` moves it to where it is used.

        Raises:
            ValueError: the file is damaged, or holds something else.
            OSError: there is none.
        """
        tensors, about = load_whole(Path(path))
        try:
            config = json.loads(about.get("manifold", "{}"))
            kind = config.get("kind")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged: {one_line(error)}{AGAIN}") from error
        if kind != cls.__name__:
            raise ValueError(f"{path}: expected a {cls.__name__}, got {one_line(kind)}")
        try:
            return cls(**config | {"fitted": cls._state_type(**tensors).checked()})
        except (TypeError, ValueError, RuntimeError) as error:  # as of names that it does not have
            raise ValueError(f"{path}: damaged: {one_line(error)}{AGAIN}") from error

    def _state(self) -> Any:
        if self.fitted is None:
            raise ValueError(f"{type(self).__name__} is not fitted: call .fit(images) first")
        return self.fitted


@configuration
class PCAManifold(_Fitted):
    """One linear tangent space: the span of the training images' top principal components.

    Args:
        rank: number of components.
        oversampling: further random directions carried along in the fit, for accuracy.
        power_iterations: of the range finder; the fit takes this + 2 passes over the images.
        seed: of the fit's random start.
    """

    rank: _Rank
    oversampling: Annotated[int, Field(ge=0)] = 10
    power_iterations: Annotated[int, Field(ge=0)] = 2
    seed: Annotated[int, Field(ge=0)] = 0
    kind: Literal["PCAManifold"] = "PCAManifold"
    fitted: SkipJsonSchema[Annotated[InstanceOf[Subspace] | None, Field(exclude=True)]] = (
        dataclasses.field(default=None, repr=False, compare=False)
    )
    _state_type: ClassVar[type] = Subspace
    _tensors: ClassVar[tuple[str, ...]] = ("mean", "basis", "explained")

    @model_validator(mode="after")
    def _fits_its_rank(self) -> PCAManifold:
        if self.fitted is not None and len(self.fitted.basis) > self.rank:
            raise ValueError(
                f"rank is {self.rank} but {len(self.fitted.basis)} components were fitted: "
                "fit again"
            )
        return self

    def fit(self, images: Tensor | Iterable[_Batch]) -> PCAManifold:
        """Find the components of the training images.

        Args:
            images: `(n, ...)`, uint8 or floats in [0,1]; or a stream of batches of them that can be
                passed through several times, as a DataLoader can (labels beside them are ignored).

        Returns:
            A fitted copy.

        Raises:
            ValueError: too few images for `rank`, images of several shapes or outside [0,1], or a
                stream that ends after one pass.
        """
        if isinstance(images, Iterator):
            raise ValueError(
                "images must be a tensor or a stream that can be passed through several times, "
                f"got a {type(images).__name__}"
            )
        subspace = principal_subspace(
            lambda: (_unit_images(batch) for batch in _batches(images)),
            self.rank,
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            seed=self.seed,
        )
        return dataclasses.replace(self, fitted=subspace)

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Split `vectors` (`(batch, ...)`, images in shape) into (tangent, normal) parts.

        Raises:
            ValueError: not fitted, or fitted to images of another shape.
        """
        subspace = self._state()
        _check_shape(vectors, subspace.mean.shape)
        tangent = subspace.project(vectors)
        return tangent, vectors - tangent

    @property
    def tangent_dimension(self) -> int:
        """Dimension of its tangent space: the number of components that were found.

        Raises:
            ValueError: not fitted.
        """
        return len(self._state().basis)

    @property
    def explained_variance(self) -> float:
        """Share of the training images' variance inside the tangent space, in [0, 1]."""
        return float(self._state().explained.sum())


@configuration
class LocalPCAManifold(_Fitted):
    """Tangent spaces that follow the data: local PCA at the training image nearest to x.

    The tangent space there is spanned by the top directions from the image to its nearest
    neighbours. An augmented x is no training image, hence the nearest one. All images stay in the
    memory of the CPU; a split at new inputs compares each with all of them there.

    Args:
        neighbours: images that define a tangent space.
        rank: dimension of the tangent space, at most `neighbours`.
    """

    rank: _Rank
    neighbours: _Rank = 16
    kind: Literal["LocalPCAManifold"] = "LocalPCAManifold"
    fitted: SkipJsonSchema[Annotated[InstanceOf[Neighbourhoods] | None, Field(exclude=True)]] = (
        dataclasses.field(default=None, repr=False, compare=False)
    )
    _state_type: ClassVar[type] = Neighbourhoods
    _tensors: ClassVar[tuple[str, ...]] = ("images", "neighbours")

    @model_validator(mode="after")
    def _has_the_neighbours_it_needs(self) -> LocalPCAManifold:
        if self.rank > self.neighbours:
            raise ValueError(
                f"rank must be at most the number of neighbours, {self.neighbours}, got {self.rank}"
            )
        if self.fitted is not None and self.fitted.neighbours.shape[1] != self.neighbours:
            raise ValueError(
                f"neighbours is {self.neighbours} but {self.fitted.neighbours.shape[1]} were found "
                "by the fit: fit again"
            )
        return self

    def fit(self, images: Tensor | Iterable[_Batch]) -> LocalPCAManifold:
        """Find the neighbours of every training image, once.

        Takes n^2 x pixels multiplications on the CPU: for 10,000 images of 3 x 32 x 32 one minute
        of one core, and growing with the square.

        Args:
            images: `(n, ...)`, uint8 or floats in [0,1]; or batches of them.

        Returns:
            A fitted copy.

        Raises:
            ValueError: too few images, images of several shapes or outside [0,1].
        """
        whole = torch.cat(list(_batches(images))).detach()
        if len(whole) <= self.neighbours:
            raise ValueError(
                f"{self.neighbours} neighbours need more than {self.neighbours} images, "
                f"got {len(whole)}"
            )
        _unit_images(whole)
        return dataclasses.replace(self, fitted=Neighbourhoods.among(whole, self.neighbours))

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Split `vectors` at `inputs` (both `(batch, ...)`) into (tangent, normal) parts.

        Raises:
            ValueError: not fitted, or fitted to images of another shape.
        """
        state = self._state()
        _check_shape(inputs, state.images.shape[1:])
        _check_shape(vectors, state.images.shape[1:])
        tangent = state.project(inputs, vectors, self.rank)
        return tangent, vectors - tangent

    @property
    def tangent_dimension(self) -> int:
        """Dimension of its tangent spaces."""
        return self.rank

    @property
    def explained_variance(self) -> float:
        """Share of the neighbours' squared distances inside the tangent space, mean over images.

        Of 512 images at most, evenly spaced.
        """
        state = self._state()
        count = len(state.images)
        index = torch.arange(0, count, max(1, count // 512))[:512]
        parts = [state.tangent_bases(some, self.rank)[1].sum(1) for some in torch.split(index, 16)]
        return float(torch.cat(parts).mean())


Manifold = Annotated[IdentityManifold | PCAManifold | LocalPCAManifold, Field(discriminator="kind")]


def _batches(images: Tensor | Iterable[_Batch]) -> Iterator[Tensor]:
    """Images in batches; of a batch that is a sequence, the first member."""
    if isinstance(images, Tensor):
        yield from torch.split(images, 1024)
        return
    for batch in images:
        yield batch if isinstance(batch, Tensor) else batch[0]


def _unit_images(batch: Tensor) -> Tensor:
    images = at_least_float32(to_unit_range(batch.detach()))
    check_unit_range(images)
    return images


def _check_shape(vectors: Tensor, shape: Sequence[int]) -> None:
    if vectors.shape[1:] != torch.Size(shape):
        raise ValueError(
            f"the manifold was fitted to images of shape {tuple(shape)}, "
            f"got {tuple(vectors.shape[1:])}"
        )
