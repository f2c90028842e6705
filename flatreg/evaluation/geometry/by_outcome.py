r"""Relative flatness by what became of the sample: right, wrong, or attacked.

kappa knows no label: a sample that is confidently wrong is as flat as one that is confidently
right. The attack here stops at the flip, where confidence is low, so attacked samples are sharp;
how kappa decreases beyond the flip is what `flatreg.evaluation.attack_path` follows. kappa moves
with the scale of the logits too, so it is also given at matched confidence: head and logits are
scaled by one c at which the median confidence of the clean samples is 0.9. **Larger means
sharper.**

After Walter, Adilova, Vreeken and Kamp, "When Flatness Does (Not) Guarantee Adversarial
Robustness", 2025.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import Dataset

from flatreg.attacks.cascade import PRESETS, describe
from flatreg.data.loading import Loading, batches
from flatreg.data.progress import progress_bar
from flatreg.data.sharing import gather, rank_and_world
from flatreg.evaluation.results import Evaluation
from flatreg.measures.at_head import AtHead, pass_to_head
from flatreg.measures.estimate import Estimate
from flatreg.measures.relative_flatness import matching_scale
from flatreg.models.heads import Head, find_head
from flatreg.models.state import untouched

CONFIDENCE = 0.9  # median confidence at which kappa is compared between models
EDGES = (0.0, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9999, 1.0)

_ATTACK = PRESETS["fast"][0]  # with which every cascade of flatreg begins


class HeadPasses(NamedTuple):
    """Samples of one model at its head, as they are and attacked.

    Attributes:
        clean: all samples.
        attacked: the attacked images of those that were right and are fooled.
    """

    clean: AtHead
    attacked: AtHead


@dataclass(frozen=True)
class Flatness:
    """Relative flatness of some samples; **larger means sharper**.

    Attributes:
        n: how many they are.
        raw: mean kappa; None for fewer than two samples.
        matched: the same at matched confidence; None also where no scale reaches it.
    """

    n: int
    raw: Estimate | None
    matched: Estimate | None


@dataclass(frozen=True)
class FlatnessByOutcome:
    """Relative flatness of one model by outcome.

    Attributes:
        clean: all samples as they are.
        right: those classified right.
        wrong: those classified wrong.
        attacked: those classified right that the attack flips, at the first attacked image with
            another label.
        scale: c of the matched columns; None where no scale reaches the confidence.
        confidence: median confidence of the clean samples at that scale.
    """

    clean: Flatness
    right: Flatness
    wrong: Flatness
    attacked: Flatness
    scale: float | None
    confidence: float


@dataclass(frozen=True)
class ConfidenceBin:
    """Relative flatness of the samples of like confidence.

    Attributes:
        low: confidence is above it,
        high: and not above this.
        n: samples by outcome: "right", "wrong", "attacked".
        uncertainty: mean of 1 - confidence by outcome, where there are samples.
        kappa: mean by outcome; None for fewer than two samples.
    """

    low: float
    high: float
    n: dict[str, int]
    uncertainty: dict[str, float]
    kappa: dict[str, Estimate | None]


def flatness_by_outcome(passes: HeadPasses, *, confidence: float = CONFIDENCE) -> FlatnessByOutcome:
    """Mean relative flatness over all, right, wrong and attacked samples.

    Args:
        passes: of one model.
        confidence: median confidence of the clean samples for the matched columns.
    """
    clean, attacked = passes
    scale = matching_scale(clean.logits, confidence)

    # kappa of all samples at once: its last digits depend on the batch it is computed in.
    of_clean, of_attacked = ((at.kappa(), at.kappa(scale) if scale else None) for at in passes)

    def flatness(kappas: tuple[Tensor, Tensor | None], rows: Tensor) -> Flatness:
        raw, matched = (None if kappa is None else _mean(kappa[rows]) for kappa in kappas)
        return Flatness(int(rows.sum()), raw, matched)

    return FlatnessByOutcome(
        clean=flatness(of_clean, torch.ones_like(clean.right)),
        right=flatness(of_clean, clean.right),
        wrong=flatness(of_clean, ~clean.right),
        attacked=flatness(of_attacked, torch.ones_like(attacked.right)),
        scale=scale,
        confidence=confidence,
    )


def flatness_by_confidence(
    passes: HeadPasses, *, scale: float = 1.0, edges: Sequence[float] = EDGES
) -> list[ConfidenceBin]:
    """Mean relative flatness by confidence, right, wrong and attacked samples apart.

    Args:
        passes: of one model.
        scale: c, by which logits and head are multiplied first.
        edges: of the bins, ascending in [0, 1].
    """
    right = passes.clean.right
    scaled = (at.scaled(scale) for at in passes)
    clean, attacked = ((at.uncertainty, at.kappa()) for at in scaled)
    groups = {
        "right": (clean[0][right], clean[1][right]),
        "wrong": (clean[0][~right], clean[1][~right]),
        "attacked": attacked,
    }
    bins = []
    for low, high in pairwise(edges):
        inside = {name: (1 - high <= u) & (u < 1 - low) for name, (u, _) in groups.items()}
        means = {n: float(groups[n][0][rows].mean()) for n, rows in inside.items() if rows.any()}
        bins.append(
            ConfidenceBin(
                low=low,
                high=high,
                n={name: int(rows.sum()) for name, rows in inside.items()},
                uncertainty=means,
                kappa={name: _mean(groups[name][1][rows]) for name, rows in inside.items()},
            )
        )
    return bins


def pass_clean_and_attacked(
    model: nn.Module,
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 256,
    head: Head | None = None,
    among: Collection[int] | None = None,
    loading: Loading | None = None,
    progress: bool = False,
) -> HeadPasses:
    """Pass samples through `model`, and what a margin-PGD of 10 steps makes of those it has right.

    The model is evaluated in eval mode and left untouched. Processes share the samples; every one
    gets all of them, on the CPU, in the order of `indices`.

    Args:
        model: images in [0,1] to logits.
        dataset: map-style, of (image, label); images are uint8 or in [0,1].
        indices: ascending; which samples.
        eps: radius of the attack in [0,1] pixel units.
        norm: of the attack.
        seed: of the attack.
        batch_size: samples at a time.
        head: of the model; left out, it is searched for.
        among: the samples to attack, as far as they are right; left out, all. Where an earlier run
            of the same attack is known, those that it fooled are enough.
        loading: how batches are fetched, as arguments of a `DataLoader`.
        progress: show a bar.

    Raises:
        ValueError: the model has no linear head; images outside [0,1]; eps is no radius of `norm`.
    """
    rank, world = rank_and_world()
    own = list(indices)[rank::world]
    columns: defaultdict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
    with untouched(model):
        if head is None:
            first = next(batches(model, dataset, list(indices)[:2], 2, loading))
            head = find_head(model, first.inputs)
        at_head = partial(pass_to_head, model, head=head, batch_size=batch_size)
        for batch in progress_bar(
            "measure flatness",
            -(-len(own) // batch_size),
            over=batches(model, dataset, own, batch_size, loading),
            unit="batches",
            shown=progress,
        ):
            index = torch.tensor(batch.indices)
            clean = at_head(batch.inputs, batch.labels)
            tried = clean.right
            if among is not None:
                tried = tried & torch.tensor([i in among for i in batch.indices])
            rows = tried.to(batch.inputs.device)
            x, y, known = batch.inputs[rows], batch.labels[rows], index[tried]
            found = _ATTACK(model, x, y, eps=eps, norm=norm, seed=seed, indices=known.tolist())
            fooled = found.fooled
            # A batch of no images is more than some layers take.
            attacked = clean.rows(torch.empty(0).long())
            if bool(fooled.any()):
                attacked = at_head(found.inputs[fooled], y[fooled])
            known = known[fooled.cpu()]
            for name, its, at in (("clean", index, clean), ("attacked", known, attacked)):
                columns[name].append((its, at.features, at.logits, at.labels))
        merged, weight = gather(columns), head.weight.detach().cpu()
    return HeadPasses(*(_in_order(merged[name], weight) for name in HeadPasses._fields))


def measured_by_outcome(
    model: nn.Module, data: Dataset[Any], indices: list[int], **settings: Any
) -> FlatnessByOutcome | None:
    """`flatness_by_outcome` of `pass_clean_and_attacked`; None where no head is one linear map.

    Args:
        model: images in [0,1] to logits.
        data: map-style, of (image, label).
        indices: ascending; which samples.
        settings: keywords of `pass_clean_and_attacked`.

    Raises:
        ValueError: images outside [0,1]; eps is no radius of `norm`.
    """
    with untouched(model):
        first = next(batches(model, data, indices[:2], 2))
        try:
            head = find_head(model, first.inputs)
        except ValueError:
            return None
    return flatness_by_outcome(pass_clean_and_attacked(model, data, indices, head=head, **settings))


def fooled_before(evaluation: Evaluation, *, bfloat16: bool) -> set[int] | None:
    """Samples that the attack of `pass_clean_and_attacked` fooled in an evaluation of the model.

    Args:
        evaluation: of the same model, eps and norm.
        bfloat16: whether it searched in bfloat16: the verdicts of another precision are others.

    Returns:
        Dataset indices for `among`; None where the cascade starts with another attack.
    """
    if bfloat16 or evaluation.stages[0].attack != describe(_ATTACK):
        return None
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    return {index for index, verdict in verdicts if verdict == 0}


def _in_order(parts: list[tuple[Tensor, ...]], weight: Tensor) -> AtHead:
    """Samples by ascending index, given index, features, logits and labels of each batch."""
    index, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
    features, logits, labels = (column[index.argsort()] for column in columns)
    return AtHead(features, logits, labels, weight)


def _mean(values: Tensor) -> Estimate | None:
    return Estimate.mean(values) if len(values) > 1 else None
