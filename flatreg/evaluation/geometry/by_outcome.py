r"""Relative flatness by what became of the sample: right, wrong, or attacked.

kappa knows no label: a sample that is confidently wrong is as flat as one that is confidently
right. The attack here stops at the flip, where confidence is low, so attacked samples are sharp;
how kappa falls beyond the flip is what `flatreg.evaluation.attack_path` follows. kappa moves with
the scale of the logits too, so it is also given at matched confidence, head and logits scaled by
one c at which the median confidence of the clean samples is 0.9. **Larger means sharper.**

After Walter, Adilova, Vreeken and Kamp, "When Flatness Does (Not) Guarantee Adversarial
Robustness", 2025.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass as record
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from flatreg.attacks.pgd import pgd
from flatreg.data.loading import Batch, Loading, batches, gather, rank_and_world
from flatreg.measures.estimate import Estimate
from flatreg.measures.relative_flatness import matching_scale, relative_flatness
from flatreg.models.forward import run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.state import untouched

CONFIDENCE = 0.9  # median confidence at which kappa is compared between models
EDGES = (0.0, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9999, 1.0)


@record(frozen=True, eq=False)
class HeadPasses:
    """What reached the head, clean and attacked, and what came out.

    Attributes:
        labels: `(n,)`.
        features: of the clean samples `(n, features)`.
        logits: `(n, classes)`.
        attacked_features: of the attacked images of those that were right and are fooled
            `(m, features)`.
        attacked_logits: `(m, classes)`.
        weight: of the head `(classes, features)`.
    """

    labels: Tensor
    features: Tensor
    logits: Tensor
    attacked_features: Tensor
    attacked_logits: Tensor
    weight: Tensor

    @property
    def right(self) -> Tensor:
        """`(n,)` booleans."""
        return self.logits.argmax(1) == self.labels


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
        unsureness: mean of 1 - confidence by outcome, where there are samples.
        kappa: mean by outcome; None for fewer than two samples.
    """

    low: float
    high: float
    n: dict[str, int]
    unsureness: dict[str, float]
    kappa: dict[str, Estimate | None]


def flatness_by_outcome(passes: HeadPasses, *, confidence: float = CONFIDENCE) -> FlatnessByOutcome:
    """Mean relative flatness over all, right, wrong and attacked samples.

    Args:
        passes: of one model.
        confidence: median confidence of the clean samples for the matched columns.
    """
    scale = matching_scale(passes.logits, confidence)
    columns = [_kappa(passes, 1.0), _kappa(passes, scale) if scale else None]
    everywhere = torch.ones_like(passes.right)

    def flatness(rows: Tensor, attacked: bool = False) -> Flatness:
        raw, matched = (c and estimate(c[int(attacked)][rows]) for c in columns)
        return Flatness(int(rows.sum()), raw, matched)

    return FlatnessByOutcome(
        clean=flatness(everywhere),
        right=flatness(passes.right),
        wrong=flatness(~passes.right),
        attacked=flatness(torch.ones(len(passes.attacked_logits)).bool(), attacked=True),
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
    clean, attacked = _kappa(passes, scale)
    groups = {
        "right": (clean, passes.logits, passes.right),
        "wrong": (clean, passes.logits, ~passes.right),
        "attacked": (attacked, passes.attacked_logits, torch.ones(len(attacked)).bool()),
    }
    doubt = {name: _unsureness(scale * z[rows]) for name, (_, z, rows) in groups.items()}
    bins = []
    for low, high in pairwise(edges):
        inside = {name: (1 - high <= d) & (d < 1 - low) for name, d in doubt.items()}
        bins.append(
            ConfidenceBin(
                low,
                high,
                n={name: int(mask.sum()) for name, mask in inside.items()},
                unsureness={n: float(doubt[n][m].mean()) for n, m in inside.items() if m.any()},
                kappa={n: estimate(groups[n][0][groups[n][2]][m]) for n, m in inside.items()},
            )
        )
    return bins


def measured_by_outcome(
    model: nn.Module, data: Dataset[Any], indices: list[int], **settings: Any
) -> FlatnessByOutcome | None:
    """`flatness_by_outcome` of `head_passes`, whose settings these are; None without a head."""
    try:
        return flatness_by_outcome(head_passes(model, data, indices, **settings))
    except ValueError:  # the model has no head that is one linear map
        return None


def head_passes(
    model: nn.Module,
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 256,
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
        loading: how batches are fetched, as arguments of a `DataLoader`.
        progress: show a bar.

    Raises:
        ValueError: the model has no linear head; images outside [0,1].
    """
    rank, world = rank_and_world()
    share = list(indices)[rank::world]
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    with untouched(model):
        first = next(batches(model, dataset, list(indices)[:2], 2, loading))
        head = find_head(model, first.inputs)
        for batch in tqdm(
            batches(model, dataset, share, batch_size, loading),
            desc="measure flatness",
            total=-(-len(share) // batch_size),
            leave=False,
            disable=not progress,
        ):
            for name, values in _pass(model, batch, head, eps, norm, seed).items():
                columns[name].append(values.cpu())
        merged = {name: torch.cat(values) for name, values in gather(columns).items()}
        order, fooled = merged["index"].argsort(), merged["attacked_index"].argsort()
        return HeadPasses(
            labels=merged["labels"][order],
            features=merged["features"][order],
            logits=merged["logits"][order],
            attacked_features=merged["attacked_features"][fooled],
            attacked_logits=merged["attacked_logits"][fooled],
            weight=head.weight.detach().cpu(),
        )


def estimate(values: Tensor) -> Estimate | None:
    """Estimate of two values or more."""
    return Estimate.mean(values) if len(values) > 1 else None


def _pass(
    model: nn.Module, batch: Batch, head: Head, eps: float, norm: str, seed: int
) -> dict[str, Tensor]:
    index = torch.tensor(batch.indices)
    with torch.no_grad():
        clean = run_forward(model, batch.inputs, batch.labels, head)
    right = clean.logits.argmax(1) == batch.labels
    found = pgd(
        model,
        batch.inputs[right],
        batch.labels[right],
        eps=eps,
        norm=norm,
        seed=seed,
        indices=index[right.cpu()].tolist(),
    )
    fooled, labels = found.inputs[found.fooled], batch.labels[right][found.fooled]
    with torch.no_grad():
        # A batch of no images is more than some layers take.
        attacked = run_forward(model, fooled, labels, head) if len(fooled) else None
    return {
        "index": index,
        "labels": batch.labels,
        "features": clean.features,
        "logits": clean.logits,
        "attacked_index": index[right.cpu()][found.fooled.cpu()],
        "attacked_features": attacked.features if attacked else clean.features[:0],
        "attacked_logits": attacked.logits if attacked else clean.logits[:0],
    }


def _kappa(passes: HeadPasses, scale: float) -> tuple[Tensor, Tensor]:
    """Relative flatness of the clean and of the attacked samples, the head scaled by `scale`."""
    weight = passes.weight if scale == 1 else scale * passes.weight
    clean, attacked = (
        relative_flatness(phi, z if scale == 1 else scale * z, weight)
        for phi, z in (
            (passes.features, passes.logits),
            (passes.attacked_features, passes.attacked_logits),
        )
    )
    return clean, attacked


def _unsureness(logits: Tensor) -> Tensor:
    """1 - confidence, as the sum of the other probabilities: it keeps its digits near 0."""
    p = F.softmax(logits.double(), 1)
    return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)
