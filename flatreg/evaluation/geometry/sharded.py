"""How a model is measured, and on which samples, shared out over the processes of a launch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from flatreg.data.configuration import configuration
from flatreg.data.loading import Loading, batches
from flatreg.data.progress import progress_bar
from flatreg.data.sharing import Batch, gather, rank_and_world
from flatreg.data.text import one_line
from flatreg.evaluation.geometry.by_outcome import HeadPasses, pass_clean_and_attacked
from flatreg.evaluation.geometry.card import PARTS, Part
from flatreg.measures.manifold import Manifold
from flatreg.models.heads import Head, find_head
from flatreg.terms.protocol import Amount, Count, Number
from flatreg.threat import Norm, check_eps

_BLOCK = 16  # random probes are keyed by block, so it may depend neither on processes nor batches


@configuration
class MeasureSettings:
    """What `flatreg.measure` takes as keywords and `flatreg measure` as `key=value`.

    Attributes:
        eps: radius of the attack that makes the "attacked" samples, in [0,1] pixel units.
        norm: of the attack: "linf", "l2" or "l1".
        samples: size of a fixed, seeded subset, for what takes forward passes; None for all.
        probed: how many of them are used for what differentiates twice; the largest eigenvalue of
            the Hessian takes them as one batch.
        num_probes: random directions an estimate, two at least.
        radii: L2 lengths in feature space for the bounds; left out, up to twice the median distance
            at which a prediction may change.
        seed: of the subset, the attack and the probes.
        batch_size: samples at a time.
        parts: which to measure.

    Raises:
        ValueError: an unknown norm or part, too few probes, eps that is no radius of the norm, a
            negative radius.
    """

    eps: Number
    norm: Norm = "linf"
    samples: Count | None = 512
    probed: Count = 64
    num_probes: Annotated[int, Field(ge=2)] = 32
    radii: Annotated[Sequence[Amount], Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 128
    parts: Annotated[Sequence[Part], Field(min_length=1)] = PARTS

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        object.__setattr__(self, "parts", tuple(self.parts))


@dataclass(frozen=True, eq=False)
class ShardedMeasurement:
    """What every part of the card is measured on.

    Attributes:
        model: the module itself, in eval mode.
        dataset: images and labels.
        loading: how they are fetched, as arguments of a `DataLoader`.
        indices: samples for what takes forward passes.
        probed: those of them for what differentiates twice.
        shape: of one image.
        manifold: fitted.
        settings: of the measurement.
        progress: show bars.
    """

    model: nn.Module
    dataset: Dataset[Any]
    loading: Loading
    indices: list[int]
    probed: list[int]
    shape: tuple[int, ...]
    manifold: Manifold
    settings: MeasureSettings
    progress: bool

    def per_batch(
        self, what: str, compute: Callable[[Batch], Mapping[str, Any]]
    ) -> dict[str, list[Any]]:
        """What `compute` finds in each batch of the probed samples, by name, of all processes.

        `what` is for the bar.

        Raises:
            ValueError: as `gathered`.
        """
        rank, world = rank_and_world()
        own = self.probed[rank::world]
        return gathered(compute(b) for b in self._shown(what, own, self.settings.batch_size))

    def per_block(
        self, what: str, compute: Callable[[int, Batch], Mapping[str, Any]]
    ) -> dict[str, list[Any]]:
        """The same over small blocks, each with its number.

        A block is the same whatever the batch size and the number of processes.
        """
        rank, world = rank_and_world()
        starts = range(0, len(self.probed), _BLOCK)[rank::world]
        own = [index for start in starts for index in self.probed[start : start + _BLOCK]]
        blocks = zip(starts, self._shown(what, own, _BLOCK), strict=True)
        return gathered(compute(start // _BLOCK, block) for start, block in blocks)

    def one_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of all probed samples."""
        every = list(batches(self.model, self.dataset, self.probed, _BLOCK, self.loading))
        return torch.cat([b.inputs for b in every]), torch.cat([b.labels for b in every])

    @cached_property
    def head(self) -> Head:
        """Head of the model.

        Raises:
            ValueError: it has none that is one linear map.
        """
        first = next(batches(self.model, self.dataset, self.indices[:2], 2, self.loading))
        return find_head(self.model, first.inputs)

    @cached_property
    def passes(self) -> HeadPasses:
        """Features and logits of every sample, clean and attacked, on every process.

        Raises:
            ValueError: the model has no linear head.
        """
        names = ("eps", "norm", "seed", "batch_size")
        return pass_clean_and_attacked(
            self.model,
            self.dataset,
            self.indices,
            head=self.head,
            loading=self.loading,
            progress=self.progress,
            **{name: getattr(self.settings, name) for name in names},
        )

    def _shown(self, what: str, indices: list[int], size: int) -> Iterator[Batch]:
        yield from progress_bar(
            f"measure {what}",
            -(-len(indices) // size),
            over=batches(self.model, self.dataset, indices, size, self.loading),
            unit="batches",
            shown=self.progress,
        )


def gathered(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the rows of all processes; where one of them fails, all of them do.

    Args:
        rows: of this process; a generator, so that it fails here.

    Raises:
        ValueError: the generator raised it, or a RuntimeError, on some process; torch raises the
            latter where an operator lacks a derivative or memory runs out.
    """
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    cause: Exception | None = None
    try:
        for row in rows:
            for name, value in row.items():
                columns[name].append(value)
    except (ValueError, RuntimeError) as error:
        cause = error
        columns["refused"] = [one_line(error, None) or repr(error)]
    merged = gather(columns)
    if "refused" in merged:
        raise ValueError(merged["refused"][0]) from cause
    return merged
