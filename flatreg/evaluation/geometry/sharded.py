"""The samples of a measurement, shared out over the processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from flatreg.data.loading import Batch, Loading, batches, gather, rank_and_world
from flatreg.evaluation.geometry.by_outcome import HeadPasses, head_passes
from flatreg.measures.manifold import Manifold

Part = Literal["kappa", "layers", "curvature", "bounds", "sharpness"]
_BLOCK = 16  # random probes are keyed by block, so it may depend neither on processes nor batches


@dataclass(frozen=True, eq=False)
class Survey:
    """What every part of a measurement is taken on.

    Attributes:
        model: the module itself, in eval mode.
        dataset: images and labels.
        loading: how they are fetched, as arguments of a `DataLoader`.
        indices: samples for what takes forward passes.
        probed: those of them for what differentiates twice.
        shape: of one image.
        eps: radius of the attack, in [0,1] pixel units.
        manifold: fitted.
        radii: of the feature bounds; left out, shares of the median feature radius.
        num_probes: random directions an estimate.
        seed: of the probes.
        batch_size: samples at a time.
        progress: show bars.
    """

    model: nn.Module
    dataset: Dataset[Any]
    loading: Loading
    indices: list[int]
    probed: list[int]
    shape: tuple[int, ...]
    eps: float
    manifold: Manifold
    radii: tuple[float, ...] | None
    num_probes: int
    seed: int
    batch_size: int
    progress: bool

    def batches(self, what: str) -> Iterator[Batch]:
        """This process's share of the probed samples."""
        rank, world = rank_and_world()
        yield from self._shown(what, self.probed[rank::world], self.batch_size)

    def blocks(self, what: str) -> Iterator[tuple[int, Batch]]:
        """This process's share of the probed samples in small blocks, each with its number.

        A block is the same whatever the batch size and the number of processes.
        """
        rank, world = rank_and_world()
        starts = range(0, len(self.probed), _BLOCK)[rank::world]
        share = [index for start in starts for index in self.probed[start : start + _BLOCK]]
        numbered = self._shown(what, share, _BLOCK)
        yield from zip((start // _BLOCK for start in starts), numbered, strict=True)

    def everything(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of all probed samples, as one batch."""
        every = list(batches(self.model, self.dataset, self.probed, _BLOCK, self.loading))
        return torch.cat([b.inputs for b in every]), torch.cat([b.labels for b in every])

    @cached_property
    def passes(self) -> HeadPasses:
        """Features and logits of every sample, clean and attacked, on every process.

        Raises:
            ValueError: the model has no linear head.
        """
        return head_passes(
            self.model,
            self.dataset,
            self.indices,
            eps=self.eps,
            seed=self.seed,
            batch_size=self.batch_size,
            loading=self.loading,
            progress=self.progress,
        )

    def _shown(self, what: str, share: list[int], size: int) -> Iterator[Batch]:
        yield from tqdm(
            batches(self.model, self.dataset, share, size, self.loading),
            total=-(-len(share) // size),
            desc=f"measure {what}",
            leave=False,
            disable=not self.progress,
        )


def gathered(compute: Callable[[], Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Gather the columns of all processes; where one of them fails, all of them do.

    Raises:
        ValueError: `compute` raised it, or a RuntimeError, on some process; torch raises the latter
            where an operator lacks a derivative or memory runs out.
    """
    cause: Exception | None = None
    try:
        columns = dict(compute())
    except (ValueError, RuntimeError) as error:
        cause, columns = error, {"refused": [" ".join(str(error).split()) or repr(error)]}
    merged = gather(columns)
    if "refused" in merged:
        raise ValueError(merged["refused"][0]) from cause
    return merged
